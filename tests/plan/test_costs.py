import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distilclip.errors import InputError
from distilclip.grouping.sorted_rows import sorted_row_bytes
from distilclip.plan import costs
from distilclip.plan.architecture_costs import Cost
from distilclip.plan.flops import cost_of, count_cost
from distilclip.plan.hardware import GPUS, Gpu, constant
from distilclip.stages.plan import Config, main

GPU = Gpu(name="made up", peak_flops=1e15, memory_bytes=1e11, source="here")
DATA = costs.Data(num_pairs=1_000_000, bytes_per_pair=10_000, removed_ratio=0.25)
TOWERS = Cost(image_flops=8e9, text_flops=2e9, num_parameters=10**8, dim=512)


def test_arithmetic_of_a_known_architecture() -> None:
    """open_clip's own table (docs/model_profile.csv) says 14.78 GFLOP and 151.28 M parameters."""
    cost = cost_of("ViT-B-32")
    assert cost.flops == pytest.approx(14.78e9, rel=0.01)
    assert cost.num_parameters == pytest.approx(151.28e6, rel=1e-3)
    assert cost.dim == 512
    with pytest.raises(InputError, match="ViT-B-32"):
        cost_of("ViT-B-33")


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "MobileCLIP-S1"])
def test_the_listed_costs_are_the_counted_ones(name: str) -> None:
    assert cost_of(name) == count_cost(name)


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; from distilclip.cli import main; main(['plan']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_stage_by_hand() -> None:
    embed = costs.embed(DATA, GPU, TOWERS)
    assert embed.gpu_seconds == pytest.approx(1e6 * 10e9 / (1e15 * constant("embed_utilisation")))
    assert embed.disk_bytes == pytest.approx(1e6 * (2 * 512 * 2 + constant("row_table_bytes")))
    balance = costs.balance(DATA, GPU, dim=512, block_rows=100_000)
    assert balance.gpu_seconds == pytest.approx(0.5e12 * 1024 / (1e15 * constant("tile_utilisation")))
    assert balance.read_bytes == pytest.approx((1 + 10) * 1e6 * 1024 + 1e6 * 120)  # to sort, and for 10 parts
    assert balance.disk_bytes == pytest.approx(1e6 * (sorted_row_bytes(512) + 20 + 25))
    assert balance.gpu_bytes == 2 * 100_000 * 1024
    fit = costs.cluster(DATA, GPU, dim=512, num_centers=1000, num_iterations=10, points_per_center=100)
    assert fit.gpu_seconds == pytest.approx((10 * 1e5 + 7.5e5) * 1000 * 1024 / (1e15 * constant("tile_utilisation")))
    machines = costs.Machines(gpu=GPU, num_gpus=4, price=2.0)
    head = costs.HeadSize(num_centers=1000, dim=512)
    train, whole, on_host = (
        costs.train(DATA, machines, TOWERS, replace(head, **changes), epochs=2.0, global_batch=1024)  # type: ignore[arg-type]
        for changes in ({"sample_rate": 0.5}, {"sample_rate": 1.0}, {"sample_rate": 0.5, "state": "host"})
    )
    towers = 1.5e6 * 30e9 / (1e15 * constant("train_utilisation"))
    assert train.gpu_seconds - towers == pytest.approx((whole.gpu_seconds - towers) / 2)
    assert train.seconds(machines) == train.gpu_seconds / 4
    assert train.price(machines) == pytest.approx(train.gpu_seconds / 1800)
    assert train.gpu_bytes - on_host.gpu_bytes == 250 * (2 * 4 * 512 + 8)  # a quarter of the rows on each of four
    # Weight, two moments, the sampled rows and their gradient; a count of every row.
    assert replace(head, sample_rate=0.1).memory().device == 1000 * 512 * 4 * 3.2 + 8 * 1000


def test_laion_on_h100_takes_the_published_gpu_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brute force over LAION-400M x 1280 at 200 TFLOP/s is 569 GPU-hours; symmetry halves it."""
    plan = main(Config(num_gpus=64, price_per_gpu_hour=2.5, out=str(tmp_path / "plan.json")))
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    rate = GPUS["h100"].peak_flops * constant("tile_utilisation")
    assert stages["balance"]["gpu_seconds"] / 3600 == pytest.approx(569 / 2 * 200e12 / rate, rel=0.01)
    assert stages["balance"]["seconds"] == pytest.approx(stages["balance"]["gpu_seconds"] / 64)
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(plan))
    page = capsys.readouterr().out
    assert "64 x H100 SXM" in page
    assert all(value["source"] in page for value in plan["constants"].values())


@pytest.mark.parametrize("flags", [{"num_gpus": 0}, {"removed_ratio": 1.0}, {"sample_rate": 0.0}, {"epochs": 0.0}])
def test_sizes_that_make_no_sense_are_named(flags: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(flags))):
        Config(**flags)  # type: ignore[arg-type]
