"""One optimisation step: features, terms, gradients, exact under accumulation and over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distilclip import losses
from distilclip.losses.distillation import draw_masks, hide_patches
from distilclip.losses.features import Features
from distilclip.models.clip import Clip, normalise_pixels
from distilclip.models.heads import Heads
from distilclip.train.class_head import ClassHead, StepClasses
from distilclip.train.diagnosis import Diagnosis, diagnose
from distilclip.train.objective import Objective
from distilclip.train.parallel import OWNED, gradient_sync, sum_gradients_
from distilclip.train.stopwatch import Stopwatch
from distilclip.train.terms import Share


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


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student under training and the parameters its objective owns. `towers` runs `clip.model` (train.parallel)."""

    clip: Clip
    heads: Heads
    towers: nn.Module
    class_head: ClassHead | None = None

    def embed(self, pixels: Tensor, tokens: Tensor, masked: Tensor | None = None) -> list[Float[Tensor, "n dim"]]:
        """Unit image and text embeddings with gradient, and those of masked images if there are any; float32."""
        return self.towers(pixels, tokens, masked)

    def limit_scales(self) -> None:
        """Hold every learned scale at 100 or less, in the parameter itself, so that what is saved is what was used.

        The scale of a model with a bias goes where it learns to: those of published SigLIPs are above 100.
        """
        own = [] if self.clip.bias is not None else [self.clip.model.logit_scale]
        with torch.no_grad():
            for log_scale in (*own, *self.heads.log_scales()):
                log_scale.clamp_(max=math.log(100))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained but the class centers, by name."""
        model, heads = self.clip.model.named_parameters(), self.heads.named_parameters()
        return {**{f"model.{n}": p for n, p in model}, **{f"heads.{n}": p for n, p in heads}}

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained but the class centers."""
        return list(self.named_parameters().values())

    def owned_parameters(self) -> list[nn.Parameter]:
        """What the objective uses beside features: every process has all of it."""
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


def compute_gradients(
    student: Student,
    objective: Objective,
    inputs: Inputs,
    *,
    micro_batch: int,
    generator: torch.Generator,
    stopwatch: Stopwatch | None = None,
    diagnosing: bool = False,
) -> StepResult:
    """Gradients of the objective over the global batch into `.grad`, holding activations of `micro_batch` rows only.

    The objective is a function of features, so accumulation is exact (SPEC section 3): embed all micro-batches without
    a graph, differentiate the objective with respect to the features of the whole batch, then embed each micro-batch
    again and push its slice of that gradient back. With one micro-batch there is no second pass. Every process must
    call with equally many rows and an equally seeded `generator`, which draws the sampled classes and the masks of the
    global batch; its seed also fixes dropout, the same in both passes.
    """
    stopwatch = stopwatch or Stopwatch(inputs.pixels.device)
    share = Share.here(len(inputs.pixels))
    masks = _draw_masks(objective, inputs.pixels, share, generator)
    classes = _draw_classes(student, objective, inputs.labels, share, generator)
    slices = [slice(i, i + micro_batch) for i in range(0, len(inputs.pixels), micro_batch)]

    def embed(part: slice) -> list[Tensor]:
        torch.manual_seed(((generator.initial_seed() << 24) + share.rows.start + part.start) % (1 << 63))
        pixels = normalise_pixels(inputs.pixels[part], student.clip.preprocess_cfg)
        masked = None if masks is None else hide_patches(pixels, masks[part])
        return student.embed(pixels, inputs.tokens[part], masked)

    def copied(features: list[Tensor]) -> list[Tensor]:  # a CUDA graph writes the next call's over them
        return [feature.clone() for feature in features]

    with stopwatch.measure("student"), torch.set_grad_enabled(len(slices) == 1):
        parts = [embed(part) for part in slices] if len(slices) == 1 else [copied(embed(part)) for part in slices]
        leaves = [torch.cat(column).detach().requires_grad_() for column in zip(*parts, strict=True)]
    with stopwatch.measure("objective"):
        result = _evaluate(student, objective, leaves, inputs, classes, share, diagnosing=diagnosing)
    with stopwatch.measure("student"):
        for part in slices:
            with gradient_sync(student.towers, now=part is slices[-1]):
                features = parts[0] if len(slices) == 1 else embed(part)
                torch.autograd.backward(features, [_gradient(leaf)[part] for leaf in leaves])
        sum_gradients_(student.owned_parameters())
    return result


def _gradient(leaf: Tensor) -> Tensor:
    """Zero where no term uses a feature: DDP waits for every parameter's gradient."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _evaluate(
    student: Student,
    objective: Objective,
    leaves: list[Tensor],
    inputs: Inputs,
    classes: StepClasses | None,
    share: Share,
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
        share=share,
    )
    loss = objective.total(terms)
    loss.backward(retain_graph=diagnosing)
    diagnosis = None
    if diagnosing:
        weighted = {name: objective.weights[name] * value for name, value in terms.items()}
        diagnosis = diagnose(own, teacher, terms=weighted, leaves=leaves, share=share)
    return StepResult(
        loss=loss.detach(),
        terms={name: value.detach() for name, value in terms.items()},
        cosines={} if teacher is None else _cosines(student.heads.project(own), teacher, share),
        classes=classes,
        embeddings={name: leaf.detach() for name, leaf in zip(("image", "text", "masked"), leaves, strict=False)},
        diagnosis=diagnosis,
    )


@torch.no_grad()
def _cosines(projected: Features, teacher: Features, share: Share) -> dict[str, Tensor]:
    return {
        "cosine_image": (projected.image * teacher.image).sum(dim=-1).mean() * share.weight,
        "cosine_text": (projected.text * teacher.text).sum(dim=-1).mean() * share.weight,
    }


def _draw_masks(
    objective: Objective, pixels: Tensor, share: Share, generator: torch.Generator
) -> Bool[Tensor, "n rows columns"] | None:
    """Masks of the rows here, as they are drawn for the global batch."""
    if not objective.masked:
        return None
    size = pixels.shape[2], pixels.shape[3]
    masks = draw_masks(share.count, size, ratio=objective.mask_ratio, generator=generator, device=pixels.device)
    return masks[share.rows]


def _draw_classes(
    student: Student, objective: Objective, labels: Tensor | None, share: Share, generator: torch.Generator
) -> StepClasses | None:
    if not objective.cluster:
        return None
    assert student.class_head is not None
    assert labels is not None
    labels = share.all(labels)
    sampled = None
    if objective.sample_rate < 1:
        num_classes = student.class_head.num_classes
        sampled = losses.sample_classes(labels, num_classes, objective.sample_rate, generator)
    return student.class_head.of_step(labels, sampled)
