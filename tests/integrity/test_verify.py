"""A bit that flips in any file of a run is found, and what is removed comes back byte for byte."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distilclip import cli, digests
from distilclip.clustering.fit_options import FitOptions
from distilclip.data.side_files import read_groups, write_groups
from distilclip.errors import InputError
from distilclip.integrity.folders import check_folders
from distilclip.stages import balance, cluster, embed, train
from tests.conftest import encoded, picture, write_tar
from tests.stages.made_training import config as train_config
from tests.stages.made_training import contents

LAST = "train/checkpoints/step-000004"
FILES = [
    "store/manifest.parquet",
    "store/000000.rows.parquet",
    "store/000001.safetensors",
    "groups/forest.parquet",
    "groups/search.json",
    "groups/groups/000001.parquet",
    "clusters/centers.safetensors",
    "clusters/fit.json",
    "clusters/labels/000000.parquet",
    "train/metrics.jsonl",
    f"{LAST}/open_clip_config.json",
    f"{LAST}/open_clip_model.safetensors",
    f"{LAST}/heads.safetensors",
    f"{LAST}/optimizer.safetensors",
    f"{LAST}/centers/000000000-000000005.safetensors",
    f"{LAST}/state.json",
]
"""One of each kind that a run writes."""
WITHOUT_DIGEST = {"config.json", "env.json", "inputs.json", "result.json", "lock.json"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, and its stages to run again."""

    folder: Path
    stages: dict[str, Callable[[], Any]]

    def again(self) -> None:
        """Run every stage, finished or not."""
        digests.forget()
        for stage in self.stages.values():
            stage()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: str, tiny_clip_json: str) -> Run:
    """A run over 24 pairs with centers: store, groups, clusters, and a training of four steps."""
    folder = tmp_path_factory.mktemp("run")
    pairs = folder.parent / f"{folder.name}-pairs"
    tars = []
    for shard in range(2):
        numbers = range(shard * 12, shard * 12 + 12)
        members = [(f"{n:05d}.{kind}", content) for n in numbers for kind, content in _pair(n)]
        tars.append(write_tar(pairs / f"{shard:05d}.tar", members))
    store, groups, clusters = (str(folder / name) for name in ("store", "groups", "clusters"))
    training = train_config(
        folder / "train",
        tiny_clip_json,
        store=store,
        groups=groups,
        clusters=clusters,
        terms={"task": 1.0, "cluster": 1.0},
    )
    stages = {
        "store": lambda: embed.main(embed.Config(data=tuple(tars), out=store, model=tiny_clip_folder, num_workers=0)),
        "groups": lambda: balance.main(balance.Config(store=store, out=groups, metric="cosine", threshold=1e-4)),
        "clusters": lambda: cluster.main(
            cluster.Config(store=store, groups=groups, out=clusters, fit=FitOptions(num_centers=5))
        ),
        "train": lambda: train.main(training),
    }
    run = Run(folder, stages)
    run.again()
    return run


