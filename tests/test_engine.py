import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from distilclip.engine import Engine, connected, map_parts
from distilclip.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests here: it takes seconds to start."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


pytestmark = pytest.mark.xdist_group("ray")  # two clusters that start and stop side by side disturb each other
ENGINES = [Engine(), Engine(engine="processes", engine_workers=2), Engine(engine="ray", engine_workers=2)]


def prepare_square(log: str) -> Callable[[int], int]:
    """Notes each call of itself, so that a test can count the workers."""
    (Path(log) / f"prepared-{os.getpid()}-{os.urandom(4).hex()}").touch()
    return lambda part: part * part


def prepare_fault(log: str) -> Callable[[int], int]:
    def fault(part: int) -> int:
        if part == 3:
            raise InputError("part 3 is wrong")
        return part

    return fault


def prepare_death(log: str) -> Callable[[int], int]:
    """Part 3 kills its worker the first time it is computed."""

    def mortal(part: int) -> int:
        mark = Path(log) / "died"
        if part == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    return mortal


def prepare_doom(log: str) -> Callable[[int], int]:
    return lambda part: os.kill(os.getpid(), signal.SIGKILL) or 0


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.engine)
def test_every_part_is_computed_and_what_it_raises_is_raised_here(engine: Engine, tmp_path: Path) -> None:
    squares = dict(map_parts(functools.partial(prepare_square, str(tmp_path)), range(8), engine=engine))
    assert squares == {part: part * part for part in range(8)}
    assert 1 <= len(list(tmp_path.glob("prepared-*"))) <= (engine.engine_workers or 1)
    with pytest.raises(InputError, match="part 3 is wrong"):
        list(map_parts(functools.partial(prepare_fault, str(tmp_path)), range(8), engine=engine))
    assert list(map_parts(functools.partial(prepare_fault, str(tmp_path)), [], engine=engine)) == []


@pytest.mark.parametrize("engine", ENGINES[1:], ids=lambda e: e.engine)
def test_the_parts_of_a_worker_that_dies_are_computed_again(engine: Engine, tmp_path: Path) -> None:
    found = dict(map_parts(functools.partial(prepare_death, str(tmp_path)), range(6), engine=engine))
    assert (tmp_path / "died").exists()
    assert found == {part: part for part in range(6)}


def test_workers_that_keep_dying_are_an_error(tmp_path: Path) -> None:
    engine = Engine(engine="processes", engine_workers=1)
    with pytest.raises(InputError, match=r"keep dying.*--engine-workers"):
        list(map_parts(functools.partial(prepare_doom, str(tmp_path)), [7], engine=engine))


def prepare_sum(term: int) -> Callable[[int], tuple[int, int]]:
    return lambda part: (os.getpid(), part + term)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.engine)
def test_several_calls_share_their_workers_and_each_has_its_own_function(engine: Engine, tmp_path: Path) -> None:
    processes = set()
    with connected(engine) as workers:
        for term in (10, 20, 30):
            found = dict(workers.map_parts(functools.partial(prepare_sum, term), range(6)))
            assert {part: value for part, (_, value) in found.items()} == {part: part + term for part in range(6)}
            processes |= {process for process, _ in found.values()}
        with pytest.raises(InputError, match="part 3 is wrong"):
            list(workers.map_parts(functools.partial(prepare_fault, str(tmp_path)), range(8)))
        assert dict(workers.map_parts(functools.partial(prepare_death, str(tmp_path)), [1, 2])) == {1: 1, 2: 2}
        left = workers.map_parts(functools.partial(prepare_sum, 40), range(6))
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert {value for _, (_, value) in workers.map_parts(functools.partial(prepare_sum, 50), [1, 2])} == {51, 52}
        if engine.engine != "local":
            died = workers.map_parts(functools.partial(prepare_death, str(tmp_path)), range(6))
            assert dict(died) == {part: part for part in range(6)}
            assert (tmp_path / "died").exists()
    assert len(processes) <= (engine.engine_workers or 1)


def prepare_look(folder: str) -> Callable[[int], str]:
    """Say which GPU a worker sees, once there are three workers."""

    def look(part: int) -> str:
        (Path(folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(Path(folder).iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return os.environ.get("CUDA_VISIBLE_DEVICES", "none")

    return look


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("auto", "", ["0", "0", "1"]), ("cuda", "4, 7", ["4", "4", "7"]), ("cpu", "", ["none"] * 3)],
)
def test_every_process_has_a_gpu_in_turn(
    device: str, visible: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    engine = Engine(engine="processes", engine_workers=3)
    look = functools.partial(prepare_look, str(tmp_path))
    assert sorted(seen for _, seen in map_parts(look, range(3), engine=engine, device=device)) == expected


def test_without_a_number_there_is_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    with connected(Engine(engine="processes"), device="auto") as workers:
        assert workers.num_workers == 5
    with connected(Engine(engine="processes"), device="cpu") as workers:
        assert workers.num_workers == os.cpu_count()


GPUS_OF_RAY = """
import functools, ray
from distilclip.engine import Engine, connected
from tests.test_engine import prepare_look

ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
for device in ("auto", "cuda"):
    with connected(Engine(engine="ray"), device=device) as workers:
        found = [seen for _, seen in workers.map_parts(functools.partial(prepare_look, "FOLDER/" + device), range(3))]
    assert sorted(found) == ["0", "1", "2"], found
ray.shutdown()
print("finished", flush=True)
"""


@pytest.mark.slow
def test_every_actor_has_a_gpu_of_its_own_by_default(tmp_path: Path) -> None:
    for device in ("auto", "cuda"):
        (tmp_path / device).mkdir()
    code = GPUS_OF_RAY.replace("FOLDER", str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "finished" in ended.stdout, ended.stderr


# One CPU and three actors wanted: two are ready when the work is done, and what they were to prepare is gone.
LATE = """
import functools, os, ray, time
from pathlib import Path
from distilclip.engine import Engine, connected

def prepare(path):
    Path(path).read_text()
    return functools.partial(pow, 2)

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
with connected(Engine(engine="ray", engine_workers=3)) as workers:
    for call in range(3):
        Path(str(call)).touch()
        assert sum(result for _, result in workers.map_parts(functools.partial(prepare, str(call)), range(4))) == 15
        os.remove(str(call))
ray.shutdown()
print("finished", flush=True)
"""


@pytest.mark.slow
def test_an_actor_that_is_ready_too_late_is_no_error(tmp_path: Path) -> None:
    done = run_driver(LATE, tmp_path).communicate(timeout=120)
    assert done[0] == "finished\n"
    assert "Traceback" not in done[1]
    assert "Unhandled" not in done[1]


# A driver whose workers say who they are; it is killed, and can tell them nothing.
LEFT = """
import functools, os, time
from pathlib import Path
from distilclip.engine import Engine, map_parts

def note(part):
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(600 if part > 1 else 0.5)

def prepare():
    return note

if __name__ == "__main__":
    list(map_parts(prepare, range(4), engine=Engine(engine="processes", engine_workers=2)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_processes_end_with_their_driver(number: int, tmp_path: Path) -> None:
    driver = run_driver(LEFT, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    driver.send_signal(number)
    driver.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{worker}/status").exists() for worker in workers), seconds=10)


def run_driver(code: str, folder: Path) -> subprocess.Popen[str]:
    """Run a program in a folder; from a file, since workers import what it defines."""
    (folder / "driver.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "driver.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"engine_workers": 0}, "at least 1"), ({"engine_address": "auto"}, "--engine ray")]
)
def test_bad_engines_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(**arguments)  # type: ignore[arg-type]
