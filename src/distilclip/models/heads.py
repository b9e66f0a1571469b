"""Hold what training adds to a student and export drops: projections into the teacher's space, and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distilclip.losses.features import Features, RankRows, Sides
from distilclip.methods import TERMS

INITIAL_LOG_SCALE = math.log(1 / 0.07)


class Queue(nn.Module):
    """The teacher's embeddings of the last rows that were trained on, the same on every process.

    They never go stale, as those of a moving teacher would: the teacher is fixed.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        for side in ("image", "text"):
            self.register_buffer(side, torch.zeros(length, dim))
            self.register_buffer(f"num_{side}", torch.zeros((), dtype=torch.long))

    def rows(self, side: str) -> Float[Tensor, "k dim"]:
        """Return what is in the queue of a side, `image` or `text`: none before the first batch."""
        return self.get_buffer(side)[: int(self.get_buffer(f"num_{side}"))]  # a slice ends at the queue's length

    def push(self, side: str, rows: Float[Tensor, "m dim"]) -> None:
        """Put the rows of a global batch in place of the oldest ones."""
        kept, number = self.get_buffer(side), self.get_buffer(f"num_{side}")
        start = int(number)
        places = torch.arange(start, start + len(rows), device=kept.device)[-len(kept) :]
        kept[places % len(kept)] = rows[-len(kept) :].to(kept)
        number += len(rows)


class Heads(nn.Module):
    """The loss-owned parameters of one run: optimised, synchronised and saved like the student's own.

    `image_projection` and `text_projection` are SPEC's P_v and P_c (identity where the widths agree); `fuse_image` and
    `fuse_text` are F_v and F_c of a term that needs fusion; every term that needs a scale has a log-scale, which starts
    at log(1 / 0.07). `queue` holds the teacher's embeddings of the batches before, for a term that needs them:
    `remember` adds those of a step. The class centers W are not among them: they may be sharded (train.class_head).

    `others` are the heads for further teachers, `weights` the teachers' shares of every term (models.teacher).
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        augmented: bool = False,
        queue_length: int = 0,
        other_dims: Sequence[int] = (),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        assert len(weights) == 1 + len(other_dims), "one weight for each teacher"
        self.weights = tuple(weight / sum(weights) for weight in weights)
        project = student_dim != teacher_dim
        self.image_projection = nn.Linear(student_dim, teacher_dim, bias=False) if project else nn.Identity()
        self.text_projection = nn.Linear(student_dim, teacher_dim, bias=False) if project else nn.Identity()
        self.fuse_image = nn.Linear(2 * teacher_dim, teacher_dim, bias=False) if augmented else None
        self.fuse_text = nn.Linear(2 * teacher_dim, teacher_dim, bias=False) if augmented else None
        self.queue = Queue(queue_length, teacher_dim) if queue_length else None
        self._scaled = [term.name for term in TERMS.values() if "scale" in term.needs]
        for name in self._scaled:
            self.register_parameter(f"{name}_log_scale", nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)))
        self.others = nn.ModuleList(
            Heads(student_dim, dim, augmented=augmented, queue_length=queue_length) for dim in other_dims
        )

    def project(self, student: Features) -> Features:
        """Bring the student's embeddings to the teacher's space: u_v = normalise(P_v e_s), u_c = normalise(P_c c_s)."""
        return Features(
            image=F.normalize(self.image_projection(student.image), dim=-1),
            text=F.normalize(self.text_projection(student.text), dim=-1),
            scale=student.scale,
        )

    def fuse(
        self, projected: Features, teacher: Features
    ) -> tuple[Float[Tensor, "n teacher_dim"], Float[Tensor, "n teacher_dim"]]:
        """Fuse both models' embeddings: f_v = normalise(F_v [u_v ; e_t]), f_c likewise (CLIP-KD's augmented term)."""
        assert self.fuse_image is not None
        assert self.fuse_text is not None
        image = self.fuse_image(torch.cat([projected.image, teacher.image], dim=-1))
        text = self.fuse_text(torch.cat([projected.text, teacher.text], dim=-1))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def queued(self, side: str) -> Float[Tensor, "k dim"]:
        """Return the teacher's embeddings of one side of the batches before."""
        assert self.queue is not None
        return self.queue.rows(side)

    @torch.no_grad()
    def remember(self, teachers: Sequence[Features], rows: RankRows, sides: Sides | None) -> None:
        """Put the teachers' embeddings of a global batch into their queues; every process must call it."""
        for heads, teacher in zip(self.each(), teachers, strict=False):
            if heads.queue is not None:
                for side in ("image", "text"):
                    own = getattr(teacher, side)
                    part = None if sides is None else getattr(sides, side)
                    whole = rows.all(own) if part is None else part.rows.all(own[part.mine])
                    heads.queue.push(side, whole)

    def scale(self, term: str) -> Float[Tensor, ""]:
        """Return exp of a term's own log-scale."""
        return self.get_parameter(f"{term}_log_scale").exp()

    def log_scales(self) -> list[nn.Parameter]:
        """Return the log-scales of all terms, for every teacher."""
        return [heads.get_parameter(f"{name}_log_scale") for heads in self.each() for name in heads._scaled]

    def each(self) -> list[Heads]:
        """Return these heads, and those of the other teachers."""
        return [self, *self.others]
