"""Run the whole pipeline on a made-up corpus, in minutes on two CPU cores: a teacher, four students, one page."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from distilclip import files, stage_folder
from distilclip.configs.demo import Config
from distilclip.messages import say
from distilclip.stages import run

# Column of the table: evaluation set and task. `unseen` holds pairs of shape and colour that were never trained on.
COLUMNS = {
    "shape": ("shape", "zero-shot"),
    "colour": ("colour", "zero-shot"),
    "unseen": ("shape_colour_unseen", "zero-shot"),
    "sketch": ("sketch", "zero-shot"),
    "probe": ("shape", "linear-probe"),
    "R@1": ("retrieval", "retrieval"),
}


def main(config: Config) -> dict[str, Any]:
    """Run the recipe, print one table of all models, and say where the page is."""
    overrides: tuple[str, ...] = ()
    if not has_fast_bf16():
        say("demo: training in fp32, since this CPU has no bfloat16 arithmetic and would emulate it 7 times slower")
        overrides = ("train.precision=fp32",)
    result = run.main(run.Config(recipe="demo", out=config.out, seed=config.seed, overrides=overrides))
    console = Console()
    console.print(comparison(config.out))
    console.print(f"The page: {files.join(config.out, 'report/index.html')}", highlight=False)
    return result


def has_fast_bf16() -> bool:
    """Whether training computes in bfloat16 natively: on a GPU, or by instructions that Linux lists for the CPU."""
    if any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd"))) or not os.path.exists("/proc/cpuinfo"):
        return True
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def comparison(out: str) -> Table:
    """Build a table with a row for each model: its headline scores in percent, and how fast it trained."""
    rows = stage_folder.read_json(files.join(out, "evaluate/result.json"))["rows"]
    scores = {(r["model"], r["set"], r["task"]): r["value"] for r in reversed(rows) if r["headline"]}
    title = "Zero-shot accuracy, linear probe (shape) and retrieval in percent; training speed"
    table = Table("model", *COLUMNS, "samples/s", title=title)
    for model in dict.fromkeys(r["model"] for r in rows):
        values = [scores.get((model, name, task)) for name, task in COLUMNS.values()]
        metrics = list(stage_folder.read_metrics(files.join(out, f"train/{model}/metrics.jsonl")))
        speed = sorted(line["samples_per_second"] for line in metrics)[len(metrics) // 2]
        table.add_row(model, *("-" if v is None else f"{100 * v:.1f}" for v in values), f"{speed:.0f}")
    return table
