"""docs/formats.md says of a training folder what `train` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from distilclip.methods import TERMS
from distilclip.stages import train
from tests.data.test_formats import documented
from tests.stages.made_training import config, prepare


def names(heading: str, first_column: str) -> set[str]:
    """Every name in the first column of a table."""
    return {name for cells in documented(heading, first_column) for name in re.findall("`([^`]+)`", cells[0])}


def test_a_training_folder_holds_what_is_documented(
    pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    prepared = prepare(pair_tars, tiny_clip_folder, tmp_path)
    out = tmp_path / "out"
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid", "average_decay": 0.5}
    common |= {"held_out": (prepared.store,), "validate_every": 2, "keep_best": "held-out/loss"}
    result = train.main(config(out, tiny_clip_json, terms={"augmented": 1.0}, init=(), **common))
    folder = out / result["checkpoint"]
    files = {re.sub(r"\d{9}-\d{9}", "000000000-000500000", str(p.relative_to(folder))) for p in folder.rglob("*.*")}
    assert files == names("### A checkpoint", "file")
    (centers,) = (folder / "centers").iterdir()
    with safe_open(str(centers), "np") as file:
        tensors = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert set(file.metadata()) == {"first", "stop", "num_classes"}
    table = documented("A file of `centers/`", "tensor")
    assert tensors == {name.strip("`"): dtype.split()[0] for name, dtype, _ in table}
    with safe_open(str(folder / "heads.safetensors"), "np") as file:
        (described,) = (cells[1] for cells in documented("### A checkpoint", "file") if "heads" in cells[0])
        assert set(file.keys()) <= set(re.findall("`([^`]+)`", described))
        assert len(file.keys()) == 8
    state = json.loads((folder / "state.json").read_text())
    assert set(state) == names("`state.json`:", "field") - {"gradient_scale"}  # of fp16, which needs a GPU
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    documented_fields = names("### metrics.jsonl", "field") - {"gradient_norm_TERM", "gradient_scale"}
    in_line = {name for name in line if not name.startswith(("gradient_norm_", "validate/"))} - set(TERMS)
    validated = {name for name in documented_fields if name.startswith("validate/")}
    assert in_line == documented_fields - validated
    assert validated == {"validate/SET/METRIC", "validate/held-out/loss", "validate/held-out/TERM"}
    assert {"validate/held-out/loss", "validate/held-out/cluster", "validate/held-out/cosine_image"} <= set(line)
    assert result["best"]["checkpoint"].startswith("checkpoints/step-")
    assert {name for name in line if name.startswith("gradient_norm_")} == {
        f"gradient_norm_{name}" for name in set(line) & set(TERMS)
    }
