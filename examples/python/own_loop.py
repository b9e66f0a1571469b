"""Train an image tower of your own with one of distilclip's losses, in a loop of your own.

    python examples/python/own_loop.py --store STORE --out tower.pt

The teacher is a store of `distilclip embed`, so it never runs here. The tower learns to put each picture where the
teacher has put it. `ddp_losses.py` beside this file runs on several processes.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import distilclip as dc

SIZE = 32  # pixels on each side


class Tower(nn.Module):
    """Turn pictures into unit embeddings of the teacher's width; put your own network here."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, stride=4), nn.GELU(), nn.Conv2d(32, 64, 2, stride=2), nn.GELU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, dim)),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit rows."""
        return F.normalize(self.layers(pixels), dim=-1)


def read_pairs(store: dc.Store) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each usable picture of the store's tars with the teacher's embedding of it; put your data loader here."""
    for number, line in enumerate(store.shards):
        rows, embeddings = store.rows(number), store.image(number)
        row_of = {key: row for row, key in enumerate(rows.key) if rows.has_image[row]}
        with tarfile.open(line.uri) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "jpg" and key in row_of:
                    picture = Image.open(tar.extractfile(member)).convert("RGB").resize((SIZE, SIZE))
                    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
                    yield pixels, torch.from_numpy(embeddings[row_of[key]].astype(np.float32))


def main() -> None:
    """Train for some steps and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="folder of `distilclip embed`")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    store = dc.Store.open(given.store)
    pixels, taught = (torch.stack(column) for column in zip(*read_pairs(store), strict=True))
    tower = Tower(store.dim)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3)
    for step in range(given.num_steps):
        batch = torch.randint(len(pixels), (given.batch_size,))
        # The one line that matters. `dc.losses` has the others; those that see captions too take `dc.Features`.
        loss = dc.losses.one_feature(tower(pixels[batch]), taught[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == given.num_steps - 1:
            print(f"step {step}: {loss.item():.5f}")
    torch.save(tower.state_dict(), given.out)


if __name__ == "__main__":
    main()
