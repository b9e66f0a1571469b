"""List the published evaluation sets, with what is known of each before it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Metric = Literal["top1", "mean_per_class"]
Group = Literal["paper", "robustness", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """Describe one set of the papers.

    `folders` are the names that its folder under the data root may have. Its original layout shows by any of `archive`,
    in that folder or right in the data root, or of `inner`, in that folder only. `webdataset` are CLIP_benchmark's
    names. `prompts` is its section in openai/CLIP's prompts.md, `benchmark` its key in clip-benchmark. `aliases` give
    the prompt's class name for labels that share no words with it; labels that are names themselves are written with
    blanks for any of `blanks`. A set whose classes `may_be_empty` has dead links.
    `border` pixels are cut off each side of its images. `size` and `licence` are empty where they are not known.
    """

    name: str
    group: Group
    folders: tuple[str, ...]
    archive: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    webdataset: tuple[str, ...] = ()
    num_test: int
    source: str
    size: str = ""
    licence: str = ""
    num_classes: int = 0
    num_train: int = 0
    metric: Metric = "top1"
    prompts: str = ""
    benchmark: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    blanks: str = "_"
    may_be_empty: bool = False
    border: int = 0


def _torchvision(name: str) -> str:
    return f"torchvision.datasets.{name}(DATA_ROOT, download=True)"


_CALTECH_ALIASES = {
    "BACKGROUND_Google": "background",
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}
_EUROSAT_ALIASES = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}

_SETS = (
    KnownSet(
        name="food101",
        group="paper",
        folders=("food101", "Food101"),
        archive=("food-101/meta",),
        webdataset=("food101",),
        num_classes=101,
        num_train=75_750,
        num_test=25_250,
        prompts="Food101",
        benchmark="food101",
        size="5.0 GB",
        source=_torchvision("Food101"),
        licence="photographs of Foodspotting's users: scientific fair use",  # dataset card ethz/food101
    ),
    KnownSet(
        name="cifar10",
        group="paper",
        folders=("cifar10", "CIFAR10"),
        archive=("cifar-10-batches-py",),
        webdataset=("cifar10", "vtab-cifar10"),
        num_classes=10,
        num_train=50_000,
        num_test=10_000,
        prompts="CIFAR10",
        benchmark="cifar10",
        size="0.2 GB",
        source=_torchvision("CIFAR10"),
    ),
    KnownSet(
        name="cifar100",
        group="paper",
        folders=("cifar100", "CIFAR100"),
        archive=("cifar-100-python",),
        webdataset=("cifar100", "vtab-cifar100"),
        num_classes=100,
        num_train=50_000,
        num_test=10_000,
        prompts="CIFAR100",
        benchmark="cifar100",
        size="0.2 GB",
        source=_torchvision("CIFAR100"),
    ),
    KnownSet(
        name="birdsnap",
        group="paper",
        folders=("birdsnap", "Birdsnap"),
        inner=("species.txt",),
        num_classes=500,
        num_train=42_283,
        num_test=2_149,
        prompts="Birdsnap",
        size="lists of URLs, many of them dead",
        source="birdsnap.tgz of Berg et al. (CVPR 2014), whose script fetches the images into download/images",
        may_be_empty=True,
    ),
    KnownSet(
        name="sun397",
        group="paper",
        folders=("sun397", "SUN397"),
        archive=("SUN397/ClassName.txt",),
        inner=("ClassName.txt",),
        webdataset=("sun397",),
        num_classes=397,
        num_train=19_850,
        num_test=19_850,
        prompts="SUN397",
        benchmark="sun397",
        blanks="_/",  # `church/outdoor`; elsewhere a slash belongs to the name (F/A-18)
        size="39 GB",
        source=_torchvision("SUN397") + ", and Training_01.txt and Testing_01.txt of Partitions.zip into SUN397",
    ),
    KnownSet(
        name="cars",
        group="paper",
        folders=("cars", "stanford_cars_root", "StanfordCars"),
        archive=("stanford_cars/devkit",),
        webdataset=("cars",),
        num_classes=196,
        num_train=8_144,
        num_test=8_041,
        prompts="StanfordCars",
        benchmark="cars",
        size="2.0 GB",
        source="Stanford Cars as torchvision.datasets.StanfordCars reads it (its own address is dead)",
    ),
    KnownSet(
        name="aircraft",
        group="paper",
        folders=("aircraft", "fgvc_aircraft", "FGVCAircraft"),
        archive=("fgvc-aircraft-2013b/data",),
        webdataset=("fgvc_aircraft",),
        num_classes=100,
        num_train=6_667,
        num_test=3_333,
        metric="mean_per_class",
        prompts="FGVCAircraft",
        benchmark="fgvc_aircraft",
        size="2.8 GB",
        source=_torchvision("FGVCAircraft"),
        licence="non-commercial research",  # its page: "exclusively for non-commercial research purposes"
    ),
    KnownSet(
        name="dtd",
        group="paper",
        folders=("dtd", "DTD"),
        archive=("dtd/dtd/labels",),
        webdataset=("dtd", "vtab-dtd"),
        num_classes=47,
        num_train=3_760,
        num_test=1_880,
        prompts="DescribableTextures",
        benchmark="dtd",
        size="0.6 GB",
        source=_torchvision("DTD"),
        licence="research",  # its page, as dataset card tanganke/dtd repeats it
    ),
    KnownSet(
        name="pets",
        group="paper",
        folders=("pets", "oxford_pets", "OxfordIIITPet"),
        archive=("oxford-iiit-pet/annotations",),
        webdataset=("pets", "vtab-pets"),
        num_classes=37,
        num_train=3_680,
        num_test=3_669,
        metric="mean_per_class",
        prompts="OxfordPets",
        benchmark="pets",
        size="0.8 GB",
        source=_torchvision("OxfordIIITPet"),
        licence="CC BY-SA 4.0",  # dataset card timm/oxford-iiit-pet
    ),
    KnownSet(
        name="caltech101",
        group="paper",
        folders=("caltech101", "caltech-101", "Caltech101"),
        archive=("caltech101/101_ObjectCategories",),
        inner=("101_ObjectCategories",),
        webdataset=("caltech101", "vtab-caltech101"),
        num_classes=102,
        num_train=3_060,
        num_test=6_084,  # of 9,144 images; the papers' 6,085 counts BACKGROUND_Google/tmp too, which is none
        metric="mean_per_class",
        prompts="Caltech101",
        benchmark="caltech101",
        aliases=_CALTECH_ALIASES,
        size="0.1 GB",
        source=_torchvision("Caltech101"),
        licence="CC BY 4.0",  # dataset card HuggingFaceM4/Caltech-101; that of flwrlabs/caltech101 says unknown
    ),
    KnownSet(
        name="flowers102",
        group="paper",
        folders=("flowers102", "flowers", "Flowers102"),
        archive=("flowers-102/setid.mat",),
        webdataset=("flowers", "vtab-flowers"),
        num_classes=102,
        num_train=2_040,
        num_test=6_149,
        metric="mean_per_class",
        prompts="Flowers102",
        benchmark="flowers",
        aliases={"pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"},
        size="0.3 GB",
        source=_torchvision("Flowers102"),
    ),
    KnownSet(
        name="stl10",
        group="paper",
        folders=("stl10", "STL10"),
        archive=("stl10_binary/test_X.bin",),
        webdataset=("stl10",),
        num_classes=10,
        num_train=5_000,
        num_test=8_000,
        prompts="STL10",
        benchmark="stl10",
        size="2.6 GB",
        source=_torchvision("STL10"),
    ),
    KnownSet(
        name="eurosat",
        group="paper",
        folders=("eurosat", "EuroSAT"),
        archive=("eurosat/2750",),
        inner=("2750",),
        webdataset=("eurosat", "vtab-eurosat"),
        num_classes=10,
        num_train=10_000,
        num_test=5_000,
        prompts="EuroSAT",
        benchmark="eurosat",
        aliases=_EUROSAT_ALIASES,
        size="0.1 GB",
        source=_torchvision("EuroSAT"),
        licence="MIT",  # LICENSE of phelber/EuroSAT
    ),
    KnownSet(
        name="imagenet",
        group="paper",
        folders=("imagenet", "imagenet1k", "ImageNet", "ILSVRC2012"),
        archive=("val/n01440764",),
        webdataset=("imagenet1k",),
        num_classes=1000,
        num_train=1_281_167,
        num_test=50_000,
        size="6.7 GB, with the training images 155 GB",
        source="image-net.org after registration; unpacked by torchvision.datasets.ImageNet",
        licence="non-commercial research and education",  # ImageNet's terms of access, 1
    ),
    KnownSet(
        name="imagenet-v2",
        group="robustness",
        folders=("imagenet-v2", "imagenetv2"),
        archive=("imagenetv2-matched-frequency-format-val/0", "ImageNetV2-matched-frequency/0"),
        webdataset=("imagenetv2",),
        num_classes=1000,
        num_test=10_000,
        size="1.3 GB",
        source="imagenetv2-matched-frequency.tar.gz of Recht et al. (2019)",
        licence="MIT",  # LICENSE of modestyachts/ImageNetV2
    ),
    KnownSet(
        name="imagenet-a",
        group="robustness",
        folders=("imagenet-a",),
        archive=("imagenet-a/n01498041",),
        inner=("n01498041",),
        webdataset=("imagenet-a",),
        num_classes=200,
        num_test=7_500,
        size="0.7 GB",
        source="imagenet-a.tar of Hendrycks et al. (2021)",
        licence="MIT",  # LICENSE of hendrycks/natural-adv-examples
    ),
    KnownSet(
        name="imagenet-r",
        group="robustness",
        folders=("imagenet-r",),
        archive=("imagenet-r/n01443537",),
        inner=("n01443537",),
        webdataset=("imagenet-r",),
        num_classes=200,
        num_test=30_000,
        size="2.2 GB",
        source="imagenet-r.tar of Hendrycks et al. (2021)",
    ),
    KnownSet(
        name="imagenet-sketch",
        group="robustness",
        folders=("imagenet-sketch", "imagenet_sketch"),
        archive=("sketch/n01440764",),
        inner=("n01440764",),
        webdataset=("imagenet_sketch",),
        num_classes=1000,
        num_test=50_889,
        size="7.8 GB",
        source="ImageNet-Sketch.zip of Wang et al. (2019)",
        licence="MIT",  # LICENSE of HaohanWang/ImageNet-Sketch
    ),
    KnownSet(
        name="objectnet",
        group="robustness",
        folders=("objectnet",),
        archive=("objectnet-1.0/mappings",),
        inner=("mappings",),
        webdataset=("objectnet",),
        num_classes=113,
        num_test=18_574,
        border=2,
        source="objectnet-1.0.zip of Barbu et al. (2019); its password is the consent to its terms",
        licence="CC BY 4.0 with two clauses: never to tune a model, images only with their border",  # timm/objectnet
    ),
    KnownSet(
        name="coco",
        group="retrieval",
        folders=("coco", "mscoco", "mscoco_captions"),
        inner=("dataset_coco.json", "coco_test_karpathy.json"),
        webdataset=("mscoco_captions",),
        num_test=5_000,
        size="6.6 GB",
        source="val2014.zip of COCO, and Karpathy's dataset_coco.json or CLIP_benchmark's coco_test_karpathy.json",
        licence="captions CC BY 4.0, photographs by Flickr's terms",  # COCO's terms of use
    ),
    KnownSet(
        name="flickr30k",
        group="retrieval",
        folders=("flickr30k", "Flickr30k"),
        inner=("dataset_flickr30k.json", "flickr30k_test_karpathy.txt"),
        webdataset=("flickr30k",),
        num_test=1_000,
        source="flickr30k-images of Young et al. (2014), and Karpathy's dataset_flickr30k.json or CLIP_benchmark's "
        "flickr30k_test_karpathy.txt",
        licence="non-commercial research and education",  # README of BryanPlummer/flickr30k_entities
    ),
)

CATALOGUE: dict[str, KnownSet] = {known.name: known for known in _SETS}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(known.name for known in CATALOGUE.values() if known.group == group)
    for group in ("paper", "robustness", "retrieval")
}
"""Names that stand for several sets."""
