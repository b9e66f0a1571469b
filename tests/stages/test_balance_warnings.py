"""A threshold that removes nearly everything: the terminal, the result and `dc.balance` say so, and what to try."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distilclip as dc
from distilclip.stages.balance import Config, main
from tests.stages.conftest import write_store


def chain(num_rows: int, step: float) -> np.ndarray:
    """Unit rows on an arc, each `step` (an angle) from the next: only a chain joins the first and the last."""
    angle = step * np.arange(num_rows)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_the_command_says_at_once_that_nearly_all_is_removed(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    out = tmp_path / "balance"
    flags = ["--store", store, "--out", str(out), "--metric", "cosine", "--threshold", "0.7", "--device", "cpu"]
    command = [sys.executable, "-m", "distilclip", "balance", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads((out / "result.json").read_text())
    assert result["removed_ratio"] > 0.8
    assert len(result["warnings"]) == 3
    for warning in result["warnings"]:
        (line,) = [line for line in done.stderr.splitlines() if line.endswith(warning)]
        assert "balance: " in line
        assert "warning: " in line
    removed, group, chained = result["warnings"]
    stay = f"({result['num_kept']} of {result['num_valid']} stay)"
    assert f"{result['removed_ratio']:.1%} of the images are removed {stay}" in removed
    assert "0.7 was taken as cosine distance; it may have been meant as euclidean (= 0.245, removes " in removed
    assert f"One group holds {result['largest_group']} of {result['num_valid']} images" in group
    assert f"{result['chained']} of {result['num_valid'] - result['num_kept']} removed images" in chained
    assert "--rule cover, " in chained


def test_the_threshold_to_try_removes_what_is_said(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    config = {"store": store, "metric": "cosine", "device": "cpu"}
    first = main(Config(out=str(tmp_path / "first"), threshold=0.7, **config))  # type: ignore[arg-type]
    advice = first["warnings"][0].split("--threshold ")[1]
    threshold, removed = advice.split(", which removes ")
    again = main(Config(out=str(tmp_path / "again"), threshold=float(threshold), **config))  # type: ignore[arg-type]
    assert f"{again['removed_ratio']:.1%}" == removed.split(". ")[0]
    assert again["warnings"] == []


def test_a_usual_balance_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _, _ = write_store(tmp_path / "store")
    result = main(Config(store=store, out=str(tmp_path / "out"), threshold=0.3, metric="euclidean", device="cpu"))
    assert result["warnings"] == []
    assert "warning" not in capsys.readouterr().err


def test_a_radius_ends_the_warning_about_chains() -> None:
    x = np.concatenate([chain(40, 0.05), -chain(4, 0.3)])
    chained = dc.balance(x, threshold=0.06, metric="euclidean")
    assert len(chained.warnings) == 3
    assert chained.warnings[2].startswith("37 of 39 removed images (94.9%) are farther than the threshold")
    within = dc.balance(x, threshold=0.06, metric="euclidean", rule="cover")
    assert not any("farther" in warning for warning in within.warnings)


def test_a_curve_without_a_usual_share_is_said() -> None:
    x = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)  # 196 of 200 are copies at any threshold
    (removed, group) = dc.balance(x, threshold=0.1, metric="cosine").warnings
    assert "98.0% of the images are removed (4 of 200 stay)" in removed
    assert "none on the curve in result.json removes 20% to 50%" in removed
    assert "One group holds 50 of 200 images (25.0%)" in group
