from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from distilclip.errors import InputError
from distilclip.models.clip import Clip, create_clip
from distilclip.models.inheritance import even_layers, inherit, leading

TEACHER: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 5, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 200, "width": 48, "heads": 3, "layers": 5},
}


def clip(
    seed: int = 0, *, embed_dim: int = 24, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> Clip:
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {**TEACHER["vision_cfg"], **(vision or {})},
        "text_cfg": {**TEACHER["text_cfg"], **(text or {})},
    }
    return create_clip(json.dumps(config), seed=seed)


def outputs(model: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(torch.randint(1, 199, (2, 12), generator=generator))


def test_layers_are_spread_evenly() -> None:
    assert even_layers(12, 24) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert even_layers(3, 5) == [0, 2, 4]
    assert even_layers(5, 5) == [0, 1, 2, 3, 4]
    assert even_layers(1, 5) == [4]


def test_a_slice_takes_the_leading_rows_of_every_part() -> None:
    fused = torch.arange(6 * 3).view(6, 3).float()  # q, k and v of two rows each
    assert leading(fused, (3, 2), parts=3).tolist() == [[0, 1], [6, 7], [12, 13]]
    assert leading(fused, (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert leading(torch.tensor(3.0), ()) == 3


def test_an_equal_student_becomes_the_teacher() -> None:
    teacher, student = clip(1), clip(2)
    assert inherit(student, teacher) == []
    assert student.digest == teacher.digest


def test_a_shallower_student_is_the_teacher_without_the_layers_that_did_nothing() -> None:
    teacher = clip(1)
    for blocks in (teacher.model.visual.transformer.resblocks, teacher.model.transformer.resblocks):
        for layer in (1, 3):
            for linear in (blocks[layer].attn.out_proj, blocks[layer].mlp.c_proj):
                torch.nn.init.zeros_(linear.weight)
                torch.nn.init.zeros_(linear.bias)
    student = clip(2, vision={"layers": 3}, text={"layers": 3})
    assert inherit(student, teacher) == []
    for own, expected in zip(outputs(student), outputs(teacher), strict=True):
        assert torch.allclose(own, expected, atol=1e-5)


def test_a_narrower_student_has_the_leading_heads_and_channels() -> None:
    teacher, student = clip(1), clip(2, embed_dim=16, vision={"width": 32}, text={"width": 16, "heads": 1})
    assert inherit(student, teacher) == []
    theirs, own = teacher.model.state_dict(), student.model.state_dict()
    qkv = theirs["visual.transformer.resblocks.2.attn.in_proj_weight"].view(3, 3, 16, 48)  # part, head, channel
    assert torch.equal(own["visual.transformer.resblocks.2.attn.in_proj_weight"].view(3, 2, 16, 32), qkv[:, :2, :, :32])
    assert torch.equal(
        own["transformer.resblocks.4.mlp.c_fc.weight"], theirs["transformer.resblocks.4.mlp.c_fc.weight"][:64, :16]
    )
    assert torch.equal(own["text_projection"], theirs["text_projection"][:16, :16])
    assert torch.equal(own["token_embedding.weight"], theirs["token_embedding.weight"][:, :16])
    assert own["logit_scale"] == theirs["logit_scale"]
    assert outputs(student)[0].isfinite().all()


def test_one_tower_leaves_the_other_alone() -> None:
    teacher, student, untouched = clip(1), clip(2), clip(2)
    inherit(student, teacher, towers=("text",))
    image, text = outputs(student)
    assert torch.equal(image, outputs(untouched)[0])
    assert torch.equal(text, outputs(teacher)[1])


def test_another_patch_size_keeps_its_own_patches_and_resizes_positions() -> None:
    teacher, student = clip(1), clip(2, vision={"patch_size": 16})
    before = student.model.visual.conv1.weight.clone()
    positions = torch.zeros(17, 48)
    positions[0], positions[1:] = 1.0, torch.arange(16.0)[:, None] // 8  # class token; upper half 0, lower half 1
    with torch.no_grad():
        teacher.model.visual.positional_embedding.copy_(positions)
    assert inherit(student, teacher) == ["visual.conv1.weight"]
    assert torch.equal(student.model.visual.conv1.weight, before)
    found = student.model.visual.positional_embedding[:, 0]
    assert found[0] == 1
    assert (found[1:3] < 0.2).all()
    assert (found[3:] > 0.8).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"layers": 6}}, "has 6 layers"),
        ({"text": {"width": 64, "heads": 4}}, "larger than"),
        ({"vision": {"width": 32, "head_width": 8}}, r"heads of \[8, 16\] channels"),
        ({"vision": {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear"}}, "of another kind"),
    ],
)
def test_what_cannot_be_inherited_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inherit(clip(2, **changes), clip(1))
