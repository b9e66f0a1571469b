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


def start(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
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


def test_workers_share_the_cores_with_the_trainings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == MOST_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_workers() == 1
