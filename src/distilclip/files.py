"""List, read and write files at local paths and fsspec URLs alike. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from distilclip.errors import InputError, did_you_mean


def is_url(path: str) -> bool:
    """Return whether a path is `scheme://...`; a local path has no scheme."""
    return "://" in path


def join(base: str, *names: str) -> str:
    """Return `base/name/name`, for paths and URLs."""
    return "/".join([base.rstrip("/") or "/", *names])


def absolute(path: str) -> str:
    """Return an absolute local path, or the URL as it is, so that a place has one spelling."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def filesystem(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path inside it.

    Raises:
        InputError: there is no such kind of URL, or the package that reads it is not installed.
    """
    import fsspec  # here: a tenth of a second, and `distilclip --help` needs no file

    protocol = path.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        install = f"pip install 'distilclip[{extra}]'" if extra else f"pip install what it names ({error})"
        raise InputError(f"{path}: reading {protocol}:// needs a package that is not installed: {install}.") from error
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise
        raise InputError(
            f"{path}: no file system is known for {protocol}://. {did_you_mean(protocol, USUAL)}"
        ) from error


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
USUAL = ("s3", "gs", "http", "https", "file", "memory", "hf", "abfs")


@contextlib.contextmanager
def explain_failure(path: str) -> Iterator[None]:
    """Turn what a storage answers into an `InputError` with the cause and the remedy.

    Local paths and missing files keep their own errors, `OSError` and `FileNotFoundError`.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, InputError):
        raise
    except Exception as error:
        cause = _cause(error, path) if is_url(path) else ""
        if not cause:
            raise
        raise InputError(f"{path} cannot be reached: {cause}") from error


def _cause(error: BaseException | None, path: str) -> str:
    """Return what a storage's error means and what to do; empty for an error of another kind.

    Storages have classes of their own, and their packages may not be installed: the names of the classes decide.
    """
    if error is None:
        return ""
    names = {kind.__name__ for kind in type(error).__mro__}
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    status = next((v for name in ("status", "code") if isinstance(v := getattr(error, name, None), int)), 0)
    credentials = _CREDENTIALS.get(path.partition("://")[0], "Check the account's rights.")
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
    if "NoSuchBucket" in names or status == 404:
        return f"there is no such bucket ({said}). Check its name, and AWS_ENDPOINT_URL where it is not Amazon's."
    if names & _NO_CREDENTIALS:
        return f"there are no credentials ({said}). {credentials}"
    if "PermissionError" in names or status in (401, 403):
        return f"access is denied ({said}). {credentials}"
    if names & _NO_CONNECTION:
        return f"there is no connection ({said}). Check the network and the endpoint, then run the same command again."
    is_answer = "OSError" in names or type(error).__module__.partition(".")[0] in _STORAGES
    return f"{type(error).__name__}: {said}. Run the same command again, or check the URL." if is_answer else ""


_S3 = (
    "Give credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and AWS_ENDPOINT_URL where it is "
    "not Amazon's; a public bucket needs FSSPEC_S3_ANON=true."
)
_GCS = (
    "Give credentials (`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS); a public bucket "
    "needs FSSPEC_GS_TOKEN=anon."
)
_CREDENTIALS = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError"}
_NO_CONNECTION = {"ConnectionError", "TimeoutError", "gaierror", "ClientConnectionError", "HTTPClientError"}
_STORAGES = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "s3fs", "google", "requests", "huggingface_hub", "azure"}


def exists(path: str) -> bool:
    """Return whether a file or folder exists. Raises `InputError` where a storage cannot be asked."""
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = filesystem(path)
    with explain_failure(path):
        return bool(fs.exists(inner))


def is_folder(path: str) -> bool:
    """Return whether a path is a folder; at an object store, whether objects lie below it."""
    if not is_url(path):
        return os.path.isdir(path)
    fs, inner = filesystem(path)
    with explain_failure(path):
        return bool(fs.isdir(inner))


