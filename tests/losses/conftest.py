from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LargestStorage(TorchDispatchMode):
    """Remembers the most bytes that any tensor made inside the block stands on, backward passes included."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return result


@pytest.fixture
def largest_storage() -> type[_LargestStorage]:
    return _LargestStorage


@pytest.fixture
def unit_rows() -> Callable[..., Tensor]:
    """A maker of random unit rows, float64 unless told otherwise; equal arguments give equal rows."""

    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(rows, dim=-1).to(dtype).requires_grad_()

    return make
