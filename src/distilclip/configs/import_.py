"""State the options of `distilclip import`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilclip.data.limits import Side, check_bad_ratio
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip import`."""

    embeddings: tuple[str, ...]
    """folders or files of embeddings: DataComp's .npz beside .parquet, a folder of clip-retrieval (img_emb, text_emb,
    metadata), Parquet or Lance with columns of vectors, or .npy of images; braces, globs, URLs"""
    out: str
    """folder to write: the store, which all later stages read as one of `embed`"""
    teacher_name: str
    """name of the model that made the embeddings, as you call it"""
    teacher_digest: str
    """SHA-256 of its weights, as `embed` writes it into its result.json; or a text of yours that stands for this model
    alone: stores of the same digest are compared with each other"""
    teacher_scale: float | None = None
    """exp of the model's logit_scale (of OpenAI's models 100); only neg-clip-loss and train need it"""
    image_column: str | None = None
    """array of the .npz, or column of the table, that holds the image embeddings, such as l14_img (default: the only
    one whose name says so)"""
    text_column: str | None = None
    """likewise the text embeddings (default: named as the images', such as l14_txt); none: import the images alone"""
    texts: tuple[str, ...] = ()
    """with .npy files: those of the texts, one for each of the images', in their order"""
    tables: tuple[str, ...] = ()
    """with .npy files: Parquet with keys (key, uid, image_path) and captions (caption, text), one for each"""
    data: tuple[str, ...] = ()
    """the pairs themselves, where you have them (tars as for embed): the store is then of these files, and every sample
    gets its embedding by its key, or by the field uid of its json"""
    may_lack: tuple[Side, ...] = ()
    """what a row may lack without being unusable: caption or image, where its vector is not finite or zero"""
    on_error: Literal["raise", "skip"] = changeable("skip")
    """what to do with a row without a finite vector: skip it and write down the reason, or stop (raise)"""
    max_bad_ratio: float = changeable(0.05)
    """stop when more than this share of the rows is unusable"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if not self.embeddings:
            raise InputError("import needs --embeddings: a folder, or .npz, .npy, .parquet or .lance files.")
        for name in ("teacher_name", "teacher_digest"):
            if not getattr(self, name).strip():
                raise InputError(f"{name} is empty: say which model made the embeddings, since the files do not.")
        if self.teacher_scale is not None and not 0 < self.teacher_scale < float("inf"):
            raise InputError(f"teacher_scale is {self.teacher_scale}; it must be above 0, such as 100.")
        check_bad_ratio(self.max_bad_ratio)

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage: none."""
        return []
