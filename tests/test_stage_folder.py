from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from distilclip import stage_folder
from distilclip.errors import InputError
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    threshold: float = 0.1
    num_workers: int = changeable(1)


def test_a_finished_folder_is_found_done(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    folder = stage_folder.open_folder(out, stage="balance", config=Config(out=out))
    assert not folder.finished
    folder.finish({"num_groups": 3})
    again = stage_folder.open_folder(out, stage="balance", config=Config(out=out))
    assert again.finished
    assert again.result() == {"stage": "balance", "num_groups": 3}


def test_what_a_killed_worker_was_writing_is_gone_when_the_stage_ends(tmp_path: Path) -> None:
    out = tmp_path / "balance"
    folder = stage_folder.open_folder(str(out), stage="balance", config=Config(out=str(out)))
    (out / "labels").mkdir()
    (out / "labels/000002.parquet.19941.bb5ae6ab.tmp").write_bytes(b"half of")
    (out / "labels/000002.parquet").write_bytes(b"all of it")
    folder.finish({})
    assert [path.name for path in (out / "labels").iterdir()] == ["000002.parquet"]


def test_unfinished_files_of_a_model_go_and_those_of_a_stage_in_a_folder_below_stay(tmp_path: Path) -> None:
    for name in ("model", "embed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors.19941.bb5ae6ab.tmp").write_bytes(b"half of")
    (tmp_path / "embed/env.json").write_text("{}")
    stage_folder.Folder(str(tmp_path), "export").remove_temporaries()
    assert len(list((tmp_path / "model").iterdir())) == 1
    assert len(list((tmp_path / "embed").iterdir())) == 3


def test_another_config_is_an_error_that_says_what_differs(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    stage_folder.open_folder(out, stage="balance", config=Config(out=out))
    (tmp_path / "balance" / "groups").mkdir()
    (tmp_path / "balance" / "groups" / "000000.parquet").write_bytes(b"made")
    with pytest.raises(InputError, match=r"threshold was 0.1, now 0.2.*another --out"):
        stage_folder.open_folder(out, stage="balance", config=Config(out=out, threshold=0.2))


@pytest.mark.parametrize("root", ["", "memory://begun-anew/"])
def test_a_folder_in_which_nothing_was_made_is_begun_anew(tmp_path: Path, root: str) -> None:
    """A wrong value or a wrong input can be corrected without `rm -rf`."""
    place = root or f"{tmp_path}/"
    out, stores = place + "balance", [place + name for name in ("wrong", "right")]
    for number, store in enumerate(stores):
        stage_folder.open_folder(store, stage="embed", config=Config(out=store)).finish({"number": number})
    for store, threshold in ((stores[0], 7.0), (stores[1], 0.1)):
        config, inputs = Config(out=out, threshold=threshold), [(store, "embed")]
        folder = stage_folder.open_folder(out, stage="balance", config=config, inputs=inputs)
        stage_folder.files.write_bytes(folder.child("forest.parquet.123.0123abcd.tmp"), b"a write that was killed")
    folder.finish({})
    record = stage_folder.read_finished(out, stage="balance")
    assert record is not None
    assert record.config["threshold"] == 0.1
    stage_folder.require(out, stage="balance", store=stores[1])


def test_how_to_compute_may_differ(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    stage_folder.open_folder(out, stage="balance", config=Config(out=out, num_workers=1))
    stage_folder.open_folder(out, stage="balance", config=Config(out=out, num_workers=8))


def test_another_stage_or_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "balance")
    stage_folder.open_folder(out, stage="balance", config=Config(out=out))
    with pytest.raises(InputError, match="stage was 'balance', now 'cluster'"):
        stage_folder.open_folder(out, stage="cluster", config=Config(out=out))
    with pytest.raises(InputError, match=r"cluster --out .* with the right values"):
        stage_folder.require(
            str(stage_folder.open_folder(out + "2", stage="cluster", config=Config(out=out)).path), stage="cluster"
        )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        stage_folder.open_folder(str(tmp_path / "photos"), stage="embed", config=Config(out="x"))


def test_require_names_the_missing_stage(tmp_path: Path) -> None:
    out = str(tmp_path / "store")
    with pytest.raises(InputError, match="run `distilclip embed --out"):
        stage_folder.require(out, stage="embed")
    folder = stage_folder.open_folder(out, stage="embed", config=Config(out=out))
    with pytest.raises(InputError, match="is unfinished"):
        stage_folder.require(out, stage="embed")
    with pytest.raises(InputError, match="was written by `distilclip embed`"):
        stage_folder.require(out, stage="balance")
    folder.finish({"num_rows": 5})
    assert stage_folder.require(out, stage="embed")["num_rows"] == 5


def test_require_tells_the_store_that_a_folder_was_made_from(tmp_path: Path) -> None:
    stores = [str(tmp_path / name) for name in ("store", "other")]
    for number, store in enumerate(stores):
        stage_folder.open_folder(store, stage="embed", config=Config(out=store)).finish({"number": number})
    out = str(tmp_path / "balance")
    folder = stage_folder.open_folder(out, stage="balance", config=Config(out=out), inputs=[(stores[0], "embed")])
    folder.finish({})
    stage_folder.require(out, stage="balance", store=stores[0])
    with pytest.raises(InputError, match=r"made from another store than .*other"):
        stage_folder.require(out, stage="balance", store=stores[1])
    (tmp_path / "balance" / "inputs.json").unlink()
    with pytest.raises(InputError, match=r"balance has no inputs\.json"):
        stage_folder.require(out, stage="balance", store=stores[0])


def test_records_of_finished_unfinished_and_foreign_folders(tmp_path: Path) -> None:
    out = str(tmp_path / "store")
    folder = stage_folder.open_folder(out, stage="embed", config=Config(out=out))
    record = stage_folder.read_record(out)
    assert record is not None
    assert (record.path, record.stage, record.result) == (out, "embed", {})
    assert (record.config["threshold"], "python" in record.environment) == (0.1, True)
    assert stage_folder.read_finished(out) is None
    folder.finish({"num_rows": 5})
    assert stage_folder.read_finished(out, stage="balance") is None
    finished = stage_folder.read_finished(out, stage="embed")
    assert finished is not None
    assert finished.result["num_rows"] == 5
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "clip"}')
    assert stage_folder.read_record(str(tmp_path / "model")) is None
    assert stage_folder.read_record(str(tmp_path / "nowhere")) is None


def test_inputs_are_written_once_and_checked_ever_after(tmp_path: Path) -> None:
    path = str(tmp_path / "subset.json")
    for _ in range(2):
        stage_folder.write_made_from(path, "runs/tars", {"subset": "a"})
    with pytest.raises(InputError, match=r"runs/tars was made from other inputs .* subset came, went or changed"):
        stage_folder.write_made_from(path, "runs/tars", {"subset": "b"})


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        stage_folder.write_json(str(tmp_path / "result.json"), {"loss": float("nan")})
    assert not (tmp_path / "result.json").exists()


def test_metrics_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    metrics = stage_folder.Metrics(path)
    for step in (1, 2, 3):
        metrics.write(step=step, loss=1 / step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    stage_folder.Metrics(path, resume_at=3).write(step=3, loss=0.0)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.0}]


def test_environment_names_versions_and_command() -> None:
    environment = stage_folder.environment()
    assert environment["versions"]["numpy"] != "not installed"
    assert environment["command"]


def test_the_command_in_env_json_has_neither_folders_nor_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zaphod")
    words = ["/home/zaphod/.venv/bin/distilclip", "--data=/data/secret/{0..9}.tar", "weights:/home/zaphod/w.pt"]
    words += ["s3://bucket/a.tar", "https://me:password@host/a?signature=1", "runs/x", "../y", "1/2", "/home/zaphod"]
    monkeypatch.setattr("sys.argv", words)
    assert stage_folder.environment()["command"] == [
        *(".../distilclip", "--data=.../{0..9}.tar", "weights:.../w.pt"),
        *("s3://bucket/a.tar", "https://host/a", "runs/x", "../y", "1/2", "~"),
    ]


def test_memory_filesystem_folder() -> None:
    out = "memory://test-run/balance"
    folder = stage_folder.open_folder(out, stage="balance", config=Config(out=out))
    folder.finish({"num_groups": 1})
    assert stage_folder.require(out, stage="balance")["num_groups"] == 1
