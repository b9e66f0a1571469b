"""What training adds to a student and export drops: projections into the teacher's space, and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distilclip.losses.features import Features

INITIAL_LOG_SCALE = math.log(1 / 0.07)


class Heads(nn.Module):
    """The loss-owned parameters of one run: optimised, synchronised and saved like the student's own.

    `image_projection` and `text_projection` are SPEC's P_v and P_c (identity where the widths agree, unless
    `always_project`); `fuse_image` and `fuse_text` are F_v and F_c of the augmented term; the log-scales start at
    log(1 / 0.07). The class centers W are not among them: they may be sharded (train.classhead).

    `others` are the heads for further teachers, `weights` the teachers' shares of every term (models.teacher).
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        always_project: bool = False,
        augmented: bool = False,
        other_dims: Sequence[int] = (),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        assert len(weights) == 1 + len(other_dims), "one weight for each teacher"
        self.weights = tuple(weight / sum(weights) for weight in weights)
        project = always_project or student_dim != teacher_dim
        self.image_projection = nn.Linear(student_dim, teacher_dim, bias=False) if project else nn.Identity()
        self.text_projection = nn.Linear(student_dim, teacher_dim, bias=False) if project else nn.Identity()
        self.fuse_image = nn.Linear(2 * teacher_dim, teacher_dim, bias=False) if augmented else None
        self.fuse_text = nn.Linear(2 * teacher_dim, teacher_dim, bias=False) if augmented else None
        self.instance_log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.interactive_log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.augmented_log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.others = nn.ModuleList(
            Heads(student_dim, dim, always_project=always_project, augmented=augmented) for dim in other_dims
        )

    def project(self, student: Features) -> Features:
        """The student's embeddings in the teacher's space: u_v = normalise(P_v e_s), u_c = normalise(P_c c_s)."""
        return Features(
            image=F.normalize(self.image_projection(student.image), dim=-1),
            text=F.normalize(self.text_projection(student.text), dim=-1),
            scale=student.scale,
        )

    def fuse(
        self, projected: Features, teacher: Features
    ) -> tuple[Float[Tensor, "n teacher_dim"], Float[Tensor, "n teacher_dim"]]:
        """f_v = normalise(F_v [u_v ; e_t]) and f_c likewise (CLIP-KD, augmented feature distillation)."""
        assert self.fuse_image is not None
        assert self.fuse_text is not None
        image = self.fuse_image(torch.cat([projected.image, teacher.image], dim=-1))
        text = self.fuse_text(torch.cat([projected.text, teacher.text], dim=-1))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def scale(self, term: str) -> Float[Tensor, ""]:
        """exp of a term's own log-scale."""
        log_scale: Tensor = getattr(self, f"{term}_log_scale")
        return log_scale.exp()

    def log_scales(self) -> list[nn.Parameter]:
        """The log-scales of all terms, for every teacher."""
        terms = ("instance", "interactive", "augmented")
        return [getattr(heads, f"{term}_log_scale") for heads in self.each() for term in terms]

    def each(self) -> list[Heads]:
        """These heads, and those of the other teachers."""
        return [self, *self.others]