def file_sizes(folder: str) -> dict[str, int]:
    """Return the bytes of every file that lies in a folder, by name, without those of its subfolders."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    fs, inner = filesystem(folder)
    with explain_failure(folder):
        found = [entry for entry in fs.ls(inner.rstrip("/"), detail=True) if entry["type"] == "file"]
    return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in found}


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and every one below it, sorted, each with the sorted names of its files; hidden ones are left out.

    Links to folders are not followed, since they may lead in a circle.
    """
    if is_url(folder):
        fs, inner = filesystem(folder)
        with explain_failure(folder):
            found = [(fs.unstrip_protocol(at), below, names) for at, below, names in fs.walk(inner.rstrip("/"))]
    else:
        found = list(os.walk(folder))
    base = found[0][0].rstrip("/") if found else ""
    for at, _, names in sorted(found):
        parts = at[len(base) :].split("/")
        if not any(part.startswith(".") for part in parts):
            yield folder.rstrip("/") + at[len(base) :].rstrip("/"), sorted(n for n in names if n and n[0] != ".")


def size(path: str) -> int:
    """Return the number of bytes of a file."""
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    with explain_failure(path):
        return int(fs.size(inner))


def open_read(path: str) -> Any:
    """Open a seekable binary file for reading."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path)
    with explain_failure(path):
        return fs.open(inner, "rb")


def read_bytes(path: str) -> bytes:
    """Read a whole file."""
    with explain_failure(path), open_read(path) as file:
        return file.read()


def read_range(path: str, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset`; fewer only where the file ends."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    fs, inner = filesystem(path)
    with explain_failure(path):
        return fs.cat_file(inner, start=offset, end=offset + length)


def sha256(path: str) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    return _digest(path, hashlib.sha256())


def has_digest(path: str, digest: str) -> bool:
    """Return whether a file has this digest: SHA-256 as 64 hex digits, or XXH3 of 128 bits as 32.

    XXH3 takes a sixth of the time of SHA-256. It finds what changed by accident, not what somebody forged.
    """
    if len(digest) == 64:
        return sha256(path) == digest
    import xxhash  # here: `distilclip --help` needs none

    return _digest(path, xxhash.xxh3_128()) == digest


def _digest(path: str, found: Any) -> str:
    with open_read(path) as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yield the path itself where it is local, else a temporary download, removed after the block."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="distilclip-") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        fs, inner = filesystem(path)
        with explain_failure(path):
            fs.get_file(inner, copy)
        yield copy


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[Any]:
    """Write a file that appears whole or not at all: temporary name, flush, fsync, rename.

    Object stores publish an object when it is closed, so there it is written under a temporary name and moved. A
    failure inside the block removes it again.
    """
    if is_url(path):
        fs, inner = filesystem(path)
        fs.makedirs(os.path.dirname(inner), exist_ok=True)
        temporary = _temporary(inner)
        try:
            with fs.open(temporary, "wb") as file:
                yield file
            fs.mv(temporary, inner)
        except BaseException:
            if fs.exists(temporary):
                fs.rm(temporary)
            raise
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            _name_file(error, path)
        with contextlib.suppress(OSError):  # else this would hide what went wrong first
            os.remove(temporary)
        raise


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Let the errors of a block name a path instead of their own, which tells a user nothing."""
    try:
        yield
    except OSError as error:
        _name_file(error, path)
        raise


def _name_file(error: OSError, path: str) -> None:
    """Put a file's name into an error: a write says none, and nobody knows the temporary one."""
    error.filename = path
    if error.filename2 is not None:  # a renaming says both
        del error.filename2


def _temporary(path: str) -> str:
    return f"{path}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def is_temporary(name: str) -> bool:
    """Return whether `atomic_write` gave a file its name, to be written or left behind by a killed process."""
    return re.search(r"\.\d+\.[0-9a-f]{8}\.tmp$", name) is not None


