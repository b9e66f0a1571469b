import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from distilclip.engine import Engine, map_parts
from distilclip.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests here: it takes seconds to start."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
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


@pytest.mark.parametrize(
    ("arguments", "message"), [({"engine_workers": 0}, "at least 1"), ({"engine_address": "auto"}, "--engine ray")]
)
def test_bad_engines_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(**arguments)  # type: ignore[arg-type]
