"""Stream batches of pairs for training, decoded and joined with their embeddings in loader processes.

A global batch is a pure function of (seed, step): it does not depend on the number of processes, ranks or restarts.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from distilclip.csv_rows import CsvColumns
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.crops import Augmentation, Crop
from distilclip.data.decode import decode_crop
from distilclip.data.embeddings import Embeddings
from distilclip.data.limits import MAX_PIXELS
from distilclip.data.pairs import (
    GroupRows,
    PairTable,
    WeighedPairs,
    assert_image,
    check_labels,
    find_parts,
    follow_store,
    index_pairs,
    join_groups,
    join_stores,
    weigh,
)
from distilclip.data.samples import BadSample, Sample, first_caption, judge_memory
from distilclip.data.shards import OpenShards, assert_key, find_shards
from distilclip.data.store import Store, StoredTeacher
from distilclip.data.views import Views, caption_in, view_in
from distilclip.data.workers import Tokenize, map_tasks
from distilclip.draws import Draws
from distilclip.errors import InputError
from distilclip.mixture import Weighting, read_parts

MAX_REPLACEMENTS = 16
TASK_ROWS = 256
"""Most rows of one task of a loader process, so that the shared memory for results does not grow with the batch."""
READ_AHEAD = 64  # samples under way at once: more than a disk's queue, fewer than the shards that stay open


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Which pairs to train on: those of shards, or those of the rows of stores.

    `data` are patterns of shards, with their weights where they are parts of a mixture, as in `cc3m/*.tar=0.7`. With
    stores they are needed only for a mixture, or where the shards have moved; then in the order in which they were
    embedded. `stores` are folders of `embed` over the same shards, by one teacher each; rows that all of them
    could use are shown. `groups` and `clusters` are a balance and a cluster folder of the first store. `columns` says
    of CSV files what their first lines do not tell; a store knows it. `weighting` says where the rows' weights are.
    With `captions` of-group a picture is shown with a caption of any row that it stands for in `groups`, in turn.
    """

    data: Sequence[str] = ()
    stores: Sequence[str] = ()
    groups: str | None = None
    clusters: str | None = None
    columns: CsvColumns | None = None
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    captions: Literal["own", "of-group"] = "own"


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """How a pair is shown to the models.

    Each picture is shown as one crop, at each of `sizes` (pixels per side): the student's, then a live teacher's. The
    crop is one of the stores' first `num_views` views, or, with `num_views` 0, drawn by `augmentation` from (`seed`,
    epoch, sample). `seed` also decides the order of the pairs. Pictures of more than `max_pixels` are unusable.
    `student_columns` are columns of a table, or fields of a sample's json, in whose texts the student reads what the
    teacher has read in the caption: of those that a row has, the next one in every epoch.
    """

    sizes: Sequence[int]
    tokenize: Tokenize
    seed: int
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    num_views: int = 0
    max_pixels: int = MAX_PIXELS
    student_columns: Sequence[str] = ()

    def generator(self, epoch: int, shard: int, row: int, *, repeat: int = 0, attempt: int = 0) -> np.random.Generator:
        """Return the random numbers of one sample in one epoch, the same in any batch, process or run."""
        again = [repeat] if repeat else []
        return np.random.Generator(np.random.PCG64([self.seed, epoch, shard, row, attempt, *again]))

    def show(
        self, image: bytes, views: Views | None, *, epoch: int, shard: int, row: int, where: str, repeat: int = 0
    ) -> list[UInt8[Tensor, "3 _ _"]]:
        """Return the crop of a picture at each of `sizes`: one of `views`, or drawn. Raises `BadSample`."""

        def draw(width: int, height: int) -> Crop:
            if views is None:
                return self.augmentation.draw(width, height, self.generator(epoch, shard, row, repeat=repeat))
            view = view_in(epoch + repeat, shard, row, num_views=self.num_views)
            return views.crop(width, height, shard=shard, row=row, view=view)

        with judge_memory(where):
            return decode_crop(image, self.sizes, draw=draw, max_pixels=self.max_pixels, where=where)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's n rows of a global batch.

    `pixels` are the student's, `teacher_pixels` the same crop at a live teacher's size; the models subtract their means
    on their own device. `ids` are sample ids. `teacher_image` and `teacher_text` hold the embeddings of every store
    that is joined, `labels` the clusters. `bad` lists, as (where, error), the samples in whose place other rows stand
    here. `has_image` and `has_text` are None where all rows have both; else a row that lacks its picture is black, one
    that lacks its caption has an empty one, and the embedding is zero. `captions` are the teacher's, `tokens` the
    student's.
    """

    ids: Int64[Tensor, " n"]
    pixels: UInt8[Tensor, "n 3 size size"]
    tokens: Int[Tensor, "n context"]
    captions: list[str]
    teacher_pixels: UInt8[Tensor, "n 3 other other"] | None = None
    teacher_image: tuple[Float[Tensor, "n _"], ...] = ()
    teacher_text: tuple[Float[Tensor, "n _"], ...] = ()
    labels: Int64[Tensor, " n"] | None = None
    has_image: Bool[Tensor, " n"] | None = None
    has_text: Bool[Tensor, " n"] | None = None
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to a GPU keeps no process waiting."""
        pinned: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned[name] = value.pin_memory()
            elif isinstance(value, tuple):
                pinned[name] = tuple(tensor.pin_memory() for tensor in value)
        return dataclasses.replace(self, **pinned)

    @classmethod
    def of_parts(cls, parts: Iterator[Batch], num_rows: int) -> Batch:
        """Join parts until they have `num_rows` rows; several are copied, each as it comes, into page-locked memory.

        So no more than one of them is held in the memory that loader processes share.
        """
        first = next(parts)
        if len(first) == num_rows:
            return first

        def allocate(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.new_empty(num_rows, *value.shape[1:], pin_memory=torch.cuda.is_available())
            if isinstance(value, tuple):
                return tuple(map(allocate, value))
            return [] if isinstance(value, list) else value

        def put(value: Any, into: Any, done: int) -> None:
            if isinstance(value, Tensor):
                into[done : done + len(value)] = value
            elif isinstance(value, tuple):
                for one, place in zip(value, into, strict=True):
                    put(one, place, done)
            elif isinstance(value, list):
                into += value

        whole = {name: allocate(value) for name, value in vars(first).items()}
        part, done = first, 0
        while True:
            for name, value in vars(part).items():
                put(value, whole[name], done)
            done += len(part)
            if done == num_rows:
                return cls(**whole)
            part = next(parts)


def open_stream(
    source: PairSource,
    presentation: Presentation,
    *,
    batch_size: int,
    policy: ErrorPolicy | None = None,
    rank: int = 0,
    world: int = 1,
) -> PairStream:
    """Open the stream of pairs.

    `batch_size` counts the rows of the global batch, a multiple of `world`. A sample that fails while training is
    counted by `policy` (default: at most 5 % may fail); a row drawn by (seed, epoch, sample) takes its place.

    Raises:
        InputError: shards, stores, groups, clusters and weights do not belong together, or hold fewer rows than a
            batch.
    """
    policy = policy or ErrorPolicy("skip")
    stores = [Store.open(store) for store in source.stores]
    parts = read_parts(source.data)
    uris: list[str] = []
    part: list[int] = []
    if parts:
        uris, part = find_parts(parts)
        uris, part = follow_store(uris, part, stores[0]) if stores else (uris, part)
    elif source.data:
        uris = find_shards(list(source.data))
    if stores:
        require_views(stores, presentation.num_views)
        table = join_stores(stores, data=uris, groups=source.groups, clusters=source.clusters)
    elif source.groups or source.clusters or presentation.num_views or source.captions != "own":
        raise InputError(
            "groups, clusters, views and captions of-group refer to the rows of a store: name the store too."
        )
    else:
        table = index_pairs(uris, policy=policy, columns=source.columns)
        policy.check(final=True)
    pairs = weigh(table, source.weighting, parts, part)
    if source.clusters is not None:
        check_labels(pairs.table, source.clusters)
    tellers = None
    if source.captions == "of-group":
        if source.groups is None:
            raise InputError("captions of-group needs groups, a folder of balance.")
        tellers = join_groups(pairs.table, stores, source.groups)
    loader = PairLoader(pairs, stores, presentation, tellers)
    return PairStream(loader, policy, batch_size=batch_size, rank=rank, world=world)


def require_views(stores: Sequence[StoredTeacher], num_views: int) -> None:
    """Raise `InputError` where a store or pack has too few views, or two have different ones."""
    if not num_views:
        return
    for store in stores:
        there = 0 if store.views is None else store.views.num
        if num_views > there:
            raise InputError(
                f"{store.path} has {there} views, not {num_views}: ask for that many, or embed with --views."
            )
        if store.views != stores[0].views:
            raise InputError(
                f"The views of {store.path} are not those of {stores[0].path}. Embed with the same --views, --seed, "
                "--min-crop and --flip."
            )


class Task(NamedTuple):
    """What a loader makes a batch of: rows in an epoch, how often it had each before; and the rows of its next task."""

    epoch: int
    rows: Int64[np.ndarray, " n"]
    repeats: Int64[np.ndarray, " n"]
    next_rows: Int64[np.ndarray, " m"] = np.empty(0, np.int64)


class Loader(Dataset, abc.ABC):
    """Makes batches of its rows, and says which of them an epoch has, and in which order."""

    presentation: Presentation

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Number of rows that are drawn."""

    @property
    @abc.abstractmethod
    def num_sides(self) -> dict[str, int]:
        """How many of the rows have both a picture and a caption, a picture, and a caption: as `Term.applies` asks."""

    @property
    def mixture(self) -> dict[str, Any]:
        """How rows are drawn, for the result; empty where all are drawn alike."""
        return {}

    @property
    def group_captions(self) -> dict[str, int]:
        """How many captions pictures are shown with, and the most for one; empty where each is with its own."""
        return {}

    @abc.abstractmethod
    def draw(self, epoch: int, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return the rows at places `start` to `stop` of an epoch, and how many places before each have the same."""

    @abc.abstractmethod
    def load(self, task: Task) -> Batch:
        """Return the batch of a task. Raises `InputError`."""

    def __getitem__(self, task: Task) -> Batch | InputError:
        """Return the batch of a task, or an `InputError`: raised here, it would lose its type."""
        try:
            return self.load(task)
        except InputError as error:
            return error


class PairStream:
    """An endless stream of batches; see `open_stream`. `policy` counts what could not be used.

    Each epoch is a fresh permutation of as many draws as there are rows, cut into global batches. Every row is drawn
    once, or as often as its weight says. Draws that fill no batch are left out of the epoch.
    """

    def __init__(self, loader: Loader, policy: ErrorPolicy, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise InputError(f"batch_size {batch_size} does not divide among {world} processes; choose a multiple.")
        if loader.num_rows < batch_size:
            raise InputError(
                f"There are {loader.num_rows} usable pairs, fewer than one batch of {batch_size}. Lower batch_size."
            )
        if loader.presentation.seed < 0:
            raise InputError(f"seed is {loader.presentation.seed}; it must not be negative.")
        self.loader, self.policy = loader, policy
        self.batch_size, self.rank, self.world = batch_size, rank, world

    @property
    def num_rows(self) -> int:
        """Number of rows that batches are drawn from."""
        return self.loader.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Number of full global batches in an epoch."""
        return self.num_rows // self.batch_size

    def rows_at(self, step: int) -> tuple[int, Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return the epoch of a step, which rows of the loader this rank has in its batch, and each one's repeat.

        That is how often the epoch has the same row besides, in places that count as earlier: 0 without weights.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        local = self.batch_size // self.world
        start = batch * self.batch_size + self.rank * local
        return epoch, *self.loader.draw(epoch, start, start + local)

    def batches(self, *, start: int = 0, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop`, the same for any `num_workers` (0 decodes in this process).

        Raises:
            InputError: a shard is not the one that was embedded, or more samples fail than the policy allows.
        """
        local = self.batch_size // self.world
        tasks = self._tasks(range(start, stop), ahead=max(1, num_workers))
        parts = map_tasks(self.loader, tasks, num_workers=num_workers, pinned=local <= TASK_ROWS)
        for _ in range(start, stop):
            batch = Batch.of_parts(parts, local)
            self.policy.seen(len(batch))
            for where, error in batch.bad:
                self.policy.bad(error, where=where)
            self.policy.check()
            yield batch

    def _tasks(self, steps: range, *, ahead: int) -> Iterator[Task]:
        """Yield what `rows_at` says of the steps in tasks of at most `TASK_ROWS` rows, nearly alike in size.

        Loader processes get tasks in turn, so that who has one now gets the one `ahead` of it next.
        """
        coming: deque[Task] = deque()
        for step in steps:
            epoch, rows, repeats = self.rows_at(step)
            num_tasks = -(-len(rows) // TASK_ROWS)
            for part in zip(np.array_split(rows, num_tasks), np.array_split(repeats, num_tasks), strict=True):
                coming.append(Task(epoch, *part))
                if len(coming) > ahead:
                    yield coming.popleft()._replace(next_rows=coming[-1].rows)
        yield from coming


@dataclass(frozen=True)
class _ShownPair:
    """A row as it stands in a batch: its caption, one of `num_captions`, and its crop at every size asked for.

    `teller` is the row of the table of captions that the caption is from.
    """

    index: int
    teller: int
    caption: str
    student_caption: str
    pixels: list[UInt8[Tensor, "3 _ _"]]
    view: int
    caption_number: int
    num_captions: int


class PairLoader(Loader):
    """Maps (epoch, rows of the table, repeats) to their batch. Picklable; opens files in the process that reads them.

    A row that an epoch has several times shows another crop, or the next view and caption, each time. With `tellers` a
    picture's captions are those of the rows that it stands for.
    """

    def __init__(
        self,
        pairs: WeighedPairs,
        stores: Sequence[Store],
        presentation: Presentation,
        tellers: GroupRows | None = None,
    ) -> None:
        self.table, self.parts, self.presentation = pairs.table, pairs.parts, presentation
        self.tellers = tellers
        self.texts = self.table if tellers is None else tellers.table
        has = self.table.has_image  # of one pixel each, where no row has a picture
        self._blank_sizes = presentation.sizes if has is None or has.any() else [1] * len(presentation.sizes)
        self.is_weighed = pairs.weights is not None
        self.draws = Draws(len(self.table)) if pairs.weights is None else Draws.of_weights(pairs.weights)
        self.embeddings = [Embeddings(store) for store in stores]
        self.views = stores[0].views if presentation.num_views else None
        self._shards = OpenShards(columns=self.table.columns)
        self._latest: tuple[int, Int64[np.ndarray, " rows"], int] = -1, np.empty(0, np.int64), 0

    @property
    def num_rows(self) -> int:
        """Number of rows that are drawn."""
        return len(self.table)

    @property
    def num_sides(self) -> dict[str, int]:
        """How many of the rows have both a picture and a caption, a picture, and a caption: as `Term.applies` asks."""
        has_image, has_text, tellers = self.table.has_image, self.texts.has_text, self.tellers
        if has_text is not None and tellers is not None:  # any of the captions of a row's group
            has_text = np.logical_or.reduceat(has_text, tellers.first[:-1])
        if has_image is None and has_text is None:
            return dict.fromkeys(("num_pairs", "num_images", "num_texts"), self.num_rows)
        everywhere = np.ones(self.num_rows, bool)
        has_image, has_text = (everywhere if has is None else has for has in (has_image, has_text))
        counted = {"num_pairs": has_image & has_text, "num_images": has_image, "num_texts": has_text}
        return {name: int(has.sum()) for name, has in counted.items()}

    @property
    def mixture(self) -> dict[str, Any]:
        """How rows are drawn, for the result; empty where all are drawn alike.

        `parts` of a mixture as in `WeighedPairs`; `effective_rows`, how many rows of equal weight vary as little;
        `most_often`, the draws of the row of the largest weight in an epoch.
        """
        if not self.is_weighed:
            return {}
        parts, draws = list(self.parts), self.draws
        counts = {"effective_rows": draws.effective_rows, "most_often": draws.most_often}
        return {"parts": parts, **counts} if parts else counts

    @property
    def group_captions(self) -> dict[str, int]:
        """How many captions pictures are shown with, and the most for one; empty where each is with its own."""
        tellers = self.tellers
        if tellers is None:
            return {}
        return {"num_captions": len(tellers.table), "most_for_a_picture": int(np.diff(tellers.first).max())}

    def draw(self, epoch: int, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return the rows at places `start` to `stop` of an epoch, and how many places before each have the same."""
        if self._latest[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.presentation.seed, epoch]))
            places = generator.permutation(self.num_rows)
            self._latest = epoch, places, int(generator.integers(self.draws.length))
        _, places, shift = self._latest
        return self.draws.rows(places[start:stop], shift)

    def load(self, task: Task) -> Batch:
        """Return the batch of a task. Raises `InputError`."""
        epoch, wanted, repeats, _ = task
        bad: list[tuple[str, str]] = []
        turns = (epoch + repeats).tolist()
        ahead = zip(self._read_ahead(wanted, turns), repeats.tolist(), strict=True)
        drawn = [self._draw_usable(epoch, index, repeat, bad) for index, repeat in ahead]
        rows, tellers = (np.array([getattr(sample, name) for sample in drawn]) for name in ("index", "teller"))
        captions = [sample.caption for sample in drawn]
        pixels = [torch.stack(of_one_size) for of_one_size in zip(*(sample.pixels for sample in drawn), strict=True)]
        view = caption = None
        if self.views is not None:
            view = np.array([sample.view for sample in drawn])
            caption = np.array([sample.caption_number for sample in drawn])
            self._check_captions(tellers, np.array([sample.num_captions for sample in drawn]))
        shard, row = self.table.shard[rows], self.table.row[rows]
        text_shard, text_row = self.texts.shard[tellers], self.texts.row[tellers]
        has_image, has_text = _sides_of(self.table.has_image, rows), _sides_of(self.texts.has_text, tellers)
        sides = {}
        if has_image is not None or has_text is not None:
            everywhere = np.ones(len(rows), bool)
            sides = {"has_image": everywhere if has_image is None else has_image}
            sides["has_text"] = everywhere if has_text is None else has_text
        return Batch(
            ids=torch.from_numpy(self.table.ids(rows).astype(np.int64)),
            pixels=pixels[0],
            teacher_pixels=pixels[1] if len(pixels) > 1 else None,
            tokens=self.presentation.tokenize([sample.student_caption for sample in drawn]),
            captions=captions,
            teacher_image=tuple(each.images(shard, row, view, there=has_image) for each in self.embeddings),
            teacher_text=tuple(each.texts(text_shard, text_row, caption, there=has_text) for each in self.embeddings),
            labels=None if self.table.cluster is None else torch.from_numpy(self.table.cluster[rows].astype(np.int64)),
            **{name: torch.from_numpy(has) for name, has in sides.items()},
            bad=bad,
        )

    def _read_ahead(self, rows: Int64[np.ndarray, " n"], turns: Sequence[int]) -> Iterator[int]:
        """Yield the rows; the bytes of each are asked for `READ_AHEAD` rows before its turn."""
        for place in range(len(rows) + READ_AHEAD):
            if place < len(rows):
                index = int(rows[place])
                self._prefetch(self.table, index)
                if self.tellers is not None:
                    self._prefetch(self.texts, self._teller(index, turns[place])[0])
            if place >= READ_AHEAD:
                yield int(rows[place - READ_AHEAD])

    def _prefetch(self, table: PairTable, index: int) -> None:
        shard = self._shards[table.uris[int(table.shard[index])]]
        shard.prefetch(int(table.offset[index]), int(table.size[index]))

    def _teller(self, index: int, turn: int) -> tuple[int, int]:
        """Return the row of the table of captions that tells a picture's caption, and the turn of that row's own.

        The rows that a picture stands for tell in turn; each one's captions follow once all have told one.
        """
        if self.tellers is None:
            return index, turn
        first, after = self.tellers.first[index : index + 2].tolist()
        shard, row, shown = int(self.table.shard[index]), int(self.table.row[index]), self.presentation
        views = max(1, shown.num_views)
        told = caption_in(turn, shard, row + shown.seed, num_views=views, num_captions=after - first)
        return first + told, turn // (after - first)

    def _draw_usable(self, epoch: int, index: int, repeat: int, bad: list[tuple[str, str]]) -> _ShownPair:
        """Return a row as it is shown, or, where it cannot be used, another row drawn by (seed, epoch, row)."""
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return self._draw(epoch, index, repeat)
            except BadSample as error:
                bad.append((error.where, error.error))
                index = self.draws.draw_one(self._generator(epoch, index, repeat, attempt))
        raise InputError(
            f"{MAX_REPLACEMENTS} samples drawn in a row cannot be used, the last {bad[-1][0]}: {bad[-1][1]}. "
            "Check the data with `distilclip embed`; pictures or captions alone need a --store, made with --may-lack."
        )

    def _draw(self, epoch: int, index: int, repeat: int) -> _ShownPair:
        shown = self.presentation
        shard, row = int(self.table.shard[index]), int(self.table.row[index])
        sample, where = self._read(self.table, index)
        teller, turn = self._teller(index, epoch + repeat)
        telling = sample, where
        if self.tellers is not None and self.texts.ids(np.array([teller])) != self.table.ids(np.array([index])):
            telling = self._read(self.texts, teller)
        has_image = self.table.has_image is None or bool(self.table.has_image[index])
        has_text = self.texts.has_text is None or bool(self.texts.has_text[teller])
        if has_text and not telling[0].caption:
            raise BadSample("no caption", where=telling[1])
        if has_image and sample.image is None:
            raise BadSample("no image", where=where)
        captions, view, number = [telling[0].caption or ""], 0, 0
        if self.views is not None:
            view = view_in(epoch + repeat, shard, row, num_views=shown.num_views)
            captions = telling[0].captions or captions
            place = int(self.texts.shard[teller]), int(self.texts.row[teller])
            number = caption_in(turn, *place, num_views=shown.num_views, num_captions=len(captions))
        student_caption = captions[number]
        if has_text and shown.student_columns:
            student_caption = _text_for_student(telling[0], shown.student_columns, turn + row, where=telling[1])
        if has_image and sample.image is not None:
            place_in = {"epoch": epoch, "repeat": repeat, "shard": shard, "row": row}
            pixels = shown.show(sample.image, self.views, where=where, **place_in)
        else:
            pixels = [torch.zeros(3, size, size, dtype=torch.uint8) for size in self._blank_sizes]
        return _ShownPair(index, teller, captions[number], student_caption, pixels, view, number, len(captions))

    def _read(self, table: PairTable, index: int) -> tuple[Sample, str]:
        """Read a row's sample and say where it lies. Raises `InputError` where it is not the one that was embedded."""
        uri, row = table.uris[int(table.shard[index])], int(table.row[index])
        sample = self._shards[uri].read(int(table.offset[index]), int(table.size[index]))
        assert_key(sample.key, table.key[index].as_py(), uri=uri, row=row)
        where, digests = f"{uri}: {sample.key}", table.image_digest
        if digests is not None:
            assert_image(sample.image, int(digests[index]), where=where)
        return sample, where

    def _check_captions(self, tellers: Int64[np.ndarray, " n"], num_captions: Int64[np.ndarray, " n"]) -> None:
        """Raise `InputError` where a sample has more or fewer captions than the store."""
        shard, row = self.texts.shard[tellers], self.texts.row[tellers]
        other = np.flatnonzero(num_captions != self.embeddings[0].num_captions(shard, row))
        if len(other):
            first = other[0]
            raise InputError(
                f"{self.texts.uris[int(shard[first])]}: {self.texts.key[tellers[first]]} has other captions than when "
                "it was embedded. Embed the data again."
            )

    def _generator(self, epoch: int, index: int, repeat: int, attempt: int = 0) -> np.random.Generator:
        """Return the random numbers of one sample in one epoch, the same in any batch, process or run."""
        shard, row = int(self.table.shard[index]), int(self.table.row[index])
        return self.presentation.generator(epoch, shard, row, repeat=repeat, attempt=attempt)


def _sides_of(has: Bool[np.ndarray, " n"] | None, rows: Int64[np.ndarray, " m"]) -> Bool[np.ndarray, " m"] | None:
    return None if has is None else has[rows]


def _text_for_student(sample: Sample, columns: Sequence[str], turn: int, *, where: str) -> str:
    """Return the text that the student reads; of several columns the one whose turn it is. `BadSample` for none."""
    found = (first_caption(sample.meta.get(name), where=where) for name in columns)
    texts = [text for text in found if text is not None]
    if not texts:
        raise BadSample("no caption", detail=f"nothing for the student in {', '.join(columns)}", where=where)
    return texts[turn % len(texts)]
