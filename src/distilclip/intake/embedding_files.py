"""Find the files of embeddings that other programs wrote, and what belongs together by their names.

Sources: mlfoundations/datacomp (baselines/apply_filter.py reads NAME.npz beside NAME.parquet), rom1504/clip-retrieval
(clip_inference/writer.py writes img_emb/, text_emb/ and metadata/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distilclip import files
from distilclip.errors import InputError
from distilclip.intake.foreign_vectors import VectorPlace, list_fragments, list_names

NONE = "none"
"""What stands for the name of an array or column where there is none."""
SIBLINGS = (("img", "txt"), ("img", "text"), ("image", "text"), ("images", "texts"))
"""How the names of the arrays of images and of their texts differ: `l14_img` and `l14_txt`."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingPart:
    """Embeddings of the same rows, of which one shard is made. `table` has their keys and captions, if they have any.

    `uri` is the file that the shard is said to be made from, where the pictures are not known.
    """

    image: VectorPlace
    text: VectorPlace | None
    table: VectorPlace | None
    uri: str

    def list_files(self) -> list[str]:
        """Return the files that hold the part, each once."""
        places = (self.image, self.text, self.table)
        return list(dict.fromkeys([*(place.file for place in places if place is not None), self.uri]))


@dataclass(frozen=True, kw_only=True)
class FileChoice:
    """Which files, and which arrays of them. `texts` and `tables` go with .npy files, one for each in their order.

    `image_column` and `text_column` name arrays of .npz files or columns of tables; None: what their names tell.
    """

    embeddings: Sequence[str]
    texts: Sequence[str] = ()
    tables: Sequence[str] = ()
    image_column: str | None = None
    text_column: str | None = None


def find_parts(choice: FileChoice) -> list[EmbeddingPart]:
    """Return the parts in the order of the patterns, those of a folder by name.

    Raises:
        InputError: nothing is found, files that belong together are not there, or names are not clear.
    """
    paths: list[str] = []
    for path in files.expand(choice.embeddings):
        is_folder = not path.lower().endswith(SUFFIXES) and files.is_folder(path)
        paths += _files_below(path) if is_folder else [path]
    paths = list(dict.fromkeys(paths))
    if (choice.texts or choice.tables) and not all(path.lower().endswith(".npy") for path in paths):
        raise InputError(f"--texts and --tables go with .npy files, and --embeddings has {paths[0]}: leave them out.")
    texts = _beside(choice.texts, paths, "--texts")
    tables = _beside(choice.tables, paths, "--tables")
    parts: list[EmbeddingPart] = []
    for number, path in enumerate(paths):
        suffix = path.rpartition(".")[2].lower()
        if suffix == "npy":
            text, table = texts[number], tables[number]
            if _is_of_clip_retrieval(path) and not (choice.texts or choice.tables):
                text, table = _of_clip_retrieval(path)
            parts.append(_npy_part(path, None if choice.text_column == NONE else text, table))
        elif suffix == "npz":
            parts.append(_npz_part(path, choice))
        elif suffix in ("parquet", "lance"):
            parts += _column_parts(path, choice)
        else:
            raise InputError(
                f"{path}: embeddings are read from .npz, .npy, .parquet and .lance, not .{suffix}. Name such files, or "
                "their folder."
            )
    if len({part.text is None for part in parts}) > 1:
        without = next(part for part in parts if part.text is None)
        raise InputError(
            f"{without.image} has no text embeddings, and other files have: give all of them, or "
            f"--text-column {NONE} to import the images alone."
        )
    return parts


SUFFIXES = (".npz", ".npy", ".parquet", ".lance")


