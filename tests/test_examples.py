"""The examples run, as their own first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples" / "python"


def test_two_ranks_of_the_ddp_example_train_as_one_process_does(tmp_path: Path) -> None:
    """Losses, first gradients and weights: the losses in a loop of the user's own, under torchrun."""
    script = str(EXAMPLES / "ddp_losses.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in (("one", [sys.executable]), ("two", torchrun)):
        argv = [*command, script, "--out", str(tmp_path / f"{name}.pt")]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["losses"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for part in ("gradients", "weights"):
        assert set(one[part]) == set(two[part])
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert all(value.abs().max() > 1e-4 for value in one["gradients"].values())
