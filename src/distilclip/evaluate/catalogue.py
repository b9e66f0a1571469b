"""Every published set that can be named: the papers' 14, five of robustness, two of retrieval. Facts only.

Sizes and licences are as in `paper_sets`; the size of ImageNet-Sketch is from its own page. Licences of repositories
are what their authors say of the data there; the images were collected from the web.
"""

from __future__ import annotations

import dataclasses

from distilclip.evaluate.known_set import KnownSet
from distilclip.evaluate.paper_sets import PAPER_SETS

_OTHER_SETS = (
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

_BY_NAME = {known.name: known for known in (*PAPER_SETS, *_OTHER_SETS)}
_OBJECTNET_BY_IMAGENET = dataclasses.replace(
    _BY_NAME["objectnet"],
    name="objectnet-by-imagenet",
    group="variant",
    rule="each class by the nearest of ImageNet's names for it",
    webdataset=(),
)  # a webdataset lacks the archive's map to ImageNet's classes

CATALOGUE: dict[str, KnownSet] = {**_BY_NAME, _OBJECTNET_BY_IMAGENET.name: _OBJECTNET_BY_IMAGENET}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(known.name for known in CATALOGUE.values() if known.group == group)
    for group in ("paper", "robustness", "retrieval")
}
"""Names that stand for several sets."""
