"""However the towers run in one process (compiled, recomputed, in bfloat16), the gradients are the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from distilclip.errors import InputError
from distilclip.train.parallel import clip_gradients_, non_finite_gradients
from distilclip.train.settings import Execution
from distilclip.train.step import Student
from tests.train.made import make_student
from tests.train.test_parallel import EVERYTHING, N, assert_equal, one_step


def forwards(student: Student) -> list[str]:
    """The towers' blocks, each time that one of them begins to run; the list grows as they do."""
    begun: list[str] = []
    for name, module in student.clip.model.named_modules():
        if re.fullmatch(r".*resblocks\.\d+", name):
            module.register_forward_pre_hook(lambda *_, name=name: begun.append(name))
    return begun


@pytest.mark.parametrize(("activations", "passes"), [("keep", 1), ("recompute", 2)])
def test_recomputed_activations_give_the_same_gradients(activations: str, passes: int, tiny_clip_json: str) -> None:
    expected = one_step(make_student(tiny_clip_json), EVERYTHING, micro_batch=N)
    student = make_student(tiny_clip_json, execution=Execution(activations=activations))
    student.clip.model.train()
    begun = forwards(student)
    assert_equal(one_step(student, EVERYTHING, micro_batch=N), expected)
    assert Counter(begun)["transformer.resblocks.0"] == passes
    assert Counter(begun)["visual.transformer.resblocks.1"] == 2 * passes  # masked pictures too
    assert_equal(one_step(student, EVERYTHING, micro_batch=6), expected)


def test_bfloat16_towers_stay_near_the_float32_loss_and_gradient(tiny_clip_json: str) -> None:
    expected = one_step(make_student(tiny_clip_json), EVERYTHING, micro_batch=N)
    found = one_step(make_student(tiny_clip_json, precision=torch.bfloat16), EVERYTHING, micro_batch=N)
    assert found.loss != expected.loss
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    whole_gradients = [
        torch.cat([outcome.gradients[name].flatten() for name in expected.gradients]) for outcome in (found, expected)
    ]
    assert bool(torch.isfinite(whole_gradients[0]).all())
    assert torch.cosine_similarity(*whole_gradients, dim=0) > 0.99


def assert_compiled_equals_eager(architecture: str) -> None:
    expected = one_step(make_student(architecture), EVERYTHING, micro_batch=N)
    student = make_student(architecture, execution=Execution(compile="default"))
    assert_equal(one_step(student, EVERYTHING, micro_batch=N), expected)


@pytest.mark.slow
def test_compiled_towers_give_the_same_gradients(tiny_clip_json: str) -> None:
    # In a process of its own: torch.compile cannot trace the type checks that pytest adds to every function.
    code = "import sys; from tests.train import test_execution as t; t.assert_compiled_equals_eager(sys.argv[1])"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code, tiny_clip_json], check=True, env={**os.environ, "PYTHONPATH": path})


def test_a_gradient_that_is_no_number_leaves_the_others_for_the_report() -> None:
    good, bad = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    good.grad, bad.grad = torch.full((2,), 3.0), torch.tensor([1.0, torch.nan])
    assert torch.isnan(clip_gradients_([good, bad], sharded=[], max_norm=1.0))
    assert non_finite_gradients({"good": good, "bad": bad}) == ["bad"]
    bad.grad = torch.tensor([1.0, torch.inf])
    assert torch.isinf(clip_gradients_([good, bad], sharded=[], max_norm=1.0))
    assert non_finite_gradients({"good": good, "bad": bad}) == ["bad"]


def test_a_model_without_checkpointing_is_named(tiny_clip_json: str) -> None:
    vision = {"timm_model_name": "pit_ti_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    architecture = json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})
    with pytest.raises(InputError, match=r"cannot recompute its activations .*Use --activations keep"):
        make_student(architecture, execution=Execution(activations="recompute"))


def test_batch_norms_and_recomputed_activations_exclude_each_other(tiny_clip_json: str) -> None:
    vision = {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    architecture = json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})
    with pytest.raises(InputError, match=r"batch norms \(such as .*would see every batch twice"):
        make_student(architecture, execution=Execution(activations="recompute"))
