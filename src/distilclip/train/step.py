"""Compute the gradients of one step: features, terms, gradients, exact in micro-batches and over processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distilclip import distributed
from distilclip.data.stream import Batch
from distilclip.losses.cluster import sample_classes
from distilclip.losses.contrastive import row_block
from distilclip.losses.distillation import draw_masks, hide_patches
from distilclip.losses.features import Features, RankRows, Sides
from distilclip.losses.terms import StepClasses
from distilclip.models.batch_norm import fixed_statistics
from distilclip.models.clip import Clip, normalise_pixels
from distilclip.models.heads import Heads
from distilclip.models.teacher import Teacher
from distilclip.train.class_head import ClassHead
from distilclip.train.log import Stopwatch
from distilclip.train.objective import Objective
from distilclip.train.parallel import OWNED, gradient_sync, local, sum_gradients_


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a step says of the training beside its loss: of the global batch, the same on every process."""

    agreement: float | None
    """share of pictures for which student and teacher choose the same caption of the batch; None without a teacher"""
    gradient_norms: dict[str, float]
    """by term: norm of the gradient of weight x term with respect to the student's embeddings of the batch"""

    def line(self) -> dict[str, float]:
        """Return it as fields of metrics.jsonl."""
        norms = {f"gradient_norm_{name}": value for name, value in self.gradient_norms.items()}
        return norms if self.agreement is None else {"agreement": self.agreement, **norms}


@dataclass(frozen=True)
class BatchRows:
    """Which rows of a global batch are here, and what each has (None: all have both sides)."""

    here: RankRows
    sides: Sides | None = None


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What this process's rows add to the loss and to its unweighted terms: sums over processes are the step's."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    cosines: dict[str, Float[Tensor, ""]]
    """`cosine_image`, `cosine_text`: to the teacher, after projection"""
    classes: StepClasses | None = None
    """the class centers that took part, with their gradient"""
    embeddings: dict[str, Float[Tensor, "n dim"]] = field(default_factory=dict)
    """the student's, of the rows here: `image`, `text` and `masked`"""
    diagnosis: Diagnosis | None = None
    """where it was asked for"""
    teachers: tuple[Features, ...] = ()
    """of the rows here"""
    rows: BatchRows | None = None


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student under training and the parameters its objective owns. `towers` runs `clip.model` (train.parallel)."""

    clip: Clip
    heads: Heads
    towers: nn.Module
    class_head: ClassHead | None = None
    runs: tuple[str, ...] = ("image", "text")
    """the towers that are run: without one of them, its embeddings are zero"""

    def limit_scales(self) -> None:
        """Hold every learned scale at 100 or less, in the parameter itself, so that what is saved is what was used.

        The scale of a model with a bias goes where it learns to: those of published SigLIPs are above 100.
        """
        own = [] if self.clip.bias is not None else [self.clip.model.logit_scale]
        with torch.no_grad():
            for log_scale in (*own, *self.heads.log_scales()):
                # 0 x infinity is NaN, which the next loss shows: an infinite scale must not become 100 without a word.
                log_scale.add_(0 * log_scale).clamp_(max=math.log(100))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return everything that is trained but the class centers, by name."""
        model, heads = self.clip.model.named_parameters(), self.heads.named_parameters()
        return {**{f"model.{n}": p for n, p in model}, **{f"heads.{n}": p for n, p in heads}}

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained but the class centers."""
        return list(self.named_parameters().values())

    def owned_parameters(self) -> list[nn.Parameter]:
        """Return what the objective uses beside features: every process has all of it."""
        own = [p for name, p in self.clip.model.named_parameters() if name in OWNED]
        return [*own, *self.heads.parameters()]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """This process's rows of a global batch, n of m."""

    pixels: Tensor
    tokens: Int[Tensor, "n context"]
    teacher: Features | None = None
    others: tuple[Features, ...] = ()
    """further teachers"""
    labels: Int[Tensor, " n"] | None = None
    has_image: Bool[Tensor, " n"] | None = None
    has_text: Bool[Tensor, " n"] | None = None
    """which rows have a picture and a caption; None where all have both"""

    def sides(self, rows: RankRows) -> Sides | None:
        """Return what the rows of the global batch have; every process must call it."""
        if self.has_image is None or self.has_text is None:
            return None
        return Sides.of(self.has_image, self.has_text, rows)


