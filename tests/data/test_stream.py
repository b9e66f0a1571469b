from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.crops import Augmentation
from distilclip.data.shards import OpenShards
from distilclip.data.side_files import Groups, read_groups, write_groups
from distilclip.data.store import Store, sample_id
from distilclip.data.stream import Batch, PairSource, PairStream, Presentation, Task, open_stream
from distilclip.errors import InputError
from tests.conftest import encoded, picture, write_tar
from tests.data.conftest import embedding, tokenize, write_store

PairTars = Callable[..., list[str]]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core


def stream(batch_size: int = 4, **options: Any) -> PairStream:
    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    stores = [options.pop("store")] if "store" in options else options.pop("stores", [])
    source = PairSource(stores=stores, **take("data", "groups", "clusters"))
    fixed = {"sizes": [8], "augmentation": Augmentation(min_crop=0.3), "tokenize": tokenize, "seed": 5}
    shown = Presentation(**{**fixed, **take("sizes", "seed", "num_views", "max_pixels")})  # type: ignore[arg-type]
    policy = ErrorPolicy(options.pop("on_error", "skip"), **take("max_bad_ratio"))
    return open_stream(source, shown, batch_size=batch_size, policy=policy, **options)


def tensors(value: object) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, tuple) else []


def same(a: Batch, b: Batch) -> bool:
    return all(
        all(torch.equal(x, y) for x, y in zip(tensors(value), tensors(getattr(b, name)), strict=True))
        if tensors(value)
        else value == getattr(b, name)
        for name, value in vars(a).items()
    )


def test_a_batch_joins_pixels_tokens_teacher_and_label_by_key(joined: dict[str, str]) -> None:
    store = Store.open(joined["store"])
    for batch in stream(**joined).batches(stop=3):
        for i, identity in enumerate(batch.ids.tolist()):
            shard, row = divmod(identity, 2**32)
            key = store.rows(shard).key[row]
            assert batch.captions[i] == f"picture number {int(key)}"
            assert batch.tokens[i].tolist() == tokenize([batch.captions[i]])[0].tolist()
            assert batch.labels is not None
            assert batch.labels[i] == int(key)
            assert np.array_equal(batch.teacher_image[0][i].numpy(), embedding(key).astype(np.float32))
            assert np.array_equal(batch.teacher_text[0][i].numpy(), -embedding(key).astype(np.float32))
            mean = np.asarray(picture(int(key))).mean((0, 1))
            assert np.abs(batch.pixels[i].double().mean((1, 2)).numpy() - mean).max() < 80  # a crop of it


