"""One optimisation step: features, terms, gradients, exact under accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distilclip import losses
from distilclip.errors import InputError
from distilclip.models.clip import Clip, normalise_pixels
from distilclip.models.heads import Heads
from distilclip.ops.features import Features
from distilclip.ops.mimicry import mask_patches
from distilclip.train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step computed: the loss, its unweighted terms, and how near the student came to the teacher."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    cosine_image: Float[Tensor, ""] | None
    cosine_text: Float[Tensor, ""] | None


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student under training and the parameters its objective owns."""

    clip: Clip
    heads: Heads
    precision: torch.dtype

    def embed(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit image and text embeddings with gradient, towers under autocast, the result float32."""
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.clip.encode_image(pixels), self.clip.encode_text(tokens)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings alone."""
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.clip.encode_image(pixels)

    def limit_scales(self) -> None:
        """Hold every learned scale at 100 or less, in the parameter itself, so that what is saved is what was used."""
        with torch.no_grad():
            for log_scale in (self.clip.model.logit_scale, *self.heads.log_scales()):
                log_scale.clamp_(max=math.log(100))

    def require_exact_accumulation(self) -> None:
        """`InputError` for a student whose embedding of a pair depends on the others in its micro-batch."""
        for name, module in self.clip.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise InputError(
                    f"{self.clip.name} normalises over the batch ({name}): micro-batches would train another model "
                    "than the batch. Leave out --micro-batch, or choose a student with layer norm."
                )

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [*self.clip.model.parameters(), *self.heads.parameters()]


def compute_gradients(
    student: Student,
    objective: Objective,
    *,
    pixels: Tensor,
    tokens: Int[Tensor, "n context"],
    teacher: Features | None,
    labels: Int[Tensor, " n"] | None,
    micro_batch: int,
    generator: torch.Generator,
) -> StepResult:
    """Gradients of the objective over the whole batch into `.grad`, holding activations of `micro_batch` rows only.

    The objective is a function of features, so accumulation is exact (SPEC section 3): embed all micro-batches without
    a graph, differentiate the objective with respect to the features of the whole batch, then embed each micro-batch
    again and push its slice of that gradient back. With one micro-batch there is no second pass.
    `generator` draws the sampled classes and the masks; its seed also fixes dropout, the same in both passes.
    """
    pixels = normalise_pixels(pixels, student.clip.preprocess_cfg)
    masked = mask_patches(pixels, ratio=objective.mask_ratio, generator=generator) if objective.masked else None
    classes = _draw_classes(student, objective, labels, generator)
    slices = [slice(i, i + micro_batch) for i in range(0, len(pixels), micro_batch)]

    def embed(part: slice) -> list[Tensor]:
        torch.manual_seed(generator.initial_seed() + part.start)
        image, text = student.embed(pixels[part], tokens[part])
        return [image, text] if masked is None else [image, text, student.embed_image(masked[part])]

    if len(slices) == 1:
        features = embed(slices[0])
        result = _evaluate(student, objective, features, teacher, labels, classes)
        result.loss.backward()
        return _detached(result)
    with torch.no_grad():
        parts = [embed(part) for part in slices]
    leaves = [torch.cat(column).requires_grad_() for column in zip(*parts, strict=True)]
    result = _evaluate(student, objective, leaves, teacher, labels, classes)
    result.loss.backward()
    for part in slices:
        used = [(f, leaf.grad[part]) for f, leaf in zip(embed(part), leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([f for f, _ in used], [g for _, g in used])
    return _detached(result)


def _evaluate(
    student: Student,
    objective: Objective,
    features: list[Tensor],
    teacher: Features | None,
    labels: Tensor | None,
    classes: Tensor | None,
) -> StepResult:
    own = Features(image=features[0], text=features[1], scale=student.clip.scale)
    terms = objective.terms(
        own,
        teacher,
        heads=student.heads,
        masked_image=features[2] if len(features) > 2 else None,
        labels=labels,
        classes=classes,
    )
    cosine_image = cosine_text = None
    if teacher is not None:
        with torch.no_grad():
            projected = student.heads.project(own)
            cosine_image = (projected.image * teacher.image).sum(dim=-1).mean()
            cosine_text = (projected.text * teacher.text).sum(dim=-1).mean()
    return StepResult(loss=objective.total(terms), terms=terms, cosine_image=cosine_image, cosine_text=cosine_text)


def _draw_classes(
    student: Student, objective: Objective, labels: Tensor | None, generator: torch.Generator
) -> Tensor | None:
    if not objective.cluster or objective.sample_rate == 1 or labels is None or student.heads.centers is None:
        return None
    return losses.sample_classes(labels, len(student.heads.centers), objective.sample_rate, generator)


def _detached(result: StepResult) -> StepResult:
    return StepResult(
        loss=result.loss.detach(),
        terms={name: value.detach() for name, value in result.terms.items()},
        cosine_image=result.cosine_image,
        cosine_text=result.cosine_text,
    )
