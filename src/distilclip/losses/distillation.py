"""Compute CLIP-KD's terms: the student imitates the teacher's relations, features, gradients and contrasts.

The caller chooses which embeddings go in: `relational` takes the student's own, never projected; `feature`, `gradient`
and `interactive` compare with the teacher's space and take projected ones where widths differ. The teacher is a
constant throughout. `rows` says which rows of a global batch are given (None: all of them); then the ranks' values add
up to the term. Example: two orthogonal pairs, scale log 3, and a teacher with the texts exchanged. The student's
softmax rows are (3/4, 1/4), the teacher's (1/4, 3/4), so `relational` is 3/4 log 3 - 1/4 log 3 = 0.5493.
Source: Yang et al. 2024 (CLIP-KD), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from distilclip.errors import InputError
from distilclip.losses._checks import check_scale
from distilclip.losses._tiling import full_precision, no_autocast, softmax_, sum_over_rows
from distilclip.losses.contrastive import PLAIN_ENTRIES, check_pairs, contrastive, info_nce, row_block
from distilclip.losses.features import Features, RankRows


def relational(
    student: Features, teacher: Features, *, rows: RankRows | None = None, block: int | None = None
) -> Float[Tensor, ""]:
    """Return contrastive relational distillation (CRD): the teacher's similarities as soft targets of the student's.

        1/2 [ KL(softmax(b E C^T) || softmax(a e c^T)) over rows + the same over columns ], batch mean

    e, c and a are the student's image and text embeddings and its scale, E, C, b the teacher's; widths may differ.
    Differentiable in the student's embeddings and scale. In large batches only `block` rows of similarities exist at a
    time.
    """
    rows = rows or RankRows.alone(len(student.image))
    scales = {"scale": student.scale, "teacher_scale": teacher.scale}

    def one_way(own: Tensor, other: Tensor, target: Tensor, other_target: Tensor) -> Tensor:
        keys, target_keys = rows.all(other), rows.all(other_target)
        return row_divergence(own, keys, target, target_keys, **scales, count=rows.count, block=block)

    # Rows of the similarities, then columns.
    by_image = one_way(student.image, student.text, teacher.image, teacher.text)
    by_text = one_way(student.text, student.image, teacher.text, teacher.image)
    return (by_image + by_text) / 2


def row_divergence(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    teacher_queries: Float[Tensor, "n width"],
    teacher_keys: Float[Tensor, "m width"],
    *,
    scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    count: int | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return one direction of `relational`, for all queries or for those of one rank.

        1 / count * sum_i KL( softmax_j(b Q_i . K_j) || softmax_j(a q_i . k_j) )

    With keys gathered from all ranks and `count` the global number of queries (default: n), the ranks' results add up
    to that of the whole batch. Differentiable in `queries`, `keys` and `scale`. Raises `ValueError` where the student's
    and the teacher's rows differ in number.
    """
    check_scale(scale)
    check_scale(teacher_scale, name="teacher_scale")
    for own, target, name in ((queries, teacher_queries, "queries"), (keys, teacher_keys, "keys")):
        if len(own) != len(target):
            raise ValueError(
                f"student has {len(own)} {name}, teacher {len(target)}: row i of both must be the same sample."
            )
    queries, keys, scale, teacher_queries, teacher_keys, teacher_scale = full_precision(
        queries, keys, scale, teacher_queries.detach(), teacher_keys.detach(), teacher_scale
    )
    teacher_scale = teacher_scale.detach()
    count = len(queries) if count is None else count
    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            log_p = F.log_softmax(scale * queries @ keys.T, dim=1)  # [n, m]
            log_q = F.log_softmax(teacher_scale * teacher_queries @ teacher_keys.T, dim=1)
            return F.kl_div(log_p, log_q, log_target=True, reduction="sum") / count

    def divergence_(logits: Tensor, rows: slice) -> Tensor:
        return _divergence_(logits, teacher_scale * teacher_queries[rows] @ teacher_keys.T)

    return sum_over_rows(queries, keys, scale, divergence_, count=count, block=block or row_block(keys))


