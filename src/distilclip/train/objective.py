"""A distillation method is a value: the weights of its terms and the constants inside them (SPEC sections 1 and 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.errors import InputError, did_you_mean
from distilclip.losses.features import Features
from distilclip.models.heads import Heads
from distilclip.train import terms
from distilclip.train.class_head import StepClasses
from distilclip.train.terms import Share

TERMS = (
    "task",
    "cluster",
    "instance",
    "relational",
    "feature",
    "masked",
    "gradient",
    "interactive",
    "augmented",
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """L = sum of weight x term; a weight of 0 leaves the term uncomputed."""

    task: float = 1.0
    """contrast of the student's own image and text embeddings"""
    cluster: float = 0.0
    """CLIP-CID, cluster discrimination (needs centers and labels)"""
    instance: float = 0.0
    """CLIP-CID, instance discrimination: student image to teacher text and the reverse"""
    relational: float = 0.0
    """CLIP-KD, CRD: KL between the batch's similarity distributions"""
    feature: float = 0.0
    """CLIP-KD, FD: mean squared error of the embeddings (published weight 2000)"""
    masked: float = 0.0
    """CLIP-KD, MFD: FD with the student's image masked (published weight 2000)"""
    gradient: float = 0.0
    """CLIP-KD, GD: mean squared error of the contrastive loss's gradients"""
    interactive: float = 0.0
    """CLIP-KD, ICL: student queries against teacher keys"""
    augmented: float = 0.0
    """CLIP-KD, AFD: contrast of fused student and teacher embeddings"""
    alpha: float = 0.999
    """share of the label loss in the cluster term; the rest is the KL"""
    temperature: float = 0.07
    """tau of the cluster term's KL"""
    class_scale: float = 1.0
    """s_l of the cluster term's label loss"""
    sample_rate: float = 1.0
    """share of the classes in each step's softmax (Partial FC); 1 means all"""
    gamma: float = 0.5
    """share of the image side in the instance term"""
    mask_ratio: float = 0.75
    """share of the patch grid that the masked term hides"""

    def __post_init__(self) -> None:
        for name, value in self.weights.items():
            if value < 0:
                raise InputError(f"The weight of the term {name!r} is {value}; weights are 0 or more.")
        for name in ("alpha", "gamma", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        if self.temperature <= 0 or self.class_scale <= 0:
            raise InputError("temperature and class_scale must be positive.")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}; it is a share of the classes, over 0 and up to 1.")
        if not any(self.weights.values()):
            raise InputError("All term weights are 0: nothing would be learned.")

    @property
    def weights(self) -> dict[str, float]:
        """Every term's weight."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(weight for name, weight in self.weights.items() if name != "task")

    def terms(
        self,
        student: Features,
        teacher: Features | None,
        *,
        heads: Heads,
        others: Sequence[Features] = (),
        masked_image: Float[Tensor, "n dim"] | None = None,
        classes: StepClasses | None = None,
        share: Share | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Every term with a weight, unweighted. `student` is in its own space; `heads` projects it where terms need it.

        `others` are the features of further teachers: a term is the mean over teachers by the weights that `heads` has
        for them, but the cluster term's centers are the first one's. `masked_image` holds the student's embeddings of
        the masked images (for `masked`), `classes` the centers and labels of the step (for `cluster`). The rows are
        `share` of the global batch (None: all of it), the values what they add to its terms.
        """
        share = share or Share(rows=slice(0, len(student)), count=len(student))
        values: dict[str, Tensor] = {}
        if self.task:
            values["task"] = terms.task(student, share=share)
        if not self.needs_teacher:
            return values
        if teacher is None:
            raise ValueError("This objective compares with a teacher: pass the teacher's features.")
        for one, own, weight in zip((teacher, *others), heads.each(), heads.weights, strict=True):
            projected = own.project(student)
            if self.cluster and "cluster" not in values:
                assert classes is not None
                values["cluster"] = terms.cluster(
                    projected.image,
                    teacher.image,
                    classes,
                    alpha=self.alpha,
                    temperature=self.temperature,
                    class_scale=self.class_scale,
                    share=share,
                )
            for name, value in self._against(student, projected, one, own, masked_image, share).items():
                values[name] = values.get(name, 0) + weight * value
        return values

    def _against(
        self,
        student: Features,
        projected: Features,
        teacher: Features,
        heads: Heads,
        masked_image: Tensor | None,
        share: Share,
    ) -> dict[str, Tensor]:
        """The terms that compare with any one teacher; `projected` is the student in its space."""
        values: dict[str, Tensor] = {}
        if self.instance:
            scale = heads.scale("instance")
            values["instance"] = terms.instance(projected, teacher, scale=scale, gamma=self.gamma, share=share)
        if self.relational:
            values["relational"] = terms.relational(student, teacher, share=share)
        if self.feature:
            values["feature"] = terms.feature(projected, teacher, share=share)
        if self.masked:
            assert masked_image is not None
            masked = heads.project(Features(image=masked_image, text=student.text, scale=student.scale))
            values["masked"] = terms.feature(masked, teacher, share=share)
        if self.gradient:
            values["gradient"] = terms.gradient(projected, teacher, share=share)
        if self.interactive:
            scale = heads.scale("interactive")
            values["interactive"] = terms.interactive(projected, teacher, scale=scale, share=share)
        if self.augmented:
            fused = heads.fuse(projected, teacher)
            values["augmented"] = terms.contrast(*fused, scale=heads.scale("augmented"), share=share)
        return values

    def total(self, terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The weighted sum of terms."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


PRESETS = {
    "clip": Objective(),
    "clip-cid": Objective(cluster=1.0, instance=1.0),
    "clip-kd": Objective(relational=1.0, feature=2000.0, interactive=1.0),
}


def objective(name: str, overrides: dict[str, float] | None = None) -> Objective:
    """A named method (`clip`, `clip-cid`, `clip-kd`) with some weights or constants replaced.

    Raises `InputError` for an unknown method, term or constant.
    """
    if name not in PRESETS:
        raise InputError(f"No objective {name!r}. {did_you_mean(name, PRESETS)}")
    fields = [f.name for f in dataclasses.fields(Objective)]
    for key in overrides or {}:
        if key not in fields:
            raise InputError(f"The objective has no term or constant {key!r}. {did_you_mean(key, fields)}")
    return dataclasses.replace(PRESETS[name], **(overrides or {}))
