"""List what the common architectures cost, so that a plan of them needs neither torch nor open_clip."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The multiplications and additions of a pair's forward pass, and the size of the model."""

    image_flops: float
    text_flops: float
    num_parameters: int
    dim: int

    @property
    def flops(self) -> float:
        """Return the arithmetic of both towers."""
        return self.image_flops + self.text_flops


# Forward passes of one image and one text (operations), number of parameters, width of the embeddings: as
# `flops.count_cost` counts them; a test compares.
KNOWN = {
    "RN50": (12222939136, 5960065024, 102007137, 1024),
    "RN101": (19542523904, 5959540736, 119688033, 512),
    "RN50x4": (42557214720, 9266247680, 178300601, 640),
    "RN50x16": (149390635008, 13299683328, 290979217, 768),
    "RN50x64": (529107009536, 23546740736, 623258305, 1024),
    "ViT-B-32": (8817623040, 5959540736, 151277313, 512),
    "ViT-B-32-quickgelu": (8817623040, 5959540736, 151277313, 512),
    "ViT-B-32-256": (11500032000, 5959540736, 151288833, 512),
    "ViT-B-16": (35126906880, 5959540736, 149620737, 512),
    "ViT-B-16-quickgelu": (35126906880, 5959540736, 149620737, 512),
    "ViT-B-16-plus-240": (54761168896, 9266247680, 208377345, 640),
    "ViT-L-14": (162025537536, 13299683328, 427616513, 768),
    "ViT-L-14-quickgelu": (162025537536, 13299683328, 427616513, 768),
    "ViT-L-14-336": (381919789056, 13299683328, 427944193, 768),
    "ViT-H-14": (334590279680, 47091384320, 986109441, 1024),
    "ViT-H-14-quickgelu": (334590279680, 47091384320, 986109441, 1024),
    "ViT-g-14": (534063050752, 47091384320, 1366678273, 1024),
    "ViT-bigG-14": (967496032256, 97863106560, 2539567105, 1280),
    "ViT-S-16": (9197291520, 3379562496, 62257537, 384),
    "ViT-S-32": (2285346816, 3379562496, 63085825, 384),
    "convnext_base_w": (40108949504, 9266247680, 179385345, 640),
    "convnext_large_d": (89763545088, 17732517888, 351772609, 768),
    "ViT-B-16-SigLIP": (35416584192, 11023810560, 203155970, 768),
    "ViT-L-16-SigLIP-256": (162559688704, 39059456000, 652150786, 1024),
    "ViT-SO400M-14-SigLIP": (220353896448, 13188759552, 877360306, 1152),
    "ViT-B-16-SigLIP2": (35416584192, 11023810560, 375187970, 768),
    "MobileCLIP-S1": (9335472128, 5959540736, 84969729, 512),
    "MobileCLIP-S2": (15692779520, 5959540736, 99243329, 512),
    "MobileCLIP-B": (35415920640, 5959540736, 149777153, 512),
}