def _pair(number: int) -> list[tuple[str, bytes]]:
    return [("jpg", encoded(picture(number // 2))), ("txt", f"picture number {number}".encode())]


@pytest.fixture
def run(made: Run) -> Iterator[Run]:
    """The run, which is as it was after each test."""
    before = contents(made.folder)
    yield made
    for name in contents(made.folder).keys() - before.keys():
        (made.folder / name).unlink()
    for name, content in before.items():
        (made.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.folder / name).write_bytes(content)
    digests.forget()


def flip(path: Path, place: float = 0.5) -> None:
    """Flip the lowest bit of a byte in the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def faults(run: Run) -> list[str]:
    return [fault.text for found in check_folders(str(run.folder)) for fault in found.faults]


def steady(run: Run) -> dict[str, bytes]:
    """What must come back byte for byte: not where it ran and how fast."""
    return {n: c for n, c in contents(run.folder).items() if Path(n).name not in ("env.json", "metrics.jsonl")}


def test_a_whole_run_has_no_fault_and_every_kind_of_file_is_tried(run: Run) -> None:
    found = check_folders(str(run.folder), sources="keys")
    assert [f.stage for f in found] == ["embed", "balance", "cluster", "train"]
    assert [(f.faults, f.notes) for f in found] == [([], [])] * 4
    kinds = {_kind(name) for name in FILES}
    assert {_kind(n) for n in contents(run.folder) if Path(n).name not in WITHOUT_DIGEST} == kinds


def _kind(name: str) -> str:
    return "".join(c for c in name if not c.isdigit())


@pytest.mark.parametrize("place", [0.3, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(run: Run, name: str, place: float) -> None:
    flip(run.folder / name, place if name != "train/metrics.jsonl" else 0.0)
    found = faults(run)
    assert any(str(run.folder / name) in text for text in found)
    assert all(name.split("/")[0] in text for text in found)


@pytest.mark.parametrize(
    "name", ["store/000001.safetensors", "groups/groups/000001.parquet", "clusters/labels/000000.parquet", LAST]
)
def test_what_repair_removes_comes_back_byte_for_byte(run: Run, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, path = steady(run), run.folder / name
    flip(path / "optimizer.safetensors" if path.is_dir() else path)
    assert cli.main(["verify", str(run.folder)]) == 1
    assert path.exists()
    assert cli.main(["verify", str(run.folder), "--repair"]) == 0
    assert not path.exists()
    stage = run.folder / name.split("/")[0]
    left = [stage / n for n in ("000000.safetensors", "groups/000000.parquet", "labels/000001.parquet", "checkpoints")]
    assert any(part.exists() for part in left), "only the bad parts go"
    assert f"removed: {path}" in capsys.readouterr().out
    run.again()
    assert steady(run) == before
    assert cli.main(["verify", str(run.folder)]) == 0


def test_stages_refuse_what_has_changed_since_it_was_written(run: Run, tmp_path: Path) -> None:
    flip(run.folder / "store/000001.safetensors", 1.0)
    options = {"store": str(run.folder / "store"), "metric": "cosine", "threshold": 0.1}
    with pytest.raises(InputError, match=r"000001.safetensors .*shard 1, rows 0 to 11\).*verify .* --repair"):
        balance.main(balance.Config(out=str(tmp_path / "groups"), **options))
    flip(run.folder / "store/000001.safetensors", 1.0)
    flip(run.folder / "groups/groups/000000.parquet")
    options = {"store": str(run.folder / "store"), "groups": str(run.folder / "groups")}
    with pytest.raises(InputError, match=r"000000\.parquet is not the file that was written"):
        cluster.main(cluster.Config(out=str(tmp_path / "clusters"), fit=FitOptions(num_centers=5), **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run: Run, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = steady(run), run.folder / LAST / "optimizer.safetensors"
    (run.folder / "train/result.json").unlink()
    if damage == "flipped":
        flip(path)
    else:
        forget_digests(run.folder / LAST / "state.json")  # as an older version wrote it
        path.write_bytes(path.read_bytes()[:-8])
    run.again()
    assert "Goes on from the checkpoint before, step 2" in capsys.readouterr().err
    assert steady(run) == before


def test_without_a_whole_checkpoint_training_does_not_begin_anew_by_itself(run: Run) -> None:
    (run.folder / "train/result.json").unlink()
    for state in (run.folder / "train").rglob("optimizer.safetensors"):
        flip(state)
    with pytest.raises(InputError, match=r"no checkpoint that is whole.*verify .* --repair"):
        run.again()


def test_training_refuses_embeddings_that_have_changed(run: Run) -> None:
    for path in [run.folder / "train/result.json", *(run.folder / "train/checkpoints").rglob("state.json")]:
        path.unlink()
    flip(run.folder / "store/000000.safetensors", 1.0)
    with pytest.raises(InputError, match=r"000000\.safetensors is not the file .*verify .* --repair"):
        run.stages["train"]()


def test_files_that_are_checked_behind_are_found_too(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    known = digests.digest_files(str(tmp_path), names)
    flip(tmp_path / "c")
    check = digests.BackgroundCheck([(str(tmp_path / n), known[n], lambda: "Remedy.") for n in names], at_once=100)
    check.wait()
    with pytest.raises(InputError, match=r"c is not the file that was written .*Remedy"):
        check.raise_found()
    digests.BackgroundCheck(
        [(str(tmp_path / n), known[n], lambda: "Remedy.") for n in names[:2]], at_once=100
    ).raise_found()


def forget_digests(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in ("digests", "sha256")}))


def test_older_folders_without_digests_pass_with_a_note(run: Run) -> None:
    for name in ("store", "groups", "clusters"):
        forget_digests(run.folder / name / "result.json")
        (run.folder / name / "inputs.json").unlink(missing_ok=True)  # it names the digest of result.json
    (run.folder / "train/inputs.json").unlink()
    for path in (run.folder / "train").rglob("state.json"):
        forget_digests(path)
    found = check_folders(str(run.folder))
    assert [f.faults for f in found] == [[]] * 4
    assert all(any("older version" in note for note in f.notes) for f in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: {"representative": np.roll(g.representative, 1)}, "representative"),
        (lambda g: {"group": np.roll(g.group, 1)}, "group"),
        (lambda g: {"keep": ~g.keep}, "kept"),
        (lambda g: {"distance": g.distance + np.float32(0.1)}, "distance"),
        (lambda g: {"row": g.row + np.uint32(1)}, "valid rows"),
    ],
    ids=["representative", "group", "keep", "distance", "row"],
)
def test_groups_that_break_a_rule_are_found_without_digests(run: Run, change: Any, said: str) -> None:
    folder = str(run.folder / "groups")
    groups = read_groups(folder, 0)
    write_groups(folder, 0, dataclasses.replace(groups, **change(groups)))
    forget_digests(run.folder / "groups/result.json")
    found = [text for text in faults(run) if "groups/000000.parquet" in text]
    assert found
    assert any(said in text for text in found)


def write_version(path: Path) -> None:
    """Write a file as a later version would, and leave out the digests that tell of it."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"distilclip.format": b"2"}), path)
    elif path.suffix == ".json":
        state = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
        path.write_text(json.dumps(digests.seal({**state, "format": 3})))
    else:
        content = path.read_bytes()
        assert content.count(b'"format":"1"') == 1
        path.write_bytes(content.replace(b'"format":"1"', b'"format":"2"'))


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith((".parquet", "/centers.safetensors", "state.json"))])
def test_nothing_that_another_version_wrote_is_removed(run: Run, name: str) -> None:
    stage = name.split("/")[0]
    write_version(run.folder / name)
    for inputs in run.folder.glob("*/inputs.json") if stage != "train" else ():
        inputs.unlink()  # it names the digest of result.json
    forget_digests(run.folder / stage / "result.json")
    before = contents(run.folder)
    told = next(found.faults for found in check_folders(str(run.folder)) if found.path.endswith(stage))
    assert any(str(run.folder / name) in f.text and "has format version" in f.text for f in told)
    assert cli.main(["verify", str(run.folder / stage), "--repair"]) == 1
    assert contents(run.folder) == before
    if name.endswith("state.json"):
        words = ["train", str(run.folder / "train/config.json"), "--num-steps", "6"]
        assert cli.main(words) == 2
        assert contents(run.folder) == before, "a finished training stays finished"
        (run.folder / "train/result.json").unlink()
        with pytest.raises(InputError, match="has format version 3; this distilclip reads version 2"):
            run.again()


def test_a_finished_folder_from_other_inputs_is_a_fault(run: Run) -> None:
    result = run.folder / "store/result.json"
    result.write_text(result.read_text().replace('"num_invalid": 0', '"num_invalid": 1'))
    assert any("was made from another store" in text for text in faults(run))


def test_a_folder_of_nothing_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_verify_needs_no_torch() -> None:
    code = "import sys, distilclip.stages.verify; assert not {'torch', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
