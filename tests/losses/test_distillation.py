import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distilclip.losses.contrastive import contrastive, info_nce
from distilclip.losses.distillation import (
    augmented,
    draw_masks,
    feature,
    gradient,
    hide_patches,
    interactive,
    queued,
    relational,
    row_divergence,
)
from distilclip.losses.features import Features

Make = Callable[..., Tensor]
LOG3 = math.log(3)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def student(unit_rows: Make) -> Features:
    return Features(unit_rows(9, 6), unit_rows(9, 6, seed=1), scalar(11.0))


@pytest.fixture
def teacher(unit_rows: Make) -> Features:
    return Features(unit_rows(9, 6, seed=2).detach(), unit_rows(9, 6, seed=3).detach(), scalar(20.0).detach())


@pytest.fixture
def matched() -> Features:
    """Two orthogonal pairs, each text equal to its image."""
    rows = torch.eye(2, dtype=torch.float64)
    return Features(rows, rows, torch.tensor(LOG3, dtype=torch.float64))


@pytest.fixture
def swapped() -> Features:
    """The same with the two texts exchanged."""
    rows = torch.eye(2, dtype=torch.float64)
    return Features(rows, rows.flip(0), torch.tensor(LOG3, dtype=torch.float64))


def naive_relational(student: Features, teacher: Features) -> Tensor:
    similarities = [features.scale * features.image @ features.text.T for features in (student, teacher)]
    losses = []
    for s, t in (similarities, [matrix.T for matrix in similarities]):
        for i in range(len(s)):
            p, q = torch.softmax(s[i], 0), torch.softmax(t[i], 0)
            losses.append((q * (q.log() - p.log())).sum())
    return torch.stack(losses).sum() / (2 * len(student))


def naive_gradient(student: Features, teacher: Features) -> Tensor:
    """By differentiating the two directions of the loss, with respect to both embeddings each."""

    def gradients(features: Features) -> list[Tensor]:
        image, text = features.image.detach().requires_grad_(), features.text.detach().requires_grad_()
        found: list[Tensor] = []
        for x, y in ((image, text), (text, image)):
            found.extend(torch.autograd.grad(info_nce(x, y, scale=features.scale.detach()), [x, y]))
        return found

    pairs = zip(gradients(student), gradients(teacher), strict=True)
    return torch.stack([((s - t) ** 2).mean() for s, t in pairs]).sum()


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [None, 1, 4, 100])
def test_relational_equals_the_formula(student: Features, teacher: Features, block: int | None) -> None:
    inputs = [student.image, student.text, student.scale]
    assert_same_gradients(relational(student, teacher, block=block), naive_relational(student, teacher), inputs)


def test_feature_equals_the_formula(student: Features, teacher: Features) -> None:
    differences = [(student.image - teacher.image).flatten(), (student.text - teacher.text).flatten()]
    expected = torch.stack([difference @ difference / (9 * 6) for difference in differences]).sum()
    assert_same_gradients(feature(student, teacher), expected, [student.image, student.text])


def test_gradient_equals_what_autograd_finds(student: Features, teacher: Features) -> None:
    torch.testing.assert_close(gradient(student, teacher), naive_gradient(student, teacher), rtol=1e-11, atol=0)


def test_interactive_equals_the_formula(student: Features, teacher: Features) -> None:
    scale = scalar(7.0)
    expected = torch.stack(
        [
            -torch.log_softmax(scale * own[i] @ other.T, 0)[i] / (2 * 9)
            for own, other in ((student.image, teacher.text), (student.text, teacher.image))
            for i in range(9)
        ]
    ).sum()
    assert_same_gradients(interactive(student, teacher, scale=scale), expected, [student.image, student.text, scale])


def test_augmented_equals_the_contrast_of_the_fused_features(student: Features) -> None:
    loss = augmented(student.image, student.text, scale=7.0)
    torch.testing.assert_close(loss, contrastive(student.image, student.text, scale=7.0))


def test_terms_by_hand(matched: Features, swapped: Features) -> None:
    # Softmax rows are (3/4, 1/4) for the matched pairs and (1/4, 3/4) for the swapped ones.
    assert relational(matched, swapped).item() == pytest.approx(LOG3 / 2)
    # Images agree; every text differs by (1, -1).
    assert feature(matched, swapped).item() == pytest.approx(1.0)
    # P - I is 1/4 and 3/4 of (-1, 1; 1, -1); entries of g differ by s/2 (images) and s/4 (texts), each twice.
    image_first = LOG3**2 * (1 / 4 + 1 / 16)
    assert gradient(matched, swapped).item() == pytest.approx(2 * image_first)
    # The swapped student's images meet the matched texts rightly (log 4/3), its texts the images wrongly (log 4).
    assert interactive(swapped, matched, scale=LOG3).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert augmented(matched.image, matched.text, scale=LOG3).item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("term", [relational, feature, gradient])
