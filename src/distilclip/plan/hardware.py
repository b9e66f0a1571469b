"""List the constants of a plan, each with its source: published, measured or assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An accelerator as its data sheet describes it."""

    name: str
    peak_flops: float
    """dense bfloat16, per second"""
    memory_bytes: float
    source: str


GPUS = {
    "a100": Gpu(name="A100 SXM", peak_flops=312e12, memory_bytes=80e9, source="NVIDIA A100 data sheet"),
    "h100": Gpu(name="H100 SXM", peak_flops=989e12, memory_bytes=80e9, source="NVIDIA H100 data sheet"),
    "h200": Gpu(name="H200 SXM", peak_flops=989e12, memory_bytes=141e9, source="NVIDIA H200 data sheet"),
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A number that the plan rests on."""

    value: float
    meaning: str
    source: str


CONSTANTS = {
    "embed_utilisation": Constant(
        value=0.175,
        meaning="share of the peak that a frozen teacher reaches while images are read and decoded",
        source="published: ViT-L/14 at 312 samples/s on an A100, times its 175 GFLOP a pair",
    ),
    "tile_utilisation": Constant(
        value=0.2,
        meaning="share of the peak that tiles of embeddings reach, compared and reduced at once",
        source="published: 203 TFLOP/s of a fused product and arg-min on an H200 (flash-kmeans)",
    ),
    "train_utilisation": Constant(
        value=0.35,
        meaning="share of the peak that a student's forward and backward pass reach",
        source="assumed; common for towers of this size in bfloat16",
    ),
    "head_utilisation": Constant(
        value=0.2,
        meaning="share of the peak of the cluster term, streamed over tiles of classes",
        source="assumed as for tiles",
    ),
    "decode_per_core": Constant(
        value=250.0,
        meaning="images a CPU core decodes and resizes in a second",
        source="assumed; benchmarks/data.py measures it on yours",
    ),
    "row_table_bytes": Constant(
        value=44.0,
        meaning="bytes of a row's key, place and digest in the store, compressed",
        source="measured: shards of 1,000 rows of the demo's store",
    ),
    "rounds_of_search": Constant(
        value=1.0,
        meaning="share of all pairs of tiles that the search multiplies on an accelerator (cells save none there)",
        source="the code: grouping/search_gpu.py compares all tiles on CUDA, each pair once",
    ),
}


def constant(name: str) -> float:
    """Return the value of a constant."""
    return CONSTANTS[name].value
