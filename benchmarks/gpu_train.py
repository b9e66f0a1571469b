"""Training steps on a GPU: samples/s and model FLOP utilisation of ViT-B/32 with each method at batch 4,096, bfloat16.

Pictures, captions and the stored teacher's embeddings are random and lie on the device. Utilisation is the arithmetic
that the model asks for (three forward passes) over what the machine's own bfloat16 matrix product does in that time;
`executed` counts the forward passes, too, that accumulation or --activations recompute take a second time. A batch of
4,096 does not fit 80 GB at once: by default it is accumulated in micro-batches of 1,024. Prints, last, one line of
JSON. With --quick a toy size, on the CPU too; without, it skips itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args, get_type_hints

import torch
from _device import name_of, peak_mb, product_rate, reset_peak, seconds_of
from _steps import Machine, Sizes, our_step

from distilclip.plan.flops import cost_of
from distilclip.train.objective import Objective, objective
from distilclip.train.settings import Execution

FULL = Sizes(student="ViT-B-32", teacher="ViT-L-14", teacher_dim=768, batch=4096)
QUICK = Sizes(student="ViT-S-32-alt", teacher="ViT-B-32", teacher_dim=512, batch=8)
PRODUCT_SIDES = (4096, 8192, 16_384)  # of square products; the fastest counts

Methods = dict[str, tuple[Objective, int]]  # with the number of classes


def methods(*, quick: bool) -> Methods:
    """The plain step first: the others are compared with it."""
    some, many = (100, 1000) if quick else (10_000, 1_000_000)
    return {
        "clip": (objective("clip"), some),
        "clip-kd": (objective("clip-kd"), some),
        f"clip-cid, {some:,} classes": (objective("clip-cid"), some),
        f"clip-cid, {many:,} classes, sample_rate 0.1": (objective("clip-cid", {"sample_rate": 0.1}), many),
    }


def main() -> None:
    options = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        print("gpu_train: no GPU here, nothing measured")
        return
    sizes = QUICK if options.quick else FULL
    machine = Machine(
        device=device.type,
        precision=torch.bfloat16,
        micro_batch=options.micro_batch or (4 if options.quick else 1024),
        execution=Execution(compile=options.compile, activations=options.activations),
    )
    sides = (512,) if options.quick else PRODUCT_SIDES
    peak = max(product_rate(side, side, side, device=device, dtype=machine.precision) for side in sides)
    print(f"{name_of(device)}: bfloat16 products at {peak / 1e12:,.1f} TFLOP/s")
    cases: list[dict[str, Any]] = []
    for name, (method, num_classes) in methods(quick=options.quick).items():
        measured = measure(method, sizes, machine, num_classes=num_classes, peak=peak)
        against_plain = measured["seconds"] / cases[0]["seconds"] if cases else 1.0
        cases.append({"case": f"{sizes.student}, batch {sizes.batch:,}: {name}", **measured, "to_plain": against_plain})
        print(cases[-1], flush=True)
    settings = {"micro_batch": machine.micro_batch, "compile": options.compile, "activations": options.activations}
    machine_name = {"gpu": name_of(device), "torch": torch.__version__, "product_tflops": peak / 1e12}
    print(json.dumps({"name": "gpu_train", "cases": cases, "settings": settings, "machine": machine_name}))


def measure(method: Objective, sizes: Sizes, machine: Machine, *, num_classes: int, peak: float) -> dict[str, Any]:
    """Speed, shares of the matrix product's speed, and peak memory of one method's step."""
    device = torch.device(machine.device)
    step = our_step(method, sizes, machine, num_classes=num_classes)
    reset_peak(device)
    seconds = seconds_of(step, device, repeats=5)
    forward = cost_of(sizes.student).flops * sizes.batch
    passes = 3 + ((machine.micro_batch or sizes.batch) < sizes.batch) + (machine.execution.activations == "recompute")
    return {
        "seconds": seconds,
        "samples_per_second": sizes.batch / seconds,
        "utilisation": 3 * forward / seconds / peak,
        "executed": passes * forward / seconds / peak,
        "peak_mb": peak_mb(device),
    }


def parsed() -> argparse.Namespace:
    kinds = get_type_hints(Execution)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, on the CPU too")
    parser.add_argument("--micro-batch", type=int, help="pairs whose activations are held at once")
    parser.add_argument("--compile", choices=get_args(kinds["compile"]), default="no")
    parser.add_argument("--activations", choices=get_args(kinds["activations"]), default="keep")
    return parser.parse_args()


if __name__ == "__main__":
    main()
