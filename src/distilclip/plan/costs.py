"""Compute the cost of every stage from sizes and constants: GPU time, GPU memory, disk, and what is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilclip.plan.architecture_costs import Cost
from distilclip.plan.hardware import Gpu, constant

BYTES_PER_EDGE = 20  # of a forest, before compression
GROUP_BYTES = 25  # of a row of the groups, before compression
PROJECTED_BYTES = 120  # of a row that balance has sorted: its projection, from which it chooses what a part reads
SORTED_BYTES = PROJECTED_BYTES + 16  # of such a row beside its embedding
FORWARD_AND_BACKWARD = 3  # forward passes that cost as much arithmetic; the backward pass costs two
ADAM_BYTES = 16  # of a parameter in training: weight, gradient, two moments in float32
CLUSTER_PRODUCTS = 6  # n x k x d products of the cluster term: student's and teacher's logits, twice, and two gradients


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pairs to read."""

    num_pairs: int
    bytes_per_pair: int
    removed_ratio: float

    @property
    def num_kept(self) -> float:
        """Pairs that balance leaves."""
        return self.num_pairs * (1 - self.removed_ratio)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """GPUs of one kind. `price` is that of one GPU's hour; None leaves the cost out."""

    gpu: Gpu
    num_gpus: int
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One line of a plan. `because` explains the seconds.

    `gpu_bytes` is the memory of each GPU that does not depend on the batch; activations need more.
    """

    stage: str
    gpu_seconds: float
    gpu_bytes: float
    disk_bytes: float
    read_bytes: float
    decoded: float
    because: str

    def seconds(self, machines: Machines) -> float:
        """Return the time on all GPUs together."""
        return self.gpu_seconds / machines.num_gpus

    def price(self, machines: Machines) -> float | None:
        """Return the cost, in the currency of an hour's price."""
        return None if machines.price is None else self.gpu_seconds / 3600 * machines.price

    def fits(self, machines: Machines) -> bool:
        """Return whether one GPU's memory is enough."""
        return self.gpu_bytes <= machines.gpu.memory_bytes


def embed(data: Data, gpu: Gpu, teacher: Cost) -> StageCost:
    """Cost the teacher's forward pass over every pair; disk holds two embeddings in half precision and a row."""
    rate = gpu.peak_flops * constant("embed_utilisation") / teacher.flops
    return StageCost(
        stage="embed",
        gpu_seconds=data.num_pairs / rate,
        gpu_bytes=2.0 * teacher.num_parameters,
        disk_bytes=data.num_pairs * (2 * 2 * teacher.dim + constant("row_table_bytes")),
        read_bytes=float(data.num_pairs * data.bytes_per_pair),
        decoded=float(data.num_pairs),
        because=f"{teacher.flops / 1e9:,.0f} GFLOP a pair, {rate:,.0f} pairs/s a GPU",
    )


def balance(data: Data, gpu: Gpu, *, dim: int, block_rows: int) -> StageCost:
    """Cost the comparison of every two rows, once, in tiles: the most that it can be, at a wide threshold.

    Rows are sorted once. A part then reads `block_rows` of them with as many later ones that may be near, again and
    again until there are no more; at a narrow threshold few may be.
    """
    products = data.num_pairs**2 / 2 * constant("rounds_of_search")
    rate = gpu.peak_flops * constant("tile_utilisation")
    num_parts = data.num_pairs / block_rows
    return StageCost(
        stage="balance",
        gpu_seconds=products * 2 * dim / rate,
        gpu_bytes=2.0 * block_rows * dim * 2,
        disk_bytes=float(data.num_pairs * (2 * dim + SORTED_BYTES + BYTES_PER_EDGE + GROUP_BYTES)),
        read_bytes=data.num_pairs * ((1 + num_parts) * dim * 2 + PROJECTED_BYTES),
        decoded=0.0,
        because=f"at most {products:.2g} pairs of {dim} dimensions at {rate / 1e12:,.0f} TFLOP/s a GPU, "
        f"in {num_parts:,.0f} parts",
    )


def cluster(
    data: Data, gpu: Gpu, *, dim: int, num_centers: int, num_iterations: int, points_per_center: int | None
) -> StageCost:
    """Cost the assignment of the fitted points in every round, and of every kept row at the end."""
    fitted = data.num_kept if points_per_center is None else min(data.num_kept, points_per_center * num_centers)
    products = (num_iterations * fitted + data.num_kept) * num_centers
    rate = gpu.peak_flops * constant("tile_utilisation")
    return StageCost(
        stage="cluster",
        gpu_seconds=products * 2 * dim / rate,
        gpu_bytes=float(num_centers * dim * (2 + 4 + 8)),
        disk_bytes=num_centers * dim * 4 + data.num_kept * 12,
        read_bytes=(num_iterations * fitted + data.num_kept) * dim * 2,
        decoded=0.0,
        because=f"{num_iterations} rounds over {fitted:.3g} rows and one over all, {num_centers:,} centers",
    )


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """Bytes that one rank's part of the class head needs while training, on its device and on its host."""

    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class HeadSize:
    """A class head: its centers, the share of them that a step uses, and where AdamW's moments are kept."""

    num_centers: int
    dim: int
    sample_rate: float = 1.0
    state: Literal["device", "host"] = "device"

    def memory(self, *, world: int = 1) -> HeadMemory:
        """Return the memory of each of `world` ranks: float32 centers, a step's rows and gradient, AdamW's state.

        The classes of a batch may be more than `sample_rate` allows for. The cluster loss needs O(n dim + 256 k) more
        (losses.cluster).
        """
        rows = -(-self.num_centers // world)
        sampled = round(self.sample_rate * rows)
        moments = rows * (2 * 4 * self.dim + 8)
        # Of a step: the gradient, and a copy of the rows unless it uses all of them.
        of_a_step = sampled if self.sample_rate == 1 else 2 * sampled
        values = 4 * self.dim * (rows + of_a_step)
        on_host = self.state == "host"
        return HeadMemory(device=values + (0 if on_host else moments), host=moments if on_host else 0)


def train(
    data: Data, machines: Machines, student: Cost, head: HeadSize, *, epochs: float, global_batch: int
) -> StageCost:
    """Cost the student's forward and backward pass, and the cluster term over a share of the classes."""
    samples = epochs * data.num_kept
    towers = FORWARD_AND_BACKWARD * student.flops
    products = CLUSTER_PRODUCTS * 2 * head.dim * head.num_centers * head.sample_rate
    gpu = machines.gpu
    seconds = towers / (gpu.peak_flops * constant("train_utilisation"))
    head_seconds = products / (gpu.peak_flops * constant("head_utilisation"))
    memory = head.memory(world=machines.num_gpus)
    return StageCost(
        stage="train",
        gpu_seconds=samples * (seconds + head_seconds),
        gpu_bytes=float(
            ADAM_BYTES * student.num_parameters + memory.device + global_batch * (student.dim + head.dim) * 2 * 4
        ),
        disk_bytes=12.0 * (student.num_parameters + head.num_centers * head.dim),
        read_bytes=samples * (data.bytes_per_pair + 4 * head.dim),
        decoded=samples,
        because=f"{samples:.3g} samples of {towers / 1e9:,.0f} GFLOP, the cluster term {products / 1e9:,.0f} GFLOP "
        f"more; class head {memory.device / 1e9:,.1f} GB of each GPU, {memory.host / 1e9:,.1f} GB of its host",
    )