def test_a_batch_of_many_tasks_is_that_of_one(joined: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(stream(batch_size=7, **joined).batches(stop=3))
    monkeypatch.setattr("distilclip.data.stream.TASK_ROWS", 3)
    opened = stream(batch_size=7, **joined)
    assert [len(rows) for _, rows, _, _ in opened._tasks(range(1, 2), ahead=1)] == [3, 2, 2]
    for num_workers in (0, 2):
        found = list(opened.batches(stop=3, num_workers=num_workers))
        assert len(found) == len(expected)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_an_epoch_shows_every_kept_valid_row_once(joined: dict[str, str]) -> None:
    opened = stream(batch_size=5, **joined)
    assert opened.num_rows == 3 * (7 - 2)  # without the unusable row and the one that is not kept
    assert opened.steps_per_epoch == 3
    ids = [identity for batch in opened.batches(stop=3) for identity in batch.ids.tolist()]
    expected = {int(sample_id(shard, row)) for shard in range(3) for row in (1, 3, 4, 5, 6)}
    assert set(ids) == expected
    assert len(ids) == len(expected)
    second = [identity for batch in opened.batches(start=3, stop=6) for identity in batch.ids.tolist()]
    assert set(second) == expected
    assert second != ids


def test_the_batch_does_not_depend_on_workers(joined: dict[str, str]) -> None:
    here = list(stream(**joined).batches(stop=7))
    for num_workers in (1, 2):
        there = list(stream(**joined).batches(stop=7, num_workers=num_workers))
        assert len(there) == 7
        assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_ranks_share_out_the_global_batch(joined: dict[str, str]) -> None:
    whole = list(stream(**joined).batches(stop=6))
    ranks = [list(stream(rank=rank, world=2, **joined).batches(stop=6)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name in ("ids", "pixels", "tokens", "teacher_image", "labels"):
            parts = [
                torch.cat(part) for part in zip(*(tensors(getattr(rank[step], name)) for rank in ranks), strict=True)
            ]
            assert parts
            assert all(torch.equal(*both) for both in zip(parts, tensors(getattr(batch, name)), strict=True)), name


def test_a_stream_resumes_at_any_step(joined: dict[str, str]) -> None:
    whole = list(stream(**joined).batches(stop=9))
    for start in (1, 4, 8):
        assert all(
            same(a, b) for a, b in zip(whole[start:], stream(**joined).batches(start=start, stop=9), strict=True)
        )


def test_the_seed_decides_order_and_views(joined: dict[str, str]) -> None:
    first, again, other = (next(stream(**joined, seed=seed).batches(stop=1)) for seed in (1, 1, 2))
    assert same(first, again)
    assert not torch.equal(first.ids, other.ids)


def test_a_crop_is_drawn_anew_every_epoch_and_shown_at_every_size(joined: dict[str, str]) -> None:
    shown: dict[int, list[torch.Tensor]] = {}
    for batch in stream(batch_size=15, sizes=[8, 16], **joined).batches(stop=2):
        assert batch.teacher_pixels is not None
        assert (batch.pixels.shape, batch.teacher_pixels.shape) == ((15, 3, 8, 8), (15, 3, 16, 16))
        halved = torch.nn.functional.avg_pool2d(batch.teacher_pixels.float(), 2)
        assert (halved - batch.pixels).abs().mean() < 10
        for identity, pixels in zip(batch.ids.tolist(), batch.pixels, strict=True):
            shown.setdefault(identity, []).append(pixels)
    assert all(not torch.equal(*pair) for pair in shown.values())


def test_the_stream_leaves_the_global_random_state_alone(joined: dict[str, str]) -> None:
    state = torch.random.get_rng_state()
    list(stream(**joined).batches(stop=2, num_workers=1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_plain_tars_need_no_store(pair_tars: PairTars) -> None:
    opened = stream(data=pair_tars(shards=2, rows=4), batch_size=8)
    batch = next(opened.batches(stop=1))
    assert sorted(batch.captions) == [f"picture number {i}" for i in range(8)]
    assert batch.teacher_image == ()
    assert batch.labels is None


def test_remote_tars_and_store(pair_tars: PairTars) -> None:
    memory = fsspec.filesystem("memory")
    uris = []
    for number, path in enumerate(pair_tars(shards=2, rows=4)):
        uris.append(f"memory://stream/{number}.tar")
        memory.put(path, uris[-1])
    write_store("memory://stream/store", uris)
    batches = [list(stream(store="memory://stream/store").batches(stop=2, num_workers=n)) for n in (0, 1)]
    assert all(same(a, b) for a, b in zip(*batches, strict=True))


def bad_tar(tmp_path: Path, num_good: int = 30) -> str:
    members = []
    for row in range(num_good + 3):
        image, caption = encoded(picture(row)), f"picture {row}".encode()
        if row == 3:
            image = image[: len(image) // 2]
        if row == 5:
            caption = b""
        members += [(f"{row}.jpg", image), (f"{row}.txt", caption)]
    members += [("3.jpg", image)]  # a duplicate key, which the index knows of
    return write_tar(tmp_path / "bad.tar", members)


def test_a_bad_sample_is_replaced_the_same_way_everywhere_and_counted(tmp_path: Path) -> None:
    options = {"data": [bad_tar(tmp_path)], "batch_size": 11, "max_bad_ratio": 0.2}
    opened = stream(**options)
    batches = list(opened.batches(stop=6))
    assert opened.policy.reasons == {"truncated image": 2, "no caption": 2, "duplicate key": 1}
    assert opened.policy.num_seen == 34 + 66
    assert all(len(batch) == 11 for batch in batches)
    shown = {identity for batch in batches for identity in batch.ids.tolist()}
    assert not shown & {3, 5}
    for num_workers, world in ((2, 1), (0, 11)):
        ranks = [
            list(stream(rank=rank, world=world, **options).batches(stop=6, num_workers=num_workers))
            for rank in range(world)
        ]
        for step, batch in enumerate(batches):
            assert torch.equal(torch.cat([rank[step].pixels for rank in ranks]), batch.pixels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_on_error_raise_names_the_sample(tmp_path: Path, num_workers: int) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"no image"), ("0.txt", b"words")])
    opened = stream(data=[path], on_error="raise", batch_size=1)
    with pytest.raises(
        InputError, match=r"16 samples drawn in a row cannot be used, the last .*a\.tar: 0: not an image"
    ):
        next(opened.batches(stop=1, num_workers=num_workers))
    members = [("0.jpg", b"no image"), ("0.txt", b"words"), ("1.jpg", encoded(picture(1))), ("1.txt", b"words")]
    opened = stream(data=[write_tar(tmp_path / "b.tar", members)], on_error="raise", batch_size=2)
    with pytest.raises(InputError, match=r"b\.tar: 0: not an image\..*--on-error skip"):
        next(opened.batches(stop=1, num_workers=num_workers))


def test_too_many_bad_entries_stop_at_open(tmp_path: Path) -> None:
    members = [("0.txt", b"words"), ("1.jpg", encoded(picture(1))), ("1.txt", b"words")]
    with pytest.raises(InputError, match=r"1 of 2 samples cannot be used.*no image \(1\)"):
        stream(data=[write_tar(tmp_path / "a.tar", members)], batch_size=1)


def test_a_store_made_for_other_tars_fails_at_open(tmp_path: Path, pair_tars: PairTars) -> None:
    uris = pair_tars(shards=2, rows=4)
    store = str(tmp_path / "store")
    write_store(store, uris)
    with pytest.raises(InputError, match=r"The data are 1 files, but the store .* was made from 2"):
        stream(store=store, data=uris[:1])
    with pytest.raises(InputError, match=r"00001\.tar, row 0: the key is '00004' where the store has '00000'"):
        stream(store=store, data=uris[::-1])
    write_tar(Path(uris[1]), [("x.jpg", b"1")])
    with pytest.raises(InputError, match=r"00001\.tar has 10240 bytes, 20480 when"):
        stream(store=store)
    os.remove(uris[0])
    with pytest.raises(InputError, match=r"00000\.tar is missing.*--data"):
        stream(store=store)


def test_tars_that_moved_are_found_by_data(tmp_path: Path, pair_tars: PairTars) -> None:
    uris = pair_tars(shards=2, rows=4)
    store = str(tmp_path / "store")
    write_store(store, uris)
    before = next(stream(store=store).batches(stop=1))
    moved = [str(Path(uri).rename(tmp_path / f"moved-{number}.tar")) for number, uri in enumerate(uris)]
    assert same(before, next(stream(store=store, data=moved).batches(stop=1)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_key_deep_in_a_tar_is_never_joined(tmp_path: Path, num_workers: int) -> None:
    members = [(f"{row}.{kind}", content) for row in range(4) for kind, content in (("jpg", b"0" * 9), ("txt", b"a"))]
    path = write_tar(tmp_path / "a.tar", members)
    write_store(str(tmp_path / "store"), [path])
    write_tar(Path(path), [(name.replace("2.", "7."), content) for name, content in members])
    os.utime(path, (0, 0))  # what was written again since is found at once, by its SHA-256
    opened = stream(store=str(tmp_path / "store"), max_bad_ratio=1.0)
    with pytest.raises(InputError, match=r"a\.tar, row 2: the key is '7' where the store has '2'.*embed it again"):
        list(opened.batches(stop=1, num_workers=num_workers))


def test_a_stream_opens_without_whole_row_tables(joined: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "rows", lambda store, shard: pytest.fail("digests and reasons are read for nothing"))
    opened = stream(**joined)
    assert opened.loader.table.key.to_pylist() == [
        f"{7 * shard + row:05d}" for shard in range(3) for row in (1, 3, 4, 5, 6)
    ]


def test_groups_and_clusters_of_another_store_are_refused(tmp_path: Path, joined: dict[str, str]) -> None:
    groups = read_groups(joined["groups"], 1)
    write_groups(joined["groups"], 1, Groups(**{**vars(groups), "row": groups.row + np.uint32(9)}))
    with pytest.raises(InputError, match=r"rows of shard 1 are no valid rows of the store.*distilclip balance"):
        stream(**joined)
    with pytest.raises(InputError, match=r"clusters: row 0 of shard 0 has no label.*groups that the clusters"):
        stream(store=joined["store"], clusters=joined["clusters"])
    with pytest.raises(InputError, match="name the store too"):
        stream(groups=joined["groups"])


def test_a_damaged_embedding_is_found_when_it_is_read(tmp_path: Path, pair_tars: PairTars) -> None:
    folder = tmp_path / "store"
    store = write_store(str(folder), pair_tars(shards=1, rows=4))
    payload = bytearray((folder / "000000.safetensors").read_bytes())
    payload[-store.image(0).nbytes :] = np.full(store.image(0).shape, np.nan, np.float16).tobytes()
    (folder / "000000.safetensors").write_bytes(payload)
    with pytest.raises(InputError, match=r"embedding of shard 0, row . is not a finite unit vector"):
        next(stream(store=str(folder)).batches(stop=1))


def test_sizes_that_do_not_fit_are_refused(pair_tars: PairTars) -> None:
    data = pair_tars(shards=1, rows=6)
    with pytest.raises(InputError, match="There are 6 usable pairs, fewer than one batch of 8"):
        stream(data=data, batch_size=8)
    with pytest.raises(InputError, match="batch_size 4 does not divide among 3 processes"):
        stream(data=data, batch_size=4, world=3)
    with pytest.raises(InputError, match="seed is -1"):
        stream(data=data, seed=-1)


def test_the_loader_can_be_pickled_for_processes_that_do_not_fork(joined: dict[str, str]) -> None:
    opened = stream(**joined)
    task = Task(*opened.rows_at(0))
    before = opened.loader[task]
    after = pickle.loads(pickle.dumps(opened.loader))[task]
    assert isinstance(before, Batch)
    assert same(before, after)


def test_open_files_are_bounded(pair_tars: PairTars) -> None:
    uris = pair_tars(shards=5, rows=1)
    shards = OpenShards(limit=2)

    def num_open() -> int:
        numbers = os.listdir("/proc/self/fd")
        return len({os.path.realpath(f"/proc/self/fd/{n}") for n in numbers} & {os.path.realpath(uri) for uri in uris})

    found = []
    for uri in (*uris, *uris[::-1]):
        assert shards[uri].read(0, 20 * 512).caption is not None
        found.append(num_open())
    assert found == [1, *[2] * 9]
