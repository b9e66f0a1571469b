"""The built-in perceptual embedding: copies lie near each other, without a teacher."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.fft import dctn

import distilclip as dc
from distilclip.data.side_files import read_groups
from distilclip.errors import InputError
from distilclip.models.clip import Clip, load_clip
from tests.conftest import encoded, picture, write_tar


@pytest.fixture(scope="module")
def perceptual() -> Clip:
    return load_clip("perceptual")


def test_the_embedding_is_the_weighted_cosine_transform(perceptual: Clip) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = perceptual.model.encode_image(pixels).numpy()
    frequency = np.hypot(*np.mgrid[:16, :16])
    for row, (red, green, blue) in zip(found, pixels.double().numpy(), strict=True):
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        expected = (dctn(luminance, norm="ortho")[:16, :16] * frequency).ravel()[1:]
        np.testing.assert_allclose(row[:255], expected, atol=1e-4)
        for start, difference in ((255, (blue - luminance) * 0.5 / 0.886), (271, (red - luminance) * 0.5 / 0.701)):
            weight = 0.3 * np.maximum(frequency[:4, :4], 0.7)
            expected = (dctn(difference, norm="ortho")[:4, :4] * weight).ravel()
            np.testing.assert_allclose(row[start : start + 16], expected, atol=2e-3)


def test_brightness_and_contrast_do_not_count(perceptual: Clip) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain, changed = (perceptual.encode_image(p) for p in (pixels, 0.4 * pixels + 0.3))
    assert (plain * changed).sum(dim=1).min() > 0.999
    assert (plain[0] @ plain[1]).abs() < 0.5


def test_pictures_of_one_colour_are_near_each_other_and_have_a_length(perceptual: Clip) -> None:
    grey = torch.tensor([0.2, 0.8])[:, None, None, None].expand(2, 3, 32, 32)
    embeddings = perceptual.encode_image(grey)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert embeddings[0] @ embeddings[1] > 0.999
    texts = perceptual.encode_text(perceptual.tokenizer(["a cat", "two dogs"]))
    torch.testing.assert_close(texts[0], texts[1])


def copies(image: Image.Image) -> list[bytes]:
    small = image.resize((image.width // 2, image.height * 2 // 3), Image.Resampling.BICUBIC)
    pale = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(0.8)).enhance(0.5)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return [buffer.getvalue(), encoded(small), encoded(pale), encoded(image), encoded(image)]


def test_balance_finds_copies_of_any_folder_without_a_teacher(tmp_path: Path, tiny_clip_json: str) -> None:
    num = 12
    pictures = [picture(seed, size=(96, 72)) for seed in range(num)]
    members = [
        (f"{number:02}-{copy}.{suffix}", content)
        for number, image in enumerate(pictures)
        for copy, data in enumerate(copies(image))
        for suffix, content in (("jpg", data), ("txt", b"a picture"))
    ]
    data, store, groups = write_tar(tmp_path / "0.tar", members), str(tmp_path / "store"), str(tmp_path / "groups")
    result = dc.stages.embed(data=[data], out=store, model="perceptual", num_workers=0)
    assert result["teacher"]["name"] == "perceptual"
    balanced = dc.stages.balance(store=store, out=groups, metric="cosine", threshold=0.1, rule="cover")
    assert balanced["num_kept"] == num
    assert (read_groups(groups, 0).group.reshape(num, 5) == 5 * np.arange(num)[:, None]).all()
    options = {"data": [data], "store": store, "student": tiny_clip_json, "out": str(tmp_path / "student")}
    with pytest.raises(InputError, match=r"holds perceptual embeddings: they find copies and teach nothing"):
        dc.stages.train(**options, objective="clip-kd", num_steps=1, warmup_steps=0, batch_size=4, num_workers=0)
