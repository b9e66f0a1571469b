from __future__ import annotations

import os

import pytest
import torch

from distilclip import distributed
from distilclip.errors import InputError
from tests.ranks import run_ranks


def squares() -> dict[str, object]:
    """Everything of the module, on one rank of two."""
    with distributed.job("cpu") as device:
        own = torch.arange(4.0).view(2, 2) + 10 * distributed.rank()
        own.requires_grad_()
        rows = distributed.gather(own)
        ((distributed.rank() + 1) * rows.square()).sum().backward()

        def fail() -> None:
            raise InputError(f"rank {distributed.rank()}")

        with pytest.raises(InputError, match="rank 0"):
            distributed.on_first(fail)
        distributed.barrier()
        return {
            "device": device.type,
            "place": (distributed.rank(), distributed.world()),
            "rows": rows.detach(),
            "gradient": own.grad,
            "sum": distributed.reduce_(torch.tensor([1, distributed.rank()])),
            "max": distributed.reduce_(torch.tensor([1, distributed.rank()]), "max"),
            "first": distributed.on_first(os.getpid),
            "copied": distributed.broadcast_(torch.tensor(distributed.rank())),
            "objects": distributed.gather_objects(f"from {distributed.rank()}"),
        }


def test_two_processes_gather_reduce_and_agree() -> None:
    left, right = run_ranks(2, squares)
    assert (left["place"], right["place"]) == ((0, 2), (1, 2))
    for result in (left, right):
        assert result["device"] == "cpu"
        assert result["rows"].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
        assert result["sum"].tolist() == [2, 1]
        assert result["max"].tolist() == [1, 1]
        assert result["first"] == left["first"]
        assert int(result["copied"]) == 0
        assert result["objects"] == ["from 0", "from 1"]
    # d/dx of 1 x^2 on rank 0 plus 2 x^2 on rank 1
    assert torch.equal(left["gradient"], 6 * left["rows"][:2])
    assert torch.equal(right["gradient"], 6 * right["rows"][2:])


def test_alone_everything_is_the_identity() -> None:
    with distributed.job("cpu"):
        rows = torch.ones(2, 3)
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.gather(rows) is rows
        assert distributed.reduce_(rows) is rows
        assert distributed.broadcast_(rows) is rows
        assert distributed.gather_objects(1) == [1]
        assert distributed.on_first(lambda: 7) == 7
        distributed.barrier()


def test_devices_that_cannot_exchange_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="on CUDA or on the CPU, not on meta"), distributed.job("meta"):
        pass
