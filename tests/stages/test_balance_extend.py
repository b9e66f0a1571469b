"""`balance --extend`: a store that has grown is searched for pairs with a new row only, to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distilclip as dc
from distilclip import cli, stage_folder
from distilclip.data.store import Store, write_manifest
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.grouping import search_parts
from distilclip.stages.balance import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.stages.conftest import contents, write_store

SAME_FILE = [(3, 9), (5, 130), (131, 190)]  # of old rows, of an old and a new one, of new ones


def config(store: str, out: Path, **options: Any) -> Config:
    return Config(store=store, out=str(out), metric=options.pop("metric", "euclidean"), device="cpu", **options)


@pytest.fixture
def grown(tmp_path: Path) -> tuple[str, str]:
    """A store of five shards, of which two came after it was balanced with --max-threshold 0.9; and that balance."""
    store, _, _ = write_store(tmp_path / "store", shards=5, same_file=SAME_FILE)
    whole = Store.open(store)
    write_manifest(store, whole.shards[:3], dim=whole.dim, teacher=whole.teacher)
    before = {"stage": "embed", "num_shards": 3, "result": stage_folder.result_digest(store)}
    old = tmp_path / "old"
    main(config(store, old, threshold=0.3, max_threshold=0.9))
    write_manifest(store, whole.shards, dim=whole.dim, teacher=whole.teacher)
    (tmp_path / "store" / "extended.json").write_text(json.dumps({"former": [before]}))
    return store, str(old)


RULES: list[dict[str, Any]] = [
    {"threshold": 0.3},
    {"threshold": 0.3, "max_threshold": 0.9},
    {"threshold": 0.7, "rule": "cover"},
    {"threshold": 0.7, "rule": "complete"},
    {"target_removed": 0.2, "max_threshold": 0.9},
    {"target_removed": 0.2, "max_threshold": 0.9, "rule": "cover", "block_rows": 35},
    {"threshold": 0.7, "block_rows": 13},
]


@pytest.mark.parametrize("options", RULES)
def test_an_extension_equals_a_search_of_all_rows(
    options: dict[str, Any], grown: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, old = grown
    before = contents(Path(old))
    whole = main(config(store, tmp_path / "whole", **options))
    monkeypatch.setattr(search_parts, "default_num_cells", lambda num_points: min(12, num_points))
    assert main(config(store, tmp_path / "extended", extend=old, **options)) == whole
    assert contents(tmp_path / "extended") == contents(tmp_path / "whole")
    assert contents(Path(old)) == before
    assert 0 < whole["num_kept"] < whole["num_valid"]
    assert cli.main(["verify", str(tmp_path / "extended")]) == 0


def test_it_is_extended_again_after_the_next_growth(tmp_path: Path) -> None:
    """One shard at a time, over a store from which the first rows are all that is searched in full."""
    store, _, _ = write_store(tmp_path / "store", shards=4, same_file=[(3, 9), (5, 130)])
    whole, former = Store.open(store), []
    for num_shards in range(2, 5):
        write_manifest(store, whole.shards[:num_shards], dim=whole.dim, teacher=whole.teacher)
        (tmp_path / "store" / "extended.json").write_text(json.dumps({"former": former}))
        former.append({"num_shards": num_shards, "result": stage_folder.result_digest(store)})
        extend = {"extend": str(tmp_path / f"b{num_shards - 1}")} if num_shards > 2 else {}
        main(config(store, tmp_path / f"b{num_shards}", threshold=0.4, **extend))
    main(config(store, tmp_path / "whole", threshold=0.4))
    assert contents(tmp_path / "b4") == contents(tmp_path / "whole")
    main(config(store, tmp_path / "far", threshold=0.4, extend=str(tmp_path / "b2")))  # over two growths at once
    assert contents(tmp_path / "far") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_engines_change_no_byte(grown: tuple[str, str], tmp_path: Path) -> None:
    store, old = grown
    options: dict[str, Any] = {"threshold": 0.7, "extend": old}
    main(config(store, tmp_path / "here", **options))
    shared = Engine(engine="processes", engine_workers=2)
    main(config(store, tmp_path / "shared", block_rows=30, execution=shared, **options))
    assert contents(tmp_path / "shared") == contents(tmp_path / "here")


def test_a_kill_after_any_file_leaves_the_same_bytes(grown: tuple[str, str], tmp_path: Path) -> None:
    store, old = grown
    options: dict[str, Any] = {"threshold": 0.7, "extend": old}
    whole = tmp_path / "whole"
    main(config(store, whole, **options))
    written = sorted(whole.rglob("*.*"), key=lambda p: p.stat().st_mtime_ns)
    written = [p for p in written if p.name not in ("config.json", "env.json", "inputs.json")]
    for kept in range(0, len(written), 2):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for path in written[kept:]:
            (cut / path.relative_to(whole)).unlink()
        main(config(store, cut, **options))
        assert contents(cut) == contents(whole)


def test_stages_say_that_the_store_of_a_folder_has_grown(grown: tuple[str, str], tmp_path: Path) -> None:
    store, old = grown
    with pytest.raises(InputError, match=rf"{old} was made from {store} before that grew.*balance --extend {old}"):
        dc.stages.cluster(store=store, groups=old, num_centers=2, out=tmp_path / "clusters", device="cpu")
    with pytest.raises(InputError, match=rf"before that grew.*balance --extend {old}.*another --out"):
        main(config(store, Path(old), threshold=0.3, max_threshold=0.9))
    assert cli.main(["verify", old]) == 0  # it is whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.95}, "was searched up to euclidean 0.9, not 0.95"),
        ({"threshold": 0.2, "metric": "cosine"}, "searched with --metric euclidean, not cosine"),
        ({"threshold": 0.2, "rule": "topk", "top_k": 3}, "--rule topk cannot be extended: the lists of old rows"),
        ({"threshold": 0.2, "from_folder": "x"}, "give one of them"),
        ({"threshold": 0.2, "groups": "x"}, "searches all valid rows, and --groups only some"),
    ],
)
def test_what_cannot_be_extended_is_refused(
    options: dict[str, Any], message: str, grown: tuple[str, str], tmp_path: Path
) -> None:
    store, old = grown
    with pytest.raises(InputError, match=message):
        main(config(store, tmp_path / "out", extend=old, **options))


def test_a_folder_of_another_store_or_rule_or_of_all_rows_is_refused(grown: tuple[str, str], tmp_path: Path) -> None:
    store, _ = grown
    other, _, _ = write_store(tmp_path / "other", rows=20)
    main(config(other, tmp_path / "of_other", threshold=0.3))
    main(config(store, tmp_path / "of_all", threshold=0.3))
    for folder, message in (
        (tmp_path / "of_other", "was made from another store"),
        (tmp_path / "of_all", "as it is now: nothing was added"),
        (Path(store), "was written by `distilclip embed`"),
    ):
        with pytest.raises(InputError, match=message):
            main(config(store, tmp_path / folder.name / "out", threshold=0.3, extend=str(folder)))


def test_from_pictures_to_groups(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> None:
    """Pictures of which later ones are copies of earlier ones, through the command line."""
    data = pair_tars(shards=2, rows=8)
    members = []
    for number in (3, 12, 90, 91):
        members += [(f"new{number}.jpg", encoded(picture(number))), (f"new{number}.txt", b"a later one")]
    later = write_tar(tmp_path / "later.tar", members)
    common = ["--model", "perceptual", "--num-workers", "0"]
    search = ["--metric", "cosine", "--threshold", "0.05"]
    store, whole = str(tmp_path / "store"), str(tmp_path / "whole")
    old, new, scratch = (str(tmp_path / name) for name in ("old", "new", "scratch"))
    assert cli.main(["embed", "--data", *data, "--out", store, *common]) == 0
    assert cli.main(["balance", "--store", store, "--out", old, *search]) == 0
    assert cli.main(["embed", "--data", later, "--out", store, "--append", *common]) == 0
    assert cli.main(["balance", "--store", store, "--out", new, "--extend", old, *search]) == 0
    assert cli.main(["embed", "--data", *data, later, "--out", whole, *common]) == 0
    assert cli.main(["balance", "--store", whole, "--out", scratch, *search]) == 0
    assert contents(Path(new)) == contents(Path(scratch))
    result = json.loads((Path(new) / "result.json").read_text())
    assert result["num_valid"] - result["num_kept"] == 2
