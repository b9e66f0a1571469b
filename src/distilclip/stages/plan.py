"""Estimate the time, memory, disk and cost of every stage on a cluster, before anything runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distilclip import files, stage_folder
from distilclip.configs.plan import Config
from distilclip.data.side_files import kept_rows
from distilclip.data.store import Store
from distilclip.plan import costs
from distilclip.plan.flops import cost_of
from distilclip.plan.hardware import CONSTANTS, GPUS, constant
from distilclip.progress import duration


def main(config: Config) -> dict[str, Any]:
    """Print the plan and return what `--out` holds."""
    machines = costs.Machines(gpu=GPUS[config.gpu], num_gpus=config.num_gpus, price=config.price_per_gpu_hour)
    data = costs.Data(
        num_pairs=config.num_pairs, bytes_per_pair=config.bytes_per_pair, removed_ratio=config.removed_ratio
    )
    if config.groups is not None:
        data = _count_pairs(config.groups)
    teacher, student = cost_of(config.teacher), cost_of(config.student)
    head = costs.HeadSize(
        num_centers=config.num_centers,
        dim=teacher.dim,
        sample_rate=config.sample_rate,
        state=config.centers_state,
    )
    stages = [
        costs.embed(data, machines.gpu, teacher),
        costs.balance(data, machines.gpu, dim=teacher.dim, block_rows=config.block_rows),
        costs.cluster(
            data,
            machines.gpu,
            dim=teacher.dim,
            num_centers=config.num_centers,
            num_iterations=config.num_iterations,
            points_per_center=config.points_per_center,
        ),
        costs.train(data, machines, student, head, epochs=config.epochs, global_batch=config.global_batch),
    ]
    result = {
        "gpu": machines.gpu.name,
        "num_gpus": config.num_gpus,
        "num_pairs": data.num_pairs,
        "num_kept": round(data.num_kept),
        "stages": [asdict(stage) | {"seconds": stage.seconds(machines)} for stage in stages],
        "constants": {name: asdict(value) for name, value in CONSTANTS.items()},
    }
    print(_page(config, data, machines, stages))
    if config.out is not None:
        stage_folder.write_json(config.out, result)
    return result


def _count_pairs(groups: str) -> costs.Data:
    """Count the pairs of the store that a folder of `balance` or `select` was made from, and those that it keeps."""
    stage_folder.require(groups, stage="balance")
    path = stage_folder.read_json(files.join(groups, "config.json"))["store"]
    stage_folder.require(groups, stage="balance", store=path)
    store, num_kept = Store.open(path), 0
    for shard in range(store.num_shards):
        valid = store.columns(shard, "valid")["valid"].to_numpy()
        num_kept += int(kept_rows(store, shard, valid, groups).sum())
    num_bytes = sum(shard.num_bytes for shard in store.shards)
    return costs.Data(
        num_pairs=store.num_rows,
        bytes_per_pair=max(1, round(num_bytes / max(store.num_rows, 1))),
        removed_ratio=1 - num_kept / max(store.num_rows, 1),
    )


def _page(config: Config, data: costs.Data, machines: costs.Machines, stages: list[costs.StageCost]) -> str:
    header = ["stage", "GPU-hours", "time", "GPU memory, without activations", "disk", "read", "decoding"]
    rows = [header + (["cost"] if machines.price is not None else [])]
    for stage in stages:
        seconds = stage.seconds(machines)
        cores = stage.decoded / seconds / constant("decode_per_core")
        price = stage.price(machines)
        rows.append(
            [
                stage.stage,
                f"{stage.gpu_seconds / 3600:,.0f}",
                duration(seconds),
                f"{stage.gpu_bytes / 1e9:,.1f} GB" + ("" if stage.fits(machines) else " (too much)"),
                f"{stage.disk_bytes / 1e9:,.0f} GB",
                f"{stage.read_bytes / seconds / 1e9:,.2f} GB/s",
                f"{cores:,.0f} cores" if stage.decoded else "-",
            ]
            + ([] if price is None else [f"{price:,.0f}"])
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{data.num_pairs:,} pairs, {data.num_kept:,.0f} of them kept, "
        f"teacher {config.teacher}, student {config.student}, "
        f"{config.num_gpus} x {machines.gpu.name}",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
        *(f"{stage.stage}: {stage.because}" for stage in stages),
        "",
        f"{machines.gpu.peak_flops / 1e12:,.0f} TFLOP/s, {machines.gpu.memory_bytes / 1e9:,.0f} GB: "
        f"{machines.gpu.source}",
        *(f"{value.value:g}: {value.meaning} ({value.source})" for value in CONSTANTS.values()),
    ]
    return "\n".join(lines)
