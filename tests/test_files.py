from __future__ import annotations

import hashlib
import http.server
import os
import socketserver
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from distilclip import files
from distilclip.errors import InputError


def test_braces_expand_as_webdataset_writes_them() -> None:
    assert files.expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert files.expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert files.expand_braces("{9..10}") == ["9", "10"]
    assert files.expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(("pattern", "message"), [("{5..3}", r"write \{3..5\}"), ("{oops}", "neither a range")])
def test_bad_braces_say_what_is_meant(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        files.expand_braces(pattern)


def test_patterns_expand_in_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert files.expand([str(tmp_path / "c.tar"), str(tmp_path / "*.tar")]) == [
        str(tmp_path / f"{name}.tar") for name in ("c", "a", "b")
    ]
    with pytest.raises(InputError, match=r"No file matches .*missing.*quoting"):
        files.expand(str(tmp_path / "missing-{0..3}.tar"))


def test_remote_patterns_keep_their_protocol() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/glob/1.tar": b"", "/glob/0.tar": b""})
    assert files.expand("memory://glob/*.tar") == ["memory:///glob/0.tar", "memory:///glob/1.tar"]
    assert files.expand("memory://glob/{0..1}.tar") == ["memory://glob/0.tar", "memory://glob/1.tar"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path: Path, remote: bool) -> None:
    folder = "memory://atomic" if remote else str(tmp_path / "new" / "folder")
    path = files.join(folder, "part")
    files.write_bytes(path, b"whole")
    assert files.read_bytes(path) == b"whole"

    def fail() -> None:
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files.read_bytes(path) == b"whole"
    names = [os.path.basename(p) for p in files.filesystem(folder)[0].ls(files.filesystem(folder)[1], detail=False)]
    assert names == ["part"]


@pytest.mark.parametrize("remote", [False, True])
def test_ranges_and_digests(tmp_path: Path, remote: bool) -> None:
    path = "memory://reads/a" if remote else str(tmp_path / "a")
    files.write_bytes(path, b"0123456789")
    assert files.read_range(path, 3, 4) == b"3456"
    assert files.read_range(path, 8, 4) == b"89"
    assert files.size(path) == 10
    assert files.sha256(path) == hashlib.sha256(b"0123456789").hexdigest()


def test_a_local_copy_is_the_file_itself_or_a_download_that_goes_away(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    files.write_bytes(path, b"x")
    with files.local_copy(path) as copy:
        assert copy == path
    files.write_bytes("memory://copies/a.tar", b"remote")
    with files.local_copy("memory://copies/a.tar") as copy:
        assert os.path.basename(copy) == "a.tar"
        assert Path(copy).read_bytes() == b"remote"
    assert not os.path.exists(copy)
    assert os.path.exists(path)


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket/0.tar", "gcs"), ("s3://bucket/*.tar", "s3")])
def test_a_storage_without_its_package_says_what_to_install(
    url: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gcsfs", "s3fs"):  # where they are installed
        monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("gs", "s3"):  # where another test has used them
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=rf"needs a package.*pip install 'distilclip\[{extra}\]'"):
        files.expand(url)


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(InputError, match=r"no file system is known for gss://.*'gs'"):
        files.expand("gss://bucket/0.tar")


def test_a_pattern_without_match_says_whether_its_folder_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No file matches .*there is no folder .*nowhere\. Check the path"):
        files.expand(str(tmp_path / "nowhere" / "*.tar"))
    with pytest.raises(InputError, match=r"holds no such file.*quoting"):
        files.expand(str(tmp_path / "*.tar"))
    fsspec.filesystem("memory").pipe("/there/1.tar", b"")
    with pytest.raises(InputError, match=r"memory://there can be read and holds no such file"):
        files.expand("memory://there/*.zip")
    with pytest.raises(InputError, match=r"there is no memory://absent"):
        files.expand("memory://absent/*.tar")


class Answering(http.server.BaseHTTPRequestHandler):
    """A server that denies access to everything."""

    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *values: object) -> None:
        """Say nothing."""


def test_a_place_that_cannot_be_reached_is_no_pattern_without_match() -> None:
    pytest.importorskip("aiohttp")
    with socketserver.TCPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        with pytest.raises(InputError, match=r"0\.tar cannot be reached: access is denied \(403"):
            files.expand(f"http://127.0.0.1:{port}/0.tar")
        server.shutdown()
    with pytest.raises(InputError, match=r"cannot be reached: there is no connection .*Check the network"):
        files.expand(f"http://127.0.0.1:{port}/0.tar")


def test_a_pipe_is_refused_with_a_remedy() -> None:
    with pytest.raises(InputError, match=r"is a command for webdataset.*Give the URL itself"):
        files.expand("pipe:aws s3 cp s3://bucket/0.tar -")


def test_a_bucket_says_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    here = "http://{}:{}".format(*server.get_host_and_port())
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def refused(url: str, endpoint: str = here) -> str:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(InputError) as caught:
            files.expand(url)
        return str(caught.value)

    assert "there are no credentials" in refused("s3://mine/*.tar")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(endpoint_url=here).mkdir("mine")
    files.filesystem("s3://mine/pairs/0.tar")[0].pipe("mine/pairs/0.tar", b"x")
    assert files.expand("s3://mine/pairs/*.tar") == ["s3://mine/pairs/0.tar"]
    assert "can be read and holds no such file" in refused("s3://mine/pairs/*.zip")
    assert "there is no s3://mine/pairs/7.tar" in refused("s3://mine/pairs/7.tar")
    for url in ("s3://absent/*.tar", "s3://absent/0.tar"):
        assert "there is no such bucket" in refused(url)
    for url in ("s3://mine/pairs/*.tar", "s3://mine/pairs/0.tar"):
        assert "there is no connection" in refused(url, "http://127.0.0.1:9")
    server.stop()