def test_imitation_terms_are_zero_at_equality_and_positive_elsewhere(
    term: Callable[..., Tensor], student: Features, teacher: Features
) -> None:
    assert term(student, student).item() == pytest.approx(0, abs=1e-14)
    assert term(student, teacher).item() > 0


@pytest.mark.parametrize("term", [relational, feature, gradient])
def test_order_of_pairs_does_not_matter(term: Callable[..., Tensor], student: Features, teacher: Features) -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = [Features(f.image[order], f.text[order], f.scale) for f in (student, teacher)]
    torch.testing.assert_close(term(*shuffled), term(student, teacher))


@pytest.mark.parametrize("block", [None, 2])
def test_gradients_pass_gradcheck(unit_rows: Make, teacher: Features, block: int | None) -> None:
    small = Features(teacher.image[:4], teacher.text[:4], teacher.scale)
    terms = {
        "relational": lambda features: relational(features, small, block=block),
        "gradient": lambda features: 1e3 * gradient(features, small),
        "interactive": lambda features: interactive(features, small, scale=features.scale),
    }
    inputs = unit_rows(4, 6), unit_rows(4, 6, seed=1), scalar(3.0)
    for term in terms.values():
        assert torch.autograd.gradcheck(lambda x, y, s, term=term: term(Features(x, y, s)), inputs)


def test_shares_of_the_rows_add_up_to_the_relational_term(student: Features, teacher: Features) -> None:
    scales = {"scale": student.scale, "teacher_scale": teacher.scale}
    shares = torch.stack(
        [
            row_divergence(q[a:b], keys, tq[a:b], teacher_keys, **scales, count=9, block=2) / 2
            for a, b in ((0, 4), (4, 9))
            for q, keys, tq, teacher_keys in (
                (student.image, student.text, teacher.image, teacher.text),
                (student.text, student.image, teacher.text, teacher.image),
            )
        ]
    ).sum()
    assert_same_gradients(shares, relational(student, teacher), [student.image, student.text, student.scale])


def test_relational_compares_models_of_different_width(student: Features, unit_rows: Make) -> None:
    wide = Features(unit_rows(9, 20, seed=5), unit_rows(9, 20, seed=6), scalar(20.0))
    torch.testing.assert_close(relational(student, wide), naive_relational(student, wide))


def test_no_gradient_reaches_the_teacher(student: Features, unit_rows: Make) -> None:
    teacher = Features(unit_rows(9, 6, seed=2), unit_rows(9, 6, seed=3), scalar(20.0))
    terms = relational(student, teacher) + feature(student, teacher) + gradient(student, teacher)
    (terms + interactive(student, teacher, scale=5.0)).backward()
    assert teacher.image.grad is teacher.text.grad is teacher.scale.grad is None
    assert student.image.grad is not None


@pytest.mark.parametrize("block", [None, 3])
def test_half_precision_at_scale_100_is_finite(unit_rows: Make, block: int | None) -> None:
    x = unit_rows(9, 32, dtype=torch.bfloat16)
    hundred = torch.tensor(100.0)
    student, teacher = Features(x, -x, hundred), Features(x.detach().half(), x.detach().half(), hundred)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = relational(student, teacher, block=block) + feature(student, teacher) + gradient(student, teacher)
        loss = loss + interactive(student, teacher, scale=hundred)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_large_batch_never_holds_all_similarities(unit_rows: Make, largest_storage: type) -> None:
    n = 2300
    rows = [unit_rows(n, 4, seed=seed, dtype=torch.float32) for seed in range(4)]
    student, teacher = (Features(rows[i], rows[i + 1], torch.tensor(9.0)) for i in (0, 2))
    with largest_storage() as largest:
        relational(student, teacher).backward()
    assert largest.num_bytes < 4 * n * n * 0.9
    with largest_storage() as largest:
        relational(student, teacher, block=8).backward()
    assert largest.num_bytes <= 4 * 8 * n


