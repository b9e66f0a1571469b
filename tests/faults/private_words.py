"""Drill: secrets of the environment and names of this machine, looked for in all that the stages write."""

from __future__ import annotations

import getpass
import importlib
import json
import os
import pwd
import socket
import time
from pathlib import Path
from typing import Any

import torch

from distilclip.models.clip import create_clip
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.faults.children import run_stage
from tests.faults.outcome import Outcome, Size

SECRET = "hunter2-do-not-tell"


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Run stages in a home with a name of its own, and search what they write."""
    torch.set_num_threads(1)
    return [look_for_private_words(folder / "home" / "zaphod", size=size)]


def look_for_private_words(home: Path, *, size: Size) -> Outcome:
    """Run stages at home with a secret in the environment; look for both in what is written."""
    started = time.monotonic()
    home.mkdir(parents=True)
    os.environ |= {
        "HOME": str(home),
        "USER": "zaphod",
        "LOGNAME": "zaphod",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HF_TOKEN": SECRET,
    }
    for name in ("embed", "balance", "train", "export"):
        importlib.import_module(f"distilclip.stages.{name}")
    members = [m for n in range(16) for m in ((f"{n:05d}.jpg", encoded(picture(n))), (f"{n:05d}.txt", b"no. %d" % n))]
    write_tar(home / "pairs" / "0.tar", members)
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(home / "teacher"))
    kinds = (
        ("open_clip", "huggingface", "timm", "onnx", "sentence-transformers")
        if size == "full"
        else ("open_clip", "timm")
    )
    train = ["train", "--data", home / "pairs", "--student", json.dumps(TINY_CLIP), "--batch-size", 8, "--num-steps", 1]
    train += ["--warmup-steps", 0, "--num-workers", 0, "--precision", "fp32", "--out", home / "student"]
    commands: list[list[Any]] = [
        ["embed", "--data", home / "pairs", "--model", home / "teacher", "--num-workers", 0, "--out", home / "store"],
        ["balance", "--store", home / "store", "--metric", "cosine", "--threshold", 0.01, "--out", home / "groups"],
        train,
        *(
            ["export", "--what", kind, "--model", home / "student", "--out", home / f"exported-{kind}"]
            for kind in kinds
        ),
    ]
    faults = []
    for argv in commands:
        ended = run_stage([str(word) for word in argv], home)
        if ended.code:
            faults.append(f"{argv[:3]} gave {ended.code}: {ended.said[-200:]}")
    num_cases = 0
    private = [SECRET, str(home), str(home.parent), "zaphod", *_machine_words()]
    for path in sorted(home.rglob("*")):
        is_exported = "exported-" in str(path) and "model" in path.relative_to(home).parts
        if not path.is_file() or "pairs" in path.parts:
            continue
        num_cases += 1
        words = private if is_exported or path.name == "env.json" else [SECRET]
        content = path.read_bytes()
        found = [word for word in words if word.encode() in content]
        faults += [f"{path.relative_to(home)} holds {', '.join(found)}"] if found else []
    return Outcome(
        promise="No file holds a secret of the environment; env.json and exported models have no path and no name of a "
        "user or machine.",
        how="stages run in a home of their own with secrets in the environment; every file that they write is searched",
        num_cases=num_cases,
        num_survived=num_cases - len(faults),
        seconds=time.monotonic() - started,
        notes="; ".join(faults),
    )


def _machine_words() -> list[str]:
    """The names of this machine and its user, where they are long enough to mean anything in a file."""
    with_names = [socket.gethostname(), getpass.getuser(), pwd.getpwuid(os.getuid()).pw_dir]
    return [word for word in with_names if len(word) > 5 and word != "localhost"]
