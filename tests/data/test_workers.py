from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from distilclip.data.workers import MOST_WORKERS, default_workers

# A parent that notes signals and reads from two loader processes; its whole group is told to save and to stop.
JOB = """
import os, signal, time
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks
from distilclip.train.signals import Signals

class Slow(Dataset):
    def __getitem__(self, task):
        time.sleep(0.02)
        return os.getpid(), task

with Signals() as signals:
    batches = map_tasks(Slow(), range(40), num_workers=2)
    found = [next(batches), next(batches)]  # one of each process
    print("begun", flush=True)
    while not signals.stop:
        time.sleep(0.01)
    found += batches
    assert [task for _, task in found] == list(range(40))
    assert len({process for process, _ in found}) == 2
    assert signals.take()
"""

# A parent that ends while its loader processes still have work: they must not outlive it.
LEFT = """
import os, time
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks

class Slow(Dataset):
    def __getitem__(self, task):
        time.sleep(0.02)
        return os.getpid()

batches = map_tasks(Slow(), range(1000), num_workers=2)
print(*{next(batches) for _ in range(20)}, flush=True)
"""


# Five results of 4 MB each where shared memory holds one: all arrive, and one line says that they are slow.
LARGE = """
import torch
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks

class Large(Dataset):
    def __getitem__(self, task):
        return task, [torch.full((1 << 22,), task, dtype=torch.uint8)], "words"

found = list(map_tasks(Large(), range(5), num_workers=2))
assert [task for task, _, _ in found] == list(range(5))
assert all((rows == task).all() and len(rows) == 1 << 22 for task, (rows,), _ in found)
"""

# A loader process that is killed, as by the kernel where memory runs out.
KILLED = """
import os, signal, time
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks
from distilclip.errors import InputError

class Greedy(Dataset):
    def __getitem__(self, task):
        if task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

results = map_tasks(Greedy(), range(6), num_workers=1)
assert next(results) == 0
time.sleep(1)  # what the caller computes is not disturbed
try:
    list(results)
except InputError as error:
    print(error)
"""

# Loader processes that can make no file in the temporary folder, where their sockets lie.
NO_ROOM = """
import errno, os, torch
from multiprocessing import util
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks

class Rows(Dataset):
    def __getitem__(self, task):
        return task, torch.full((1000,), task)

def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/pymp-1")

util.get_temp_dir = full
found = list(map_tasks(Rows(), range(5), num_workers=2))
assert all((rows == task).all() for task, rows in found) and len(found) == 5
"""

# Loader processes whose storage does not answer.
HUNG = """
import time
from torch.utils.data import Dataset
from distilclip.data import workers
from distilclip.errors import InputError

class Hung(Dataset):
    def __getitem__(self, task):
        time.sleep(0 if task < 1 else 2.5 if task < 2 else 600)
        return task

workers.MOST_SECONDS, workers._CHECK_SECONDS = 4, 1
results = workers.map_tasks(Hung(), range(6), num_workers=1)
try:
    for result in results:
        print(result)
except InputError as error:
    print(error)
"""

SMALL_MEMORY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=6m tmpfs /dev/shm && exec "$@"', "sh"]


# A loader process that is killed while its results wait: their memory is handed over by that process.
KILLED_LATER = """
import multiprocessing, time, torch
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks
from distilclip.errors import InputError

class Quick(Dataset):
    def __getitem__(self, task):
        return torch.full((8,), task)

for attempt in range(30):  # it depends on the moment what is met first
    results = map_tasks(Quick(), range(100), num_workers=2)
    next(results)
    time.sleep(0.01 * (attempt % 3))
    for process in multiprocessing.active_children():
        process.kill()
    try:
        list(results)
    except InputError as error:
        assert "A loader process was killed" in str(error)
print("all were told")
"""

# A fault of its own in a loader process, which is no sign that it was killed.
FAULTY = """
from torch.utils.data import Dataset
from distilclip.data.workers import map_tasks

class Faulty(Dataset):
    def __getitem__(self, task):
        raise {fault}("the words of the fault")

try:
    list(map_tasks(Faulty(), range(6), num_workers=1))
except {fault} as error:
    print(str(error).splitlines()[-1])
"""


def can_mount() -> bool:
    return subprocess.run([*SMALL_MEMORY, "true"], capture_output=True, check=False).returncode == 0


def start(code: str, *, within: list[str] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*(within or []), sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, start_new_session=True, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals cannot be told apart here")
def test_a_signal_to_the_whole_job_leaves_the_batches_coming() -> None:
    job = start(JOB)
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    os.killpg(job.pid, signal.SIGUSR1)
    os.killpg(job.pid, signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors


def test_loader_processes_end_with_their_parent() -> None:
    job = start(LEFT)
    written, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    processes = [int(word) for word in written.split()]
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder on Linux")
def errors_of(job: subprocess.Popen[str]) -> str:
    """Wait for a job that must end well; what it wrote as errors. One that hangs is killed with all its processes."""
    try:
        _, errors = job.communicate(timeout=60)
    finally:
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None else None
    assert job.returncode == 0, errors
    return errors


def test_results_arrive_where_shared_memory_is_too_small() -> None:
    if not can_mount():
        pytest.skip("no right to mount a small /dev/shm")
    errors = errors_of(start(LARGE, within=SMALL_MEMORY))
    assert errors.count("--shm-size") == errors.count("\n") == 1


def test_results_arrive_where_the_temporary_folder_is_full() -> None:
    """Torch sends a result's memory through a socket, from a thread whose errors nobody hears."""
    errors = errors_of(start(NO_ROOM))
    assert errors.count("$TMPDIR") == errors.count("\n") == 1
    assert "No space left on device: '/tmp/pymp-1'" in errors


@pytest.mark.slow
def test_a_loader_process_that_is_killed_is_one_sentence() -> None:
    written, errors = start(KILLED).communicate(timeout=120)
    assert "A loader process was killed" in written, errors
    assert "--num-workers" in written
    assert written.count("\n") == 1


@pytest.mark.slow
def test_a_loader_process_that_is_killed_before_its_results_are_taken_is_one_sentence() -> None:
    written, errors = start(KILLED_LATER).communicate(timeout=60)
    assert "all were told" in written, errors


@pytest.mark.parametrize("fault", ["RuntimeError", "OSError"])
def test_what_a_loader_process_raises_is_not_called_a_kill(fault: str) -> None:
    written, errors = start(FAULTY.format(fault=fault)).communicate(timeout=60)
    assert "the words of the fault" in written, errors


@pytest.mark.slow
def test_results_may_be_late_but_not_for_ever() -> None:
    written, errors = start(HUNG).communicate(timeout=120)
    first, second, sentence = written.splitlines()
    assert (first, second) == ("0", "1"), errors
    assert "gave nothing in 4 s" in sentence


def test_workers_share_the_cores_with_the_trainings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == MOST_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_workers() == 1
