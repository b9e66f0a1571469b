"""The examples for clusters, and the Dockerfile: what they say exists, and the Slurm job runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from distilclip import stage_folder
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RAY_STAGES = ["embed", "balance", "cluster"]

# Runs each task of a step here, one beside the other; of two nodes, both are this machine.
SRUN = """#!/bin/bash
nodes=1 ntasks= per_node=1
while [[ $1 == --* ]]; do
    case $1 in
        --nodes=*) nodes=${1#*=} ;;
        --ntasks=*) ntasks=${1#*=} ;;
        --ntasks-per-node=*) per_node=${1#*=} ;;
        --nodelist=head | --exclude=head) ;;
        *) echo "srun has no $1 here" >&2; exit 2 ;;
    esac
    shift
done
pids=()
trap 'kill "${pids[@]}"; wait' TERM
for ((task = 0; task < ${ntasks:-$((nodes * per_node))}; task++)); do
    "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = '#!/bin/bash\n[[ "$*" == "show hostnames head,other" ]] && printf "127.0.0.1\\nother\\n"\n'

RECIPE = """
[embed]
data = ["{folder}/pairs/*.tar"]
model = "{teacher}"
num_workers = 0
device = "cpu"
engine_workers = 2
out = "{folder}/runs/store"

[balance]
store = "{folder}/runs/store"
metric = "cosine"
threshold = 1e-4
device = "cpu"
engine_workers = 2
out = "{folder}/runs/groups"

[cluster]
store = "{folder}/runs/store"
groups = "{folder}/runs/groups"
num_centers = 5
device = "cpu"
engine_workers = 2
out = "{folder}/runs/clusters"

[train]
store = "{folder}/runs/store"
groups = "{folder}/runs/groups"
clusters = "{folder}/runs/clusters"
student = '{student}'
objective = "clip-cid"
batch_size = 8
num_steps = 3
warmup_steps = 1
num_workers = 0
precision = "fp32"
device = "cpu"
out = "{folder}/runs/student"
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder for Ray, whose sockets may have names of at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_slurm_job_runs_on_two_nodes(
    pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path, short_folder: str
) -> None:
    pair_tars(shards=2, rows=12)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.replace("=head", "=127.0.0.1")), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path, teacher=tiny_clip_folder, student=tiny_clip_json))
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "head,other"}
    ports = {"SLURM_JOB_ID": "7", "RAY_PORT": str(free_port()), "RENDEZVOUS_PORT": str(free_port())}
    here = {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(sys.path), "RAY_TMPDIR": short_folder}
    job = subprocess.run(
        ["bash", str(EXAMPLES / "slurm/distil.sbatch"), str(recipe)],
        env={**os.environ, **slurm, **ports, **here, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    for name in ("store", "groups", "clusters", "student"):
        assert (tmp_path / "runs" / name / "result.json").exists()
    configs = [stage_folder.read_json(str(tmp_path / f"runs/{name}/config.json")) for name in ("store", "clusters")]
    assert {config["engine"] for config in configs} == {"ray"}
    ranges = list((tmp_path / "runs/student/checkpoints/step-000003/centers").iterdir())
    assert len(ranges) == 2  # one of each process of the training
    assert not left_by_ray(short_folder)


def left_by_ray(folder: str) -> list[str]:
    """Command lines of processes of the Ray whose files are in a folder."""
    lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if folder in line and "ps axww" not in line]


def test_the_recipe_of_the_example_has_known_options_only() -> None:
    from distilclip.cli import STAGES
    from distilclip.config import parse
    from distilclip.configs import balance, cluster, embed, train

    path = str(EXAMPLES / "slurm/recipe.toml")
    for module in (embed, balance, cluster, train):
        stage = module.__name__.split(".")[-1]
        assert stage in STAGES
        words = [path] if stage == "train" else [path, "--engine", "ray", "--engine-address", "auto"]
        parse(module.Config, words, stage=stage)


@pytest.mark.parametrize("path", ["slurm/distil.sbatch", "ray/prepare.sh"])
def test_the_scripts_are_bash_and_call_stages(path: str) -> None:
    script = (EXAMPLES / path).read_text()
    subprocess.run(["bash", "-n", str(EXAMPLES / path)], check=True)
    assert f"for stage in {' '.join(RAY_STAGES)}; do" in script
    assert '    distilclip "$stage" "$recipe" --engine ray --engine-address ' in script


def test_the_ray_job_starts_a_script_that_the_image_has() -> None:
    job = yaml.safe_load((EXAMPLES / "ray/job.yaml").read_text())
    assert job["kind"] == "RayJob"
    command, script, _ = shlex.split(job["spec"]["entrypoint"])
    assert command == "bash"
    inside = Path(script).relative_to("/home/distilclip")
    assert (ROOT / inside).exists()
    assert "COPY examples examples" in (ROOT / "Dockerfile").read_text()
    groups = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert {c["image"] for group in groups for c in group["template"]["spec"]["containers"]} == {"distilclip:latest"}


def test_the_dockerfile_copies_what_exists_and_asks_for_extras_that_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = {path for line in re.findall(r"^COPY (.*)", dockerfile, re.MULTILINE) for path in line.split()[:-1]}
    assert {"src", "recipes", "pyproject.toml"} <= copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert copied <= {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.search(r"^ARG EXTRAS=(.*)", dockerfile, re.MULTILINE)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])
    needed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"].get("force-include", ()))
    assert {path.split("/")[0] for path in needed} <= copied


def test_no_file_here_names_a_registry() -> None:
    files = [ROOT / "Dockerfile", ROOT / ".dockerignore", *(p for p in EXAMPLES.rglob("*") if p.is_file())]
    assert len(files) >= 8
    for path in files:
        hosts = set(re.findall(r"(?:https?://)([\w.-]+)", path.read_text()))
        assert hosts <= {"HEAD"}, path