@pytest.mark.parametrize(
    ("term", "rate"),
    [
        (relational, 0.1),
        (feature, 0.1),
        (gradient, 0.1),
        (lambda student, teacher: interactive(student, teacher, scale=10.0), 0.1),
    ],
)
def test_gradient_steps_reduce_the_term(
    term: Callable[..., Tensor], rate: float, student: Features, teacher: Features
) -> None:
    optimizer = torch.optim.Adam([student.image, student.text], lr=rate)
    first = term(student, teacher).item()
    for _ in range(60):
        optimizer.zero_grad()
        unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (student.image, student.text)]
        loss = term(Features(unit[0], unit[1], student.scale), teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def mask_patches(pixels: Tensor, *, ratio: float = 0.75, patch: int = 16, seed: int = 0) -> Tensor:
    """Pixels with drawn squares hidden."""
    generator = torch.Generator().manual_seed(seed)
    size = pixels.shape[2], pixels.shape[3]
    return hide_patches(
        pixels, draw_masks(len(pixels), size, ratio=ratio, patch=patch, generator=generator), patch=patch
    )


def test_mask_covers_the_stated_share_of_every_image_with_its_mean() -> None:
    pixels = torch.rand(3, 2, 32, 48, generator=torch.Generator().manual_seed(0))
    masked = mask_patches(pixels, ratio=0.75, patch=16, seed=1)
    changed = (masked != pixels).all(1).view(3, 2, 16, 3, 16).transpose(2, 3)  # [n, 2, 3, 16, 16]
    assert (changed.all((3, 4)) == changed.any((3, 4))).all()
    assert changed.all((3, 4)).sum((1, 2)).tolist() == [4, 4, 4]  # round(0.75 * 6): ties to even
    mean = pixels.mean((2, 3))[:, :, None, None].expand_as(pixels)
    torch.testing.assert_close(masked[masked != pixels], mean[masked != pixels])


def test_mask_by_hand() -> None:
    pixels = torch.tensor([[[[1.0, 3.0]]]])
    masked = mask_patches(pixels, ratio=0.5, patch=1)
    assert masked.flatten().tolist() in ([2.0, 3.0], [1.0, 2.0])
    assert mask_patches(pixels, ratio=1.0, patch=1).flatten().tolist() == [2.0, 2.0]


def test_mask_depends_on_the_generator_alone_and_fits_any_size() -> None:
    pixels = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    first, again, other = (mask_patches(pixels, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(mask_patches(pixels, ratio=0.0), pixels)
    with pytest.raises(ValueError, match="ratio=75"):
        mask_patches(pixels, ratio=75.0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_differ_are_named_with_the_remedy() -> None:
    one = torch.ones(())
    narrow = Features(torch.ones(3, 64), torch.ones(3, 64), one)
    wide = Features(torch.ones(3, 128), torch.ones(3, 128), one)
    short = Features(torch.ones(2, 64), torch.ones(2, 64), one)
    for term in (feature, gradient, lambda student, teacher: interactive(student, teacher, scale=1.0)):
        with pytest.raises(ValueError, match="student is 64 wide, teacher 128: project the student first"):
            term(narrow, wide)
    with pytest.raises(ValueError, match="student has 3 queries, teacher 2"):
        relational(narrow, short)
    with pytest.raises(ValueError, match="image has 3 rows, text 2"):
        augmented(torch.ones(3, 4), torch.ones(2, 4), scale=1.0)


@pytest.mark.parametrize("block", [None, 2])
def test_queued_equals_the_formula_and_its_gradient_is_right(
    unit_rows: Callable[..., Tensor], block: int | None
) -> None:
    own, target, queue = unit_rows(5, 4, seed=1), unit_rows(5, 4, seed=2).detach(), unit_rows(6, 4, seed=3).detach()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(own: Tensor, scale: Tensor) -> Tensor:
        return queued(own, target, queue, scale=scale, teacher_scale=20.0, block=block)

    naive = 0.0
    for u, e in zip(own.detach(), target, strict=True):
        log_p = torch.stack([3.0 * u @ q for q in queue]).log_softmax(0)
        log_q = torch.stack([20.0 * e @ q for q in queue]).log_softmax(0)
        naive += float((log_q.exp() * (log_q - log_p)).sum()) / len(own)
    assert float(loss(own, scale).detach()) == pytest.approx(naive, rel=1e-9)
    assert torch.autograd.gradcheck(loss, (own, scale))


def test_queued_by_hand() -> None:
    """The teacher is log 3 nearer to the queue's first row, the student as near to both: 3/4, 1/4 to 1/2, 1/2."""
    target, own = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)]])
    found = queued(own, target, torch.eye(2), scale=5.0, teacher_scale=math.log(3))
    assert float(found) == pytest.approx(math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25), abs=1e-6)
    assert float(queued(target, target, torch.eye(2), scale=LOG3, teacher_scale=LOG3)) == pytest.approx(0, abs=1e-6)