def _files_below(folder: str) -> list[str]:
    """Return the files of embeddings in a folder: of clip-retrieval, or else .npz, .npy, or Parquet with vectors."""
    images = files.join(folder, "img_emb")
    if files.is_folder(images):
        found = [files.join(images, name) for name in sorted(files.file_sizes(images)) if name.endswith(".npy")]
        if found:
            return found
        raise InputError(f"{images} holds no .npy file. Check the path.")
    if files.is_folder(files.join(folder, "text_emb")):
        raise InputError(f"{folder} holds text embeddings (text_emb) and no img_emb: a store needs those of images.")
    names = [files.join(at, name) for at, below in files.walk(folder) for name in below]
    for suffix in (".npz", ".npy"):
        if found := [name for name in names if name.lower().endswith(suffix)]:
            return found
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if found := [name for name in tables if list_names(name)]:
        return found
    if tables:
        raise InputError(
            f"{folder} holds Parquet files without a column of vectors ({tables[0]} first) and no .npz beside them. "
            "DataComp's download_upstream.py fetches these with --download_npz."
        )
    raise InputError(f"{folder} holds no .npz, no .npy and no Parquet file, nor do its subfolders. Check the path.")


def _beside(patterns: Sequence[str], paths: Sequence[str], flag: str) -> list[str | None]:
    """Return the files of a flag, one for each path."""
    if not patterns:
        return [None] * len(paths)
    found = files.expand(patterns)
    if len(found) != len(paths):
        raise InputError(f"{flag} names {len(found)} files and --embeddings {len(paths)}: give one for each, in order.")
    return list(found)


def _is_of_clip_retrieval(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder.rpartition("/")[2] == "img_emb" and name.startswith("img_emb_")


def _of_clip_retrieval(path: str) -> tuple[str | None, str | None]:
    """Return the files of texts and of metadata that belong to img_emb/img_emb_0.npy; None for those that are not."""
    folder, _, name = path.rpartition("/")
    base, number = folder.removesuffix("img_emb").rstrip("/") or ".", name.removeprefix("img_emb_").removesuffix(".npy")
    text = files.join(base, "text_emb", f"text_emb_{number}.npy")
    table = files.join(base, "metadata", f"metadata_{number}.parquet")
    return text if files.exists(text) else None, table if files.exists(table) else None


def _npy_part(image: str, text: str | None, table: str | None) -> EmbeddingPart:
    return EmbeddingPart(
        image=VectorPlace(image),
        text=None if text is None else VectorPlace(text),
        table=None if table is None else VectorPlace(table),
        uri=table or image,
    )


def _npz_part(path: str, choice: FileChoice) -> EmbeddingPart:
    image, text = choose_names(list_names(path), choice, where=path)
    beside = f"{path[:-4]}.parquet"
    table = VectorPlace(beside) if files.exists(beside) else None
    return EmbeddingPart(
        image=VectorPlace(path, image),
        text=None if text is None else VectorPlace(path, text),
        table=table,
        uri=beside if table else path,
    )


def _column_parts(path: str, choice: FileChoice) -> list[EmbeddingPart]:
    """Return the part of a Parquet file, or those of the fragments of a Lance dataset."""
    image, text = choose_names(list_names(path), choice, where=path)
    return [
        EmbeddingPart(
            image=VectorPlace(path, image, fragment),
            text=None if text is None else VectorPlace(path, text, fragment),
            table=VectorPlace(path, "", fragment),
            uri=file,
        )
        for fragment, file in list_fragments(path)
    ]


def choose_names(names: Sequence[str], choice: FileChoice, *, where: str) -> tuple[str, str | None]:
    """Return the names of the image and the text embeddings among those that a file has.

    Raises:
        InputError: a name that was given is not there, or the names leave open which are meant.
    """
    known = f"it has {', '.join(names) or 'none'}"
    for flag, name in (("--image-column", choice.image_column), ("--text-column", choice.text_column)):
        if name is not None and name not in (*names, NONE):
            raise InputError(f"{where} has no vectors named {name!r} (from {flag}); {known}.")
    image, text = choice.image_column, choice.text_column
    if image == NONE:
        raise InputError("--image-column none: a store needs image embeddings.")
    if image is None:
        candidates = [name for name in names if any(word in name.lower() for word, _ in SIBLINGS)]
        if len(candidates) != 1:
            example = candidates[0] if candidates else "NAME"
            raise InputError(
                f"{where} does not tell which vectors are those of the images; {known}. Say which: --image-column "
                f"{example}, and --text-column."
            )
        image = candidates[0]
    if text is None:
        others = (image.replace(own, other) for own, other in SIBLINGS if own in image)
        text = next((name for name in others if name in names), None)
    return image, None if text == NONE else text