def make_inputs(batch: Batch, teacher: Teacher | None, device: torch.device) -> Inputs:
    """Bring a batch and the features of its teachers to the device."""
    teachers = teacher(batch) if teacher is not None else ()
    return Inputs(
        pixels=batch.pixels.to(device, non_blocking=True),
        tokens=batch.tokens.to(device, non_blocking=True),
        teacher=teachers[0] if teachers else None,
        others=teachers[1:],
        labels=batch.labels.to(device) if batch.labels is not None else None,
        has_image=batch.has_image.to(device) if batch.has_image is not None else None,
        has_text=batch.has_text.to(device) if batch.has_text is not None else None,
    )


def compute_gradients(
    student: Student,
    objective: Objective,
    inputs: Inputs,
    *,
    micro_batch: int,
    generator: torch.Generator,
    stopwatch: Stopwatch | None = None,
    diagnosing: bool = False,
    gradient_scale: float = 1.0,
) -> StepResult:
    """Write the objective's gradients over the global batch to `.grad`, with activations of `micro_batch` rows only.

    The objective is a function of features, so accumulation is exact (SPEC section 3): embed all micro-batches without
    a graph, differentiate the objective with respect to the features of the whole batch, then embed each micro-batch
    again and push its slice of that gradient back. With one micro-batch there is no second pass. Every process must
    call with equally many rows and an equally seeded `generator`, which draws the sampled classes and the masks of the
    global batch; its seed also fixes dropout, the same in both passes. Gradients pass the towers multiplied by
    `gradient_scale`, a power of two, and are divided by it afterwards. Batch norms count the first pass only.
    """
    stopwatch = stopwatch or Stopwatch(inputs.pixels.device)
    rows = distributed.rows_of_this_rank(len(inputs.pixels))
    sides = inputs.sides(rows)
    masks = _draw_masks(objective, inputs.pixels, rows, generator)
    classes = _draw_classes(student, objective, inputs.labels, rows, generator, sides)
    slices = [slice(i, i + micro_batch) for i in range(0, len(inputs.pixels), micro_batch)]

    def embed(part: slice) -> list[Tensor]:
        torch.manual_seed(((generator.initial_seed() << 24) + rows.offset + part.start) % (1 << 63))
        return _run_towers(student, inputs, part, masks)

    def copy(features: list[Tensor]) -> list[Tensor]:  # a CUDA graph writes the next call's over them
        return [feature.clone() for feature in features]

    with stopwatch.measure("student"), torch.set_grad_enabled(len(slices) == 1):
        parts = [embed(part) for part in slices] if len(slices) == 1 else [copy(embed(part)) for part in slices]
        leaves = [torch.cat(column).detach().requires_grad_() for column in zip(*parts, strict=True)]
    with stopwatch.measure("objective"):
        result = _evaluate(student, objective, leaves, inputs, classes, BatchRows(rows, sides), diagnosing=diagnosing)
    with stopwatch.measure("student"):
        for part in slices:
            with gradient_sync(student.towers, now=part is slices[-1]), fixed_statistics(student.clip.model):
                features = parts[0] if len(slices) == 1 else embed(part)
                trained = [place for place, feature in enumerate(features) if feature.requires_grad]  # is not frozen
                torch.autograd.backward(
                    [features[place] for place in trained],
                    [_gradient_of(leaves[place])[part] * gradient_scale for place in trained],
                )
        _unscale_(student, gradient_scale)
        sum_gradients_(student.owned_parameters())
    return result


