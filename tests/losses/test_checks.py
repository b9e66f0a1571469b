"""What no loss can have is refused, and named; it would give a number, and a wrong one."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distilclip.errors import InputError
from distilclip.losses.cluster import cluster
from distilclip.losses.contrastive import contrastive, info_nce, instance
from distilclip.losses.distillation import draw_masks, hide_patches, interactive, relational
from distilclip.losses.features import Features
from distilclip.losses.sigmoid import sigmoid


@pytest.mark.parametrize("scale", [-1.0, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_scale_that_is_not_positive_is_refused(
    scale: float, kind: Callable[[float], float | Tensor], unit_rows: Callable[..., Tensor]
) -> None:
    x, y = unit_rows(6, 4), unit_rows(6, 4, seed=1)
    value = kind(scale)
    both = Features(x.float(), y.float(), torch.tensor(10.0))
    for compute in (
        lambda: contrastive(x, y, scale=value),
        lambda: info_nce(x, y, scale=value),
        lambda: sigmoid(x, y, scale=value, bias=0.0),
        lambda: instance(both, both, scale=value),
        lambda: interactive(both, both, scale=value),
    ):
        with pytest.raises(InputError, match=r"scale is .*positive and finite"):
            compute()
    if isinstance(value, Tensor):
        with pytest.raises(InputError, match="teacher_scale is"):
            relational(both, Features(both.image, both.text, value))


def test_a_learned_scale_is_not_looked_at(unit_rows: Callable[..., Tensor]) -> None:
    """Training itself stops at a loss that is not finite, and says where it came from."""
    scale = torch.tensor(math.nan, requires_grad=True)
    assert contrastive(unit_rows(6, 4), unit_rows(6, 4, seed=1), scale=scale).isnan()


@pytest.mark.parametrize("share", [-0.1, 2.0, 5.0, math.nan])
def test_shares_lie_between_0_and_1(share: float, unit_rows: Callable[..., Tensor]) -> None:
    x, centers, labels = unit_rows(6, 4), unit_rows(3, 4, seed=1), torch.arange(6) % 3
    both = Features(x.float(), x.float(), torch.tensor(10.0))
    with pytest.raises(InputError, match=r"alpha is .*a share, from 0 to 1"):
        cluster(x, x, centers, labels, alpha=share)
    with pytest.raises(InputError, match=r"gamma is .*a share, from 0 to 1"):
        instance(both, both, scale=10.0, gamma=share)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 1, 1, 2], r"classes\[2\] is 1 after 1: classes are ascending and each is named once"),
        ([0, 2, 1], r"classes\[2\] is 1 after 2"),
        ([-1, 0, 1, 2], r"classes are from -1 to 2; there are the centers 0 to 2"),
        ([0, 1, 2, 3], r"classes are from 0 to 3; there are the centers 0 to 2"),
        ([], "classes are empty"),
    ],
)
def test_classes_are_centers_each_named_once(
    classes: list[int], message: str, unit_rows: Callable[..., Tensor]
) -> None:
    """A class named twice counted twice in the softmax, and the loss was wrong without a word."""
    x, centers, labels = unit_rows(6, 4), unit_rows(3, 4, seed=1), torch.arange(6) % 3
    with pytest.raises(InputError, match=message):
        cluster(x, x, centers, labels, classes=torch.tensor(classes, dtype=torch.long))
    whole = cluster(x, x, centers, labels)
    assert torch.allclose(cluster(x, x, centers, labels, classes=torch.arange(3)).total, whole.total)


@pytest.mark.parametrize("patch", [5, 12, 16, 32, 100])
def test_a_patch_that_does_not_divide_the_picture_hides_its_share(patch: int) -> None:
    pixels = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    masks = draw_masks(3, (32, 40), patch=patch, ratio=0.75)
    hidden = (hide_patches(pixels, masks, patch=patch) != pixels).any(dim=1)
    squares = masks.shape[1] * masks.shape[2]
    assert masks.sum(dim=(1, 2)).tolist() == [round(0.75 * squares)] * 3
    for picture in range(3):
        for y in range(0, 32, patch):
            for x in range(0, 40, patch):
                square = hidden[picture, y : y + patch, x : x + patch]
                assert square.all() == square.any() == masks[picture, y // patch, x // patch]


def test_masks_of_another_grid_are_refused() -> None:
    """Squares of 8 pixels drawn and squares of 16 hidden gave other squares than were drawn."""
    pixels = torch.rand(2, 3, 32, 32)
    fine = draw_masks(2, (32, 32), patch=8)
    with pytest.raises(InputError, match=r"masks are \(2, 4, 4\); 2 pictures of 32 x 32 pixels in squares of 16 need"):
        hide_patches(pixels, fine, patch=16)
    with pytest.raises(InputError, match="patch is 0"):
        draw_masks(2, (32, 32), patch=0)


def test_words_for_numbers_are_named() -> None:
    """In a process of its own: here, the types themselves are checked before the function is called."""
    code = """
import torch, distilclip as dc
x, both = torch.eye(4), dc.Features(torch.eye(4), torch.eye(4), torch.tensor(1.0))
for compute in (
    lambda: dc.losses.contrastive(x, x, scale="10"),
    lambda: dc.losses.sigmoid(x, x, scale=None, bias=0.0),
    lambda: dc.losses.instance(both, both, scale=1.0, gamma="half"),
    lambda: dc.losses.cluster(x, x, x, torch.arange(4), alpha=None),
):
    try:
        compute()
    except dc.InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = ["scale is '10'", "scale is None", "gamma is 'half'", "alpha is None"]
    for part, message in zip(expected, done.stdout.splitlines(), strict=True):
        assert part in message
