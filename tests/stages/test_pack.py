"""`distilclip pack` and `train --pack`: the whole way, what is refused, and what verify finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distilclip import cli
from distilclip.data.stream import Batch, PairStream
from distilclip.errors import InputError
from distilclip.packs.pack import INDEX_FILE, Pack, shard_name
from distilclip.stages import embed, pack, train
from tests.stages.made_training import Prepared, config, contents, final_digest, prepare


@pytest.fixture
def made(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    """Pairs, and what the stages before make of them."""
    return prepare(pair_tars, tiny_clip_folder, tmp_path / "made")


def pack_of(made: Prepared, out: Path, **options: object) -> str:
    sides = {"store": made.store, "groups": made.groups, "clusters": made.clusters}
    pack.main(pack.Config(**{**sides, "out": str(out), "packet_rows": 4, "shard_rows": 10, **options}))  # type: ignore[arg-type]
    return str(out)


def test_training_from_a_pack_goes_on_after_a_kill_bit_for_bit(
    made: Prepared, tmp_path: Path, tiny_clip_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_of(made, tmp_path / "pack")
    options = {"pack": packed, "objective": "clip-cid"}
    result = train.main(config(tmp_path / "whole", tiny_clip_json, **options))
    assert result["num_rows"] == Pack.open(packed).num_rows
    batches = PairStream.batches

    def killed(self: PairStream, **span: int) -> object:
        for step, batch in enumerate(batches(self, **span), start=span.get("start", 0)):
            if step == 3 and not span.get("start"):
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(PairStream, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(config(tmp_path / "killed", tiny_clip_json, **options))
    train.main(config(tmp_path / "killed", tiny_clip_json, **options))
    assert final_digest(tmp_path / "killed") == final_digest(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/inputs.json").read_text()).keys() == {"pack"}


def test_views_and_further_captions_are_those_of_the_store(
    made: Prepared, tmp_path: Path, tiny_clip_folder: str, tiny_clip_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    embed.main(embed.Config(data=tuple(made.tars), out=store, model=tiny_clip_folder, num_workers=0, views=3))
    packed = str(tmp_path / "pack")
    pack.main(pack.Config(store=store, out=packed, packet_rows=4))
    seen: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    batches = PairStream.batches
    for name in ("store", "pack"):
        shown: dict[tuple[int, int], np.ndarray] = {}

        def noted(self: PairStream, into: dict[tuple[int, int], np.ndarray] = shown, **span: int) -> object:
            for step, batch in enumerate(batches(self, **span)):
                into.update(_by_row(batch, step // self.steps_per_epoch))
                yield batch

        monkeypatch.setattr(PairStream, "batches", noted)
        given = {"pack": packed} if name == "pack" else {"store": store}
        options = {"objective": "clip-kd", "views": 2, "num_steps": 6, "warmup_steps": 1, "checkpoint_every": 6}
        train.main(config(tmp_path / name[:1], tiny_clip_json, **given, **options))
        seen[name] = shown
    assert len(seen["pack"]) == 48
    for place, values in seen["pack"].items():
        assert np.array_equal(values, seen["store"][place]), place


def _by_row(batch: Batch, epoch: int) -> dict[tuple[int, int], np.ndarray]:
    """What is shown of each row: its pixels and embeddings in one vector."""
    parts = [batch.pixels, batch.teacher_image[0], batch.teacher_text[0]]
    whole = np.concatenate([part.reshape(len(batch), -1).double().numpy() for part in parts], axis=1)
    return {(epoch, identity): row for identity, row in zip(batch.ids.tolist(), whole, strict=True)}


def test_what_a_pack_has_settled_or_lacks_is_refused(made: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    for options, said in (
        ({"store": made.store, "groups": made.groups}, r"leave out --store, --groups, or make"),
        ({"data": ("x.tar",)}, r"leave out --data"),
        ({"row_weights": "weights"}, r"--row-weights: a pack does not hold"),
        ({"other_stores": ("other",)}, r"--other-stores: a pack does not hold"),
        ({"student_captions": ("de",)}, r"--student-captions: a pack does not hold"),
    ):
        with pytest.raises(InputError, match=said):
            config(tmp_path / "out", tiny_clip_json, pack="pack", **options)
    plain = pack_of(made, tmp_path / "pack", clusters=None)
    with pytest.raises(InputError, match=r"was packed without --clusters"):
        train.main(config(tmp_path / "out", tiny_clip_json, pack=plain, objective="clip-cid"))
    with pytest.raises(InputError, match=r"has 0 views, not 2"):
        train.main(config(tmp_path / "views", tiny_clip_json, pack=plain, objective="clip-kd", views=2))
    with pytest.raises(InputError, match=r"was written by `distilclip embed`; a pack folder is needed"):
        train.main(config(tmp_path / "store", tiny_clip_json, pack=made.store))


def test_verify_finds_a_damaged_shard_and_the_stage_makes_it_anew(
    made: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    pack_of(made, out)
    before = contents(out)
    assert cli.main(["verify", str(out)]) == 0
    assert "3 of 3 shards, index.safetensors, centers.safetensors" in capsys.readouterr().out
    for name in (shard_name(1), INDEX_FILE):
        path = out / name
        path.write_bytes(path.read_bytes()[:-70] + bytes(70))
        assert cli.main(["verify", str(out)]) == 1
        assert cli.main(["verify", str(out), "--repair"]) == 0
        assert not path.exists()
        assert not (out / "result.json").exists()
        assert cli.main(["pack", str(out / "config.json")]) == 0
        after = contents(out)
        assert after.keys() == before.keys()
        assert all(after[name] == content for name, content in before.items() if name != "env.json")


@pytest.mark.slow
def test_workers_write_the_same_bytes(made: Prepared, tmp_path: Path) -> None:
    pack_of(made, tmp_path / "one")
    argv = ["--store", made.store, "--groups", made.groups, "--clusters", made.clusters, "--packet-rows", "4"]
    argv += ["--shard-rows", "10", "--engine", "processes", "--engine-workers", "2", "--out", str(tmp_path / "two")]
    assert cli.main(["pack", *argv]) == 0
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert {n: c for n, c in one.items() if n.startswith("shards") or n == INDEX_FILE}.items() <= two.items()


def test_moved_pairs_are_named_and_others_refused(made: Prepared, tmp_path: Path) -> None:
    tars = [str(tmp_path / Path(tar).name) for tar in made.tars]
    for old, new in zip(made.tars, tars, strict=True):
        shutil.copy(old, new)
    pack_of(made, tmp_path / "moved", data=tuple(tars))
    pack_of(made, tmp_path / "there")
    assert (tmp_path / "moved" / INDEX_FILE).read_bytes() == (tmp_path / "there" / INDEX_FILE).read_bytes()
    with pytest.raises(InputError, match=r"The data are 1 files, but the store .* was made from 2"):
        pack_of(made, tmp_path / "fewer", data=tuple(tars[:1]))