@torch.no_grad()
def measure_terms(
    student: Student, objective: Objective, inputs: Inputs, *, micro_batch: int, generator: torch.Generator
) -> dict[str, float]:
    """Return the loss of a global batch, its unweighted terms and, with a teacher, the cosines; nothing is learned.

    The towers should be in evaluation mode. Every process must call it with equally many rows and an equally seeded
    `generator`, as for `compute_gradients`; the values are those of the global batch.
    """
    rows = distributed.rows_of_this_rank(len(inputs.pixels))
    sides = inputs.sides(rows)
    masks = _draw_masks(objective, inputs.pixels, rows, generator)
    classes = _draw_classes(student, objective, inputs.labels, rows, generator, sides)
    slices = [slice(start, start + micro_batch) for start in range(0, len(inputs.pixels), micro_batch)]
    parts = [_run_towers(student, inputs, part, masks) for part in slices]
    image, text, *masked_images = (torch.cat(column) for column in zip(*parts, strict=True))
    own = Features(image=image, text=text, scale=student.clip.scale, bias=student.clip.bias)
    terms = objective.terms(
        own,
        inputs.teacher,
        heads=student.heads,
        others=inputs.others,
        masked_image=masked_images[0] if masked_images else None,
        classes=classes,
        rows=rows,
        sides=sides,
    )
    values = {"loss": objective.total(terms), **terms}
    if inputs.teacher is not None:
        values |= _cosines(student.heads.project(own), inputs.teacher, BatchRows(rows, sides))
    summed = distributed.reduce_(torch.stack([value.detach() for value in values.values()]))
    return dict(zip(values, summed.tolist(), strict=True))


def _run_towers(
    student: Student, inputs: Inputs, part: slice, masks: Bool[Tensor, "n rows columns"] | None
) -> list[Float[Tensor, "_ dim"]]:
    """Embed some rows; a tower that keeps its weights is left out where none of all rows has anything for it."""
    runs = student.runs
    has_pixels = "image" in runs and inputs.pixels.shape[-1] > 1  # the stream of a store without pictures shows one
    pixels = normalise_pixels(inputs.pixels[part], student.clip.preprocess_cfg) if has_pixels else None
    masked = None if masks is None or pixels is None else hide_patches(pixels, masks[part])
    return student.towers(pixels, inputs.tokens[part] if "text" in runs else None, masked)


def _unscale_(student: Student, scale: float) -> None:
    """Divide the gradients that came through the towers."""
    if scale == 1:
        return
    owned = {id(parameter) for parameter in student.owned_parameters()}
    gradients = [local(p.grad) for p in student.parameters() if p.grad is not None and id(p) not in owned]
    torch._foreach_mul_(gradients, 1 / scale)