def intramodal(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n width"],
    *,
    scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    rows: RankRows | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return relational distillation within one modality: of pictures among themselves, or of texts.

        1/n sum_i KL( softmax_j(b E_i . E_j) || softmax_j(a e_i . e_j) ),   j over all rows but i

    e, a are the student's embeddings and scale, E, b the teacher's. It is `relational` with the other pictures of the
    batch in place of the captions, so it needs none; a row's likeness to itself says nothing and is left out.
    """
    rows = rows or RankRows.alone(len(student))
    check_scale(scale)
    check_scale(teacher_scale, name="teacher_scale")
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} rows, teacher {len(teacher)}: row i of both must be the same.")
    queries, keys, scale = full_precision(student, rows.all(student), scale)
    teacher, teacher_keys, teacher_scale = full_precision(teacher.detach(), rows.all(teacher).detach(), teacher_scale)

    def divergence_(logits: Tensor, here: slice) -> Tensor:
        targets = teacher_scale.detach() * teacher[here] @ teacher_keys.T
        for values in (logits, targets):
            values.diagonal(rows.offset + here.start)[: len(values)].fill_(_LEFT_OUT)
        return _divergence_(logits, targets)

    return sum_over_rows(queries, keys, scale, divergence_, count=rows.count, block=block or row_block(keys))


def queued(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    queue: Float[Tensor, "k dim"],
    *,
    scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    count: int | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return relational distillation against a queue: of pictures to the teacher's of earlier batches, or of texts.

        1/n sum_i KL( softmax_j(b E_i . Q_j) || softmax_j(s u_i . Q_j) )

    u are the student's embeddings in the teacher's space, E the teacher's, Q the queue, b the teacher's scale, s a
    scale of the student's. A small batch so has thousands of pictures to place each of its own among, for no pass of
    any tower. With `count`, the global number of rows (default: n), the ranks' results add up. Source: Fang et al. 2021
    (SEED), equation 4, which has the teacher's own embedding of the row in the queue, too; here the row is not in it.
    """
    return row_divergence(
        student,
        queue,
        teacher,
        queue,
        scale=scale,
        teacher_scale=teacher_scale,
        count=count,
        block=block,
    )


_LEFT_OUT = -1e4  # a logit whose exponential is 0 beside any other


def _divergence_(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the rows' KL(softmax(targets) || softmax(logits)); the logits become its gradient."""
    # KL(q || p) = sum_j q_j (target_j - logit_j) + lse(logits) - lse(targets); its gradient is p - q.
    gap = targets - logits
    p, p_normaliser = softmax_(logits)  # student; [r, m] and [r]
    q, q_normaliser = softmax_(targets)  # teacher
    p.sub_(q)
    return gap.mul_(q).sum() + (p_normaliser - q_normaliser).sum()


def feature(student: Features, teacher: Features, *, rows: RankRows | None = None) -> Float[Tensor, ""]:
    """Return feature distillation (FD): mean squared difference over n and dim, of images plus of texts.

    The published weight 2000 belongs to this mean over dim. On the student's features of masked images
    (`hide_patches`) this is the masked term MFD.
    """
    _check_same_space(student, teacher)
    # A mean over the rows here; the ranks' means are weighted by their numbers of rows.
    image, teacher_image = full_precision(student.image, teacher.image.detach())
    text, teacher_text = full_precision(student.text, teacher.text.detach())
    value = F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text)
    return value if rows is None else value * rows.weight


def one_feature(
    student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n dim"], *, rows: RankRows | None = None
) -> Float[Tensor, ""]:
    """Return feature distillation of one side, of images or of texts: `feature` is the sum of both."""
    rows = rows or RankRows.alone(len(student))
    check_pairs(student, teacher, names=("student", "teacher"), rows=rows)
    student, teacher = full_precision(student, teacher.detach())
    return _mean_square(student, teacher) * rows.weight


def _mean_square(own: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference, 0 of no rows: a rank may have none of a batch's rows of a kind."""
    return F.mse_loss(own, target) if len(own) else own.sum()


def gradient(student: Features, teacher: Features, *, rows: RankRows | None = None) -> Float[Tensor, ""]:
    """Return gradient distillation (GD): mean squared difference of both models' contrastive gradients.

        g_x = s (P - I) Y / n,   g_y = s (P - I)^T X / n,   P = softmax(s X Y^T) over rows, s the model's own scale

    are the gradients of InfoNCE(X, Y; s); the term is the sum of four means over n and dim: g_x and g_y of the
    image-to-text direction and of text-to-image. Differentiable in the student's embeddings and scale; holds n x n.

    The term is small: about 4 s^2 / (n^2 dim) for an untrained student (measured: 2.4e-5 at n = 256, dim = 512,
    s = 14.3), so its weight is large and belongs to one batch size. With weight n^2 dim / 1000 its gradient was as long
    as the contrastive loss's for a student half way to its teacher, and a twentieth of it before training (n = 256 and
    1,024, dim = 128 and 512). Published weights are for gradients divided by s^2 and do not carry over.
    """
    _check_same_space(student, teacher, rows)
    rows = rows or RankRows.alone(len(student.image))
    # The teacher's gradients are targets; the student's are differentiated once more.
    with torch.no_grad():
        targets = _contrastive_gradients(teacher, rows)
    own = _contrastive_gradients(student, rows)
    value = torch.stack([_mean_square(g, target.to(g)) for g, target in zip(own, targets, strict=True)]).sum()
    return value * rows.weight


def interactive(
    student: Features, teacher: Features, *, scale: Float[Tensor, ""] | float, rows: RankRows | None = None
) -> Float[Tensor, ""]:
    """Return interactive contrastive learning (ICL): student queries against the teacher's keys of the other modality.

        1/2 [ InfoNCE(u, C; s) + InfoNCE(v, E; s) ]

    u, v are the student's image and text embeddings, E, C the teacher's, s a learnable scale of this term.
    """
    _check_same_space(student, teacher, rows)
    rows = rows or RankRows.alone(len(student.image))
    # The teacher's rows of all ranks are the keys.
    image, text = rows.all(teacher.image).detach(), rows.all(teacher.text).detach()
    by_image = info_nce(student.image, text, scale=scale, offset=rows.offset, count=rows.count)
    by_text = info_nce(student.text, image, scale=scale, offset=rows.offset, count=rows.count)
    return (by_image + by_text) / 2


def augmented(
    fused_image: Float[Tensor, "n dim"],
    fused_text: Float[Tensor, "n dim"],
    *,
    scale: Float[Tensor, ""] | float,
    rows: RankRows | None = None,
) -> Float[Tensor, ""]:
    """Return augmented feature distillation (AFD): contrast of student and teacher embeddings fused per modality.

    The inputs are normalise(F [student ; teacher]) of images and of texts, F a linear map per modality (models.heads).
    """
    return contrastive(fused_image, fused_text, scale=scale, rows=rows)


def draw_masks(
    num_images: int,
    size: tuple[int, int],
    *,
    ratio: float = 0.75,
    patch: int = 16,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "n rows columns"]:
    """Draw which squares of a grid over images of `size` (height, width) each image loses: a random `ratio` of them.

    Every image loses the same number of squares of `patch` x `patch` pixels; those at the right and lower edge may be
    smaller. Raises `ValueError` for a ratio outside 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio}: the masked share of patches lies in 0..1.")
    rows, columns = _grid(size, patch)
    drawn_on = device if generator is None else generator.device
    # Random numbers, ranked within each image: the lowest ranks are hidden.
    draws = torch.rand(num_images, rows * columns, generator=generator, device=drawn_on)
    order = draws.to(device or draws.device).argsort(dim=1)
    return (order < round(ratio * rows * columns)).view(num_images, rows, columns)


def hide_patches(
    pixels: Float[Tensor, "n channels height width"], masks: Bool[Tensor, "n rows columns"], *, patch: int = 16
) -> Float[Tensor, "n channels height width"]:
    """Set the masked squares of images to the image's own mean colour.

    Works on pixels, so that any architecture can be the student. Raises `InputError` where the masks were drawn for
    pictures of another size or number, or with another `patch`.
    """
    _, _, height, width = pixels.shape
    grid = _grid((height, width), patch)
    if masks.shape != (len(pixels), *grid):
        raise InputError(
            f"masks are {tuple(masks.shape)}; {len(pixels)} pictures of {height} x {width} pixels in squares of "
            f"{patch} need {(len(pixels), *grid)}: draw and hide with the same `patch` and size."
        )
    # From squares to pixels: repeat each square's mark, and cut what reaches over the edge.
    hidden = masks[:, None].repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)[:, :, :height, :width]
    return torch.where(hidden, pixels.mean(dim=(2, 3), keepdim=True), pixels)


def _grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of squares over a picture, rounded up: those at the edges may be smaller."""
    if patch < 1:
        raise InputError(f"patch is {patch}; a square has a side of at least 1 pixel.")
    return -(-size[0] // patch), -(-size[1] // patch)


def _check_same_space(student: Features, teacher: Features, rows: RankRows | None = None) -> None:
    """Raise `ValueError` unless both models' rows are the same samples, in one space."""
    check_pairs(student.image, teacher.image, names=("student", "teacher"), rows=rows)
    check_pairs(student.text, teacher.text, names=("student", "teacher"), rows=rows)


def _contrastive_gradients(features: Features, rows: RankRows) -> list[Tensor]:
    """The rows here of g_x, g_y of image-to-text, then of text-to-image, as tensors that can be differentiated again.

    Row i of g_y sums over column i of the softmax P, whose rows are normalised on their own ranks: the ranks exchange
    their rows' log-sum-exps, m numbers, and each forms the columns it needs.
    """
    image, text, scale = full_precision(features.image, features.text, features.scale)
    own = torch.zeros(len(image), rows.count, dtype=image.dtype, device=image.device)
    own.diagonal(rows.offset).fill_(1)  # the rows here of the identity, [n, m]
    gradients = []
    with no_autocast(image):
        for x, y in ((image, text), (text, image)):
            all_x, all_y = rows.all(x), rows.all(y)  # [m, dim]
            logits = scale * x @ all_y.T  # [n, m]
            by_row = scale * (torch.softmax(logits, dim=1) - own) / rows.count  # the rows here of s (P - I) / m
            by_column = by_row  # [m, n]: its columns that belong to the rows here
            if not rows.whole:
                normaliser = rows.gather(torch.logsumexp(logits, dim=1))  # [m]
                columns = torch.exp(scale * all_x @ y.T - normaliser[:, None])  # [m, n]
                by_column = scale * (columns - own.T) / rows.count
            gradients += [by_row @ all_y, by_column.T @ all_x]
    return gradients