def write_bytes(path: str, content: bytes) -> str:
    """Write a whole file atomically; return its SHA-256, as 64 hex digits."""
    with atomic_write(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def create_bytes(path: str, content: bytes) -> bool:
    """Write a new file, whole or not at all; returns False, and writes nothing, where it exists already.

    Of several processes one succeeds. Storages that cannot create exclusively are asked first whether it exists.
    """
    if is_url(path):
        fs, inner = filesystem(path)
        with explain_failure(path):
            if fs.exists(inner):
                return False
            try:
                fs.pipe_file(inner, content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError):  # it knows no modes
                fs.pipe_file(inner, content)
        return True
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            _name_file(error, path)
            raise
        return _create_in_place(path, content)  # no hard links here
    finally:
        with contextlib.suppress(OSError):  # else this would hide what went wrong first
            os.remove(temporary)
    return True


def _create_in_place(path: str, content: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def modified(path: str) -> float | None:
    """Return when a file was last written, in seconds since 1970; None where there is none."""
    try:
        if not is_url(path):
            return os.stat(path).st_mtime
        fs, inner = filesystem(path)
        fs.invalidate_cache()
        with explain_failure(path):
            return float(fs.modified(inner).timestamp())
    except FileNotFoundError:
        return None


def remove_temporaries(folder: str, *, keep: str, shared: str) -> None:
    """Remove what killed processes left of `atomic_write` below a folder, except in folders that hold a file `keep`.

    Those of a file called `shared` stay: another process may be writing it.
    """
    if is_url(folder):
        fs, inner = filesystem(folder)
        with explain_failure(folder):
            places = fs.find(inner)
            kept = [place.removesuffix(keep) for place in places if place.endswith(f"/{keep}")]
            own = inner.rstrip("/") + "/"
            others = tuple(place for place in kept if place.lstrip("/") != own.lstrip("/"))
            for place in places:
                if is_temporary(place) and not place.startswith(others):
                    fs.rm_file(place)
        return
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not os.path.exists(os.path.join(parent, f, keep))]
        for name in names:
            if is_temporary(name) and not name.startswith(f"{shared}."):
                # FileNotFoundError: a process that was given up has renamed it
                with naming(folder), contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(parent, name))


def remove(path: str) -> None:
    """Remove a file."""
    if not is_url(path):
        os.remove(path)
        return
    fs, inner = filesystem(path)
    fs.rm_file(inner)


def remove_folder(path: str) -> None:
    """Remove a folder with everything in it, if it exists."""
    system, inner = filesystem(path)
    if system.exists(inner):
        system.rm(inner, recursive=True)


def expand_braces(pattern: str) -> list[str]:
    """Expand `{00000..00012}` and `{a,b}`; zero padding is kept, as webdataset writes shard patterns."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise InputError(f"{pattern!r}: the range {{{body}}} runs backwards; write {{{last}..{first}}}.")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        options = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    elif "," in body:
        options = body.split(",")
    else:
        raise InputError(f"{pattern!r}: {{{body}}} is neither a range {{000..123}} nor a list {{a,b}}.")
    return [rest for o in options for rest in expand_braces(pattern[: match.start()] + o + pattern[match.end() :])]


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return every file that the patterns name (braces, then globs), each once, in the order given, globs sorted.

    Raises:
        InputError: a pattern matches nothing, or its place cannot be read; says which of the two.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if str(pattern).startswith("pipe:"):
            raise InputError(
                f"{str(pattern)!r} is a command for webdataset, and distilclip reads at random, which a pipe cannot. "
                "Give the URL itself (s3://BUCKET/00000.tar), or a copy on disk."
            )
        for path in expand_braces(str(pattern)):
            matches = _matches(path)
            if not matches:
                raise InputError(f"No file matches {path!r} (from {pattern!r}): {_explain_absence(path)}")
            found.update(dict.fromkeys(matches))
    return list(found)


_WILD = "*?["


def _matches(path: str) -> list[str]:
    if not any(c in path for c in _WILD):
        return [path] if exists(path) else []
    if not is_url(path):
        return sorted(glob.glob(path))
    fs, inner = filesystem(path)
    with explain_failure(path):
        return sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))


def _explain_absence(path: str) -> str:
    """Say why a pattern matches nothing. Raises `InputError` where its folder cannot be read."""
    place = re.split(r"[*?\[]", path, maxsplit=1)[0]
    folder = place.rpartition("/")[0] or ("/" if place.startswith("/") else ".")
    if not is_url(path):
        if not os.path.isdir(folder):
            return f"there is no folder {folder}. Check the path."
        if not os.access(folder, os.R_OK | os.X_OK):
            raise InputError(f"{path} cannot be read: this user has no right to list {folder}. Ask its owner.")
        return f"{folder} holds no such file. Check the path and the shell's quoting."
    fs, inner = filesystem(folder if place != path else path)
    try:
        with explain_failure(path):
            fs.info(inner)
            if place != path:
                fs.ls(inner)
    except FileNotFoundError as error:
        if cause := _cause(error.__cause__, path):
            raise InputError(f"{path} cannot be reached: {cause}") from error
        bucket = fs.unstrip_protocol(inner.split("/")[0])
        return f"there is no {folder if place != path else path} ({error}). Check the name of {bucket} and the path."
    return f"{folder} can be read and holds no such file. Check the path and the shell's quoting."
