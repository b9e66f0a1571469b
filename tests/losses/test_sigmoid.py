from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distilclip.losses.features import Features
from distilclip.losses.sigmoid import sigmoid, sigmoid_relational


def unit(n: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def inputs(n: int, m: int, dim: int, seed: int = 0) -> list[Tensor]:
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (9.0, -4.0)]
    return [x.requires_grad_() for x in (unit(n, dim, seed), unit(m, dim, seed + 1), *scalars)]


def naive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The paper's pseudocode."""
    logits = image @ text.T * scale + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def naive_relational(values: list[Tensor], teacher: list[Tensor]) -> Tensor:
    student, target = (torch.sigmoid(x @ y.T * s + b) for x, y, s, b in (values, teacher))
    answers = target * (target / student).log() + (1 - target) * ((1 - target) / (1 - student)).log()
    return answers.sum() / len(values[0])


def gradients(loss: Tensor, values: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, values))


@pytest.mark.parametrize("block", [None, 1, 3, 7, 100])
def test_value_and_every_gradient_equal_the_papers(block: int | None) -> None:
    values = inputs(7, 7, 5)
    image, text, scale, bias = values
    expected = naive(*values)
    found = sigmoid(image, text, scale=scale, bias=bias, block=block)
    assert torch.allclose(found, expected)
    for own, reference in zip(gradients(found, values), gradients(expected, values), strict=True):
        assert torch.allclose(own, reference)


@pytest.mark.parametrize("block", [None, 2, 5])
def test_ranks_shares_add_up(block: int | None) -> None:
    image, text, scale, bias = values = inputs(6, 6, 4)
    parts = [sigmoid(image[i : i + 3], text, scale=scale, bias=bias, offset=i, count=6, block=block) for i in (0, 3)]
    whole = sigmoid(image, text, scale=scale, bias=bias)
    assert torch.allclose(sum(parts), whole)
    for own, reference in zip(gradients(sum(parts), values), gradients(whole, values), strict=True):
        assert torch.allclose(own, reference)


def test_a_hand_made_answer() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = sigmoid(image, image, scale=2.0, bias=0.0)
    pair, other = torch.log1p(torch.exp(torch.tensor(-2.0))), torch.log(torch.tensor(2.0))
    assert torch.isclose(found, pair + other)  # each row: one pair at 2, one other at 0


@pytest.mark.parametrize("block", [None, 1, 4])
def test_the_divergence_and_its_gradients_equal_the_formula(block: int | None) -> None:
    values = inputs(6, 6, 5)
    teacher = [x.detach() for x in inputs(6, 6, 8, seed=7)]
    found = sigmoid_relational(Features(*values), Features(*teacher), block=block)
    expected = naive_relational(values, teacher)
    assert torch.allclose(found, expected)
    for own, reference in zip(gradients(found, values), gradients(expected, values), strict=True):
        assert torch.allclose(own, reference)


def test_the_divergence_is_zero_only_for_the_teachers_answers() -> None:
    x, y, scale, bias = (value.detach() for value in inputs(5, 5, 4))
    teacher = Features(x, y, scale, bias)
    assert abs(sigmoid_relational(teacher, teacher)) < 1e-12
    assert sigmoid_relational(Features(x, y, scale, bias + 1), teacher) > 1e-3


def test_half_precision_features_give_a_float32_loss_under_autocast() -> None:
    image, text = unit(8, 4, 0).half(), unit(8, 4, 1).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = [sigmoid(image, text, scale=10.0, bias=-10.0, block=block) for block in (None, 3)]
    expected = naive(image.double(), text.double(), torch.tensor(10.0), torch.tensor(-10.0))
    for value in found:
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_large_batch_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = F.softplus
    monkeypatch.setattr(F, "softplus", lambda logits: sizes.append(logits.numel()) or plain(logits))
    image, text = unit(3000, 4, 0).float(), unit(3000, 4, 1).float()
    image.requires_grad_()
    sigmoid(image, text, scale=10.0, bias=-10.0).backward()
    assert max(sizes) <= 1 << 22 < 3000**2
    assert sum(sizes) == 3000**2


@pytest.mark.usefixtures("unchecked_shapes")
def test_rows_that_are_no_pairs_are_refused() -> None:
    x = unit(2, 4, 0)
    with pytest.raises(ValueError, match="queries are 4 wide, keys 3"):
        sigmoid(x, unit(2, 3, 0), scale=1.0, bias=0.0)
    with pytest.raises(ValueError, match="offset=1 with 2 queries and 2 keys"):
        sigmoid(x, x, scale=1.0, bias=0.0, offset=1)
    one = torch.ones(())
    with pytest.raises(ValueError, match="the same rows"):
        sigmoid_relational(Features(x, x, one, one), Features(unit(3, 4, 0), x, one, one))
    with pytest.raises(ValueError, match="two models with a bias"):
        sigmoid_relational(Features(x, x, one), Features(x, x, one, one))
