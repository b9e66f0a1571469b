from __future__ import annotations

import math

import pytest
import torch

from distilclip.losses._tiling import add_exponentials_, blocks


def test_three_tiles_of_a_softmax_as_the_module_shows_them() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0, 4.0]], dtype=torch.float64)
    maximum, total = torch.full((1,), -torch.inf, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    seen = []
    for columns in blocks(6, 2):
        tile = logits[:, columns]
        add_exponentials_(tile, 1, maximum, total, torch.empty_like(tile))
        seen.append((maximum.item(), round(total.item(), 4)))
    assert seen == [(3.0, 1.1353), (3.0, 1.553), (5.0, 1.5781)]
    assert maximum.item() + math.log(total.item()) == pytest.approx(torch.logsumexp(logits, 1).item(), rel=1e-12)