def _gradient_of(leaf: Tensor) -> Tensor:
    """Zero where no term uses a feature: DDP waits for every parameter's gradient."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _evaluate(
    student: Student,
    objective: Objective,
    leaves: list[Tensor],
    inputs: Inputs,
    classes: StepClasses | None,
    rows: BatchRows,
    *,
    diagnosing: bool,
) -> StepResult:
    """Loss and terms; gradients into the leaves and what the objective owns."""
    own = Features(image=leaves[0], text=leaves[1], scale=student.clip.scale, bias=student.clip.bias)
    teacher = inputs.teacher
    terms = objective.terms(
        own,
        teacher,
        heads=student.heads,
        others=inputs.others,
        masked_image=leaves[2] if len(leaves) > 2 else None,
        classes=classes,
        rows=rows.here,
        sides=rows.sides,
    )
    loss = objective.total(terms)
    loss.backward(retain_graph=diagnosing)
    diagnosis = None
    if diagnosing:
        weighted = {name: objective.weights[name] * value for name, value in terms.items()}
        diagnosis = _diagnose(own, teacher, terms=weighted, leaves=leaves, rows=rows)
    return StepResult(
        loss=loss.detach(),
        terms={name: value.detach() for name, value in terms.items()},
        cosines={} if teacher is None else _cosines(student.heads.project(own), teacher, rows),
        classes=classes,
        embeddings={name: leaf.detach() for name, leaf in zip(("image", "text", "masked"), leaves, strict=False)},
        diagnosis=diagnosis,
        teachers=() if teacher is None else (teacher, *inputs.others),
        rows=rows,
    )


@torch.no_grad()
def _cosines(projected: Features, teacher: Features, rows: BatchRows) -> dict[str, Tensor]:
    """Of the rows that have a picture, and of those that have a caption; nothing where no row of the batch has any."""
    found = {}
    for side in ("image", "text"):
        cosine = (getattr(projected, side) * getattr(teacher, side)).sum(dim=-1)
        if rows.sides is None:
            found[f"cosine_{side}"] = cosine.mean() * rows.here.weight
        elif len(part := getattr(rows.sides, side)):
            found[f"cosine_{side}"] = cosine[part.mine].sum() / len(part)
    return found


def _diagnose(
    student: Features,
    teacher: Features | None,
    *,
    terms: Mapping[str, Float[Tensor, ""]],
    leaves: Sequence[Tensor],
    rows: BatchRows,
) -> Diagnosis:
    """Measure the rows here and reduce. `terms` are weighted and keep their graph down to the `leaves`.

    Of a batch without any pair there is no agreement to measure.
    """
    squares = []
    for term in terms.values():
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        squares.append(torch.stack([g.square().sum() for g in gradients if g is not None] or [term * 0]).sum().detach())
    agreed, here = torch.zeros_like(squares[0]), rows.here
    if teacher is not None and rows.sides is not None:
        pairs = rows.sides.pairs
        here, student, teacher = pairs.rows, student.take(pairs.mine), teacher.take(pairs.mine) if len(pairs) else None
    if teacher is not None:
        with torch.no_grad():
            same = _choose_captions(student, here) == _choose_captions(teacher, here)
            agreed = same.sum().to(agreed) / here.count
    *sums, agreed_share = distributed.reduce_(torch.stack([*squares, agreed])).tolist()
    return Diagnosis(
        agreement=None if teacher is None else round(agreed_share, 6),
        gradient_norms={name: total**0.5 for name, total in zip(terms, sums, strict=True)},
    )


def _choose_captions(features: Features, rows: RankRows) -> Tensor:
    """The nearest caption of the global batch to each picture here, found for some pictures at a time."""
    captions = rows.all(features.text)
    return torch.cat([(part @ captions.T).argmax(dim=1) for part in features.image.split(row_block(captions))])


def _draw_masks(
    objective: Objective, pixels: Tensor, rows: RankRows, generator: torch.Generator
) -> Bool[Tensor, "n rows columns"] | None:
    """Masks of the rows here, as they are drawn for the global batch."""
    if not objective.needs("masks"):
        return None
    size, ratio = (pixels.shape[2], pixels.shape[3]), objective.constants.mask_ratio
    masks = draw_masks(rows.count, size, ratio=ratio, generator=generator, device=pixels.device)
    return masks[rows.here]


def _draw_classes(
    student: Student,
    objective: Objective,
    labels: Tensor | None,
    rows: RankRows,
    generator: torch.Generator,
    sides: Sides | None = None,
) -> StepClasses | None:
    """The classes of the step and this rank's centers of them, for the labels of the global batch's pictures."""
    if not objective.needs("centers"):
        return None
    assert student.class_head is not None
    assert labels is not None
    labels, rate = rows.all(labels), objective.constants.sample_rate
    if sides is not None:
        labels = labels[sides.image.chosen]
    sampled = sample_classes(labels, student.class_head.num_classes, rate, generator) if rate < 1 else None
    return student.class_head.of_step(labels, sampled)
