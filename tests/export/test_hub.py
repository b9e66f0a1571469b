"""Pushing to the hub, as far as it goes without one: a dry run, no network, and a hub here that refuses the token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from distilclip import cli
from distilclip.configs.export import Config
from distilclip.errors import InputError
from distilclip.export.hub import list_push, push_folder
from distilclip.stage_calls import build_config
from distilclip.stages.export import main

hub = pytest.importorskip("huggingface_hub")


def options_of(**values: Any) -> Config:
    """A Config from options by their flags' names, whatever group they are in."""
    return build_config(Config, values, stage="export")


class _Refusing(BaseHTTPRequestHandler):
    """Answers every request as the hub does when a token may not write."""

    status = 401
    seen: list[str]

    def do_POST(self) -> None:
        self.seen.append(f"{self.path} {self.headers.get('authorization')}")
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"error": "Invalid username or password."}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Refusing]]:
    """A hub on this machine, with a token for it."""
    server = HTTPServer(("127.0.0.1", 0), type("_Hub", (_Refusing,), {"seen": []}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    yield server.RequestHandlerClass  # type: ignore[misc]
    server.shutdown()
    thread.join()
    server.server_close()


def exported(tmp_path: Path, model: str, **options: object) -> dict[str, object]:
    return main(options_of(what="open_clip", model=model, out=str(tmp_path / "out"), **options))


def test_a_dry_run_lists_files_sizes_and_the_card(
    tmp_path: Path, tiny_clip_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--what", "open_clip", "--model", tiny_clip_folder, "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--push-to", "someone/tiny", "--push-dry-run"]) == 0
    model = tmp_path / "out" / "model"
    shown = "".join(capfd.readouterr())
    listed = list_push(str(model), "someone/tiny")
    assert listed["files"] == {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    assert f"would push 3 files, {sum(listed['files'].values()):,} bytes, to someone/tiny" in shown
    for name, size in listed["files"].items():
        assert f"{size:,}  {name}" in shown
    assert (model / "README.md").read_text().splitlines()[-1] in shown
    assert listed["to_fill_in"] > 3
    assert f"{listed['to_fill_in']} places of the card" in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not {"push_to", "pushed"} & set(result)


def test_a_finished_export_is_pushed_without_being_made_again(
    tmp_path: Path, tiny_clip_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    result = exported(tmp_path, tiny_clip_folder)
    weights = tmp_path / "out" / "model" / "open_clip_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert exported(tmp_path, tiny_clip_folder, push_to="someone/tiny", push_dry_run=True) == result
    assert weights.stat().st_mtime_ns == written
    assert "would push" in "".join(capfd.readouterr())


def test_folders_below_are_listed_too(tmp_path: Path) -> None:
    (tmp_path / "1_Normalize").mkdir()
    (tmp_path / "1_Normalize" / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# a card")
    assert list_push(str(tmp_path), "a/b")["files"] == {"README.md": 8, "1_Normalize/config.json": 2}


@pytest.mark.parametrize(("status", "message"), [(401, "token is not valid"), (403, "token"), (500, "answered 500")])
def test_a_token_that_may_not_write_is_one_sentence(
    status: int, message: str, tmp_path: Path, refusing: type[_Refusing]
) -> None:
    (tmp_path / "README.md").write_text("# a card")
    refusing.status = status
    with pytest.raises(InputError, match=rf"--push-to someone/tiny: .*{message}") as caught:
        push_folder(str(tmp_path), "someone/tiny")
    assert "\n" not in str(caught.value)
    assert refusing.seen[0] == "/api/repos/create Bearer hf_wrong"


def test_without_a_network_the_export_is_done_and_the_message_says_so(
    tmp_path: Path, tiny_clip_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    argv = ["export", "--what", "open_clip", "--model", tiny_clip_folder, "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--push-to", "someone/tiny"]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "push-to" in line]
    assert "the hub cannot be reached" in message
    assert "The export itself is done" in message
    assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_dry_run": True}, "give --push-to ORG/NAME"),
        ({"push_to": "tiny"}, "named ORG/NAME"),
        ({"push_to": "a/b/c"}, "named ORG/NAME"),
    ],
)
def test_wrong_names_are_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options_of(what="open_clip", model="m", out="o", **options)
    with pytest.raises(InputError, match="--push-to has no meaning"):
        options_of(what="keys", store="s", out="o", push_to="a/b")


def test_a_name_that_the_hub_does_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--push-to some one/tiny"):
        list_push(str(tmp_path), "some one/tiny")
