"""Train with distilclip's losses in a loop of your own, in one process or in several, and get the same model.

    python examples/python/ddp_losses.py --out one.pt
    torchrun --nproc-per-node 2 examples/python/ddp_losses.py --out two.pt

Every process embeds its own rows. `dc.rows_of_this_rank` tells the losses which rows these are, and they use the rows
of all processes as keys. Each process then has its part of the loss, and the sum of the parts is the loss.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distilclip as dc

BATCH_SIZE, NUM_STEPS = 16, 3


class Towers(nn.Module):
    """Two small towers and a learned scale; put your own here."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
        self.text = nn.Linear(12, 8)
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)

    def forward(self, pixels: Tensor, words: Tensor) -> dc.Features:
        """Unit embeddings, and the factor of their inner products."""
        image, text = F.normalize(self.image(pixels), dim=-1), F.normalize(self.text(words), dim=-1)
        return dc.Features(image, text, self.log_scale.exp())


def global_batch(step: int) -> tuple[Tensor, Tensor, dc.Features]:
    """Made-up pictures, captions and the embeddings of a teacher; a real loop has a DistributedSampler."""
    random = torch.Generator().manual_seed(step)
    pixels, words = torch.randn(BATCH_SIZE, 24, generator=random), torch.randn(BATCH_SIZE, 12, generator=random)
    teacher = F.normalize(torch.randn(2, BATCH_SIZE, 10, generator=random), dim=-1)
    return pixels, words, dc.Features(teacher[0], teacher[1], torch.tensor(50.0))


def main() -> None:
    """Train for a few steps and write the losses, the gradients of the first step, and the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="file to write")
    out = parser.parse_args().out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    towers = Towers()
    model = DistributedDataParallel(towers) if world > 1 else towers
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for step in range(NUM_STEPS):
        pixels, words, teacher = global_batch(step)
        here = slice(rank * BATCH_SIZE // world, (rank + 1) * BATCH_SIZE // world)
        taught = dc.Features(teacher.image[here], teacher.text[here], teacher.scale)
        student = model(pixels[here], words[here])
        # The four lines that matter. All processes need equally many rows: drop_last=True in a DataLoader.
        rows = dc.rows_of_this_rank(len(student))
        own = dc.losses.contrastive(student.image, student.text, scale=student.scale, rows=rows)
        part = own + dc.losses.relational(student, taught, rows=rows)
        (part * world).backward()  # DistributedDataParallel takes the mean over the processes; the sum is needed
        gradients = gradients or {name: value.grad.clone() for name, value in towers.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        loss = part.detach().clone()  # only to look at it: the sum of the parts
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
    if rank == 0:
        print(f"{world} process(es), losses: {', '.join(f'{loss:.6f}' for loss in losses)}")
        torch.save({"losses": losses, "gradients": gradients, "weights": towers.state_dict()}, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
