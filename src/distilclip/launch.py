"""Start the processes that train together, or find this process's place among those that torchrun or Slurm started.

`python -m distilclip.launch N train CONFIG` is torchrun on one machine that ends without a traceback of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from distilclip.errors import InputError
from distilclip.messages import say, warn

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHER = "DISTILCLIP_LAUNCHER"  # in a training's processes that `run` started: the process that looks after them
SPECIAL_STEPS = 0xFFFFFFF0  # Slurm's numbers for the batch script itself and for interactive shells


class ProcessError(RuntimeError):
    """A process that was started here failed, and has said why. `code` is its exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def find_place() -> tuple[int, int]:
    """Return the number of this process and how many there are, by torchrun's variables or Slurm's; (0, 1) alone.

    Those of Slurm become those of torchrun, which all others read.
    """
    environment = os.environ
    if "RANK" not in environment and _is_slurm_task(environment):
        found = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_NTASKS"]}
        found["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
        here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        found["LOCAL_WORLD_SIZE"] = here.group() if here else found["WORLD_SIZE"]
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        job, step = environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"]
        environment.setdefault("MASTER_ADDR", first_node(nodes))
        environment.setdefault("MASTER_PORT", str(20000 + (7 * int(job) + int(step)) % 10000))
        environment |= found
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process with others. The batch script has the same variables, but no step."""
    step = environment.get("SLURM_STEP_ID", "")
    tasks = environment.get("SLURM_NTASKS", "1")
    return "SLURM_PROCID" in environment and step.isdigit() and int(step) < SPECIAL_STEPS and int(tasks) > 1


def first_node(nodes: str) -> str:
    """Return the first name of a list of Slurm's.

    >>> first_node("gpu[007-010,12],cpu3")
    'gpu007'
    """
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def work_alone(stage: str) -> bool:
    """Whether this process is to run a stage that one process runs. It then stands alone, whoever started it."""
    rank, world = find_place()
    if rank > 0:
        return False
    if world > 1:
        warn(f"{stage} runs in one process: the other {world - 1} that were started end at once.")
        for name in PLACE:
            os.environ.pop(name, None)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    return True


def count_processes(wanted: str, *, device: str, batch_size: int) -> int:
    """Return how many processes are to train: the number itself, or for auto one per GPU, and 1 on a CPU.

    With auto it is the largest number of GPUs that divides the batch.
    """
    if wanted != "auto":
        return int(wanted)
    if device not in ("auto", "cuda"):
        return 1
    import torch

    num_gpus = torch.cuda.device_count()
    return next((n for n in range(num_gpus, 1, -1) if batch_size % n == 0), 1)


def run_in_processes(stage: str, values: Mapping[str, Any], *, num_processes: int) -> None:
    """Run a stage with these options in several processes of this machine, until all have ended.

    Raises `ProcessError` where one fails. A SIGTERM is passed on, and ends this process when the others have saved.
    """
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    for name in PLACE:
        environment.pop(name, None)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what earlier steps kept is needed by the processes
    say(f"    in {num_processes} processes")
    with tempfile.TemporaryDirectory(prefix="distilclip-") as folder:
        path = os.path.join(folder, "config.json")
        with open(path, "w") as file:
            json.dump({"stage": stage, **values}, file)
        words = [sys.executable, "-m", "distilclip.launch", str(num_processes), stage, path]
        process = subprocess.Popen(words, env=environment)
        with _passing_on(process):
            code = process.wait()
    if code:
        code = code if code > 0 else 128 - code
        raise ProcessError(f"{stage} in {num_processes} processes failed (exit code {code}); see above.", code)


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on to a process for the length of the block, and die of it afterwards."""
    terminated = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal terminated
        terminated = True
        process.send_signal(number)

    try:
        before = signal.signal(signal.SIGTERM, pass_on)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)  # it saves
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if terminated:
            signal.raise_signal(signal.SIGTERM)


def main(num_processes: str, *words: str) -> int:
    """Run `distilclip WORDS` in several processes that train together; the first failure's exit code."""
    _end_with_parent()
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    arguments = ["--standalone", "--nproc-per-node", num_processes, "-m", "distilclip", *words]
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            print(f"distilclip: process {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def end_with_launcher() -> None:
    """In a process that `run` has started for a training: save and end when its launcher does, however that ends."""
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        _end_with_parent()


def _end_with_parent() -> None:
    """On Linux, get SIGTERM when the process that started this one ends, however it ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def check_number(wanted: str) -> None:
    """Raise `InputError` where `--nproc-per-node` is neither auto nor a number."""
    if wanted != "auto" and not (wanted.isdigit() and int(wanted) > 0):
        raise InputError(f"--nproc-per-node {wanted!r}: auto or a number of processes, at least 1, is needed.")


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
