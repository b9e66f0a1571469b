from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distilclip.data.crops import Augmentation, Crop
from distilclip.data.decode import decode_crop
from distilclip.data.samples import BadSample, decode_image
from distilclip.errors import InputError
from tests.conftest import encoded, picture

WHOLE = Crop(0.0, 0.0, 1.0, 1.0)


def decoded(data: bytes, size: int, crop: Crop = WHOLE, **options: Any) -> np.ndarray:
    return decode_crop(data, [size], draw=lambda width, height: crop, **options)[0].permute(1, 2, 0).numpy()


def by_pillow(image: Image.Image, size: int, crop: Crop = WHOLE) -> np.ndarray:
    box = [round(crop.left * image.width), round(crop.top * image.height)]
    box += [round(crop.right * image.width), round(crop.bottom * image.height)]
    shown = np.asarray(image.crop(tuple(box)).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return shown[:, ::-1] if crop.flip else shown


@pytest.mark.parametrize("crop", [WHOLE, Crop(0.1, 0.2, 0.83, 0.9), Crop(0.0, 0.5, 0.5, 1.0, flip=True)])
@pytest.mark.parametrize("size", [24, 64])
def test_a_crop_is_pillows_to_one_level(crop: Crop, size: int) -> None:
    data = encoded(picture(3, (72, 56)))
    assert np.abs(decoded(data, size, crop) - by_pillow(decode_image(data), size, crop)).max() <= 1


@pytest.mark.parametrize(("size", "reduction"), [(16, 8), (32, 4), (50, 4), (60, 2), (104, 1)])
def test_a_jpeg_is_decoded_no_larger_than_the_crop_needs(size: int, reduction: int) -> None:
    data = encoded(picture(5, (400, 304)))
    reduced = Image.open(io.BytesIO(data))
    reduced.draft("RGB", (400 // reduction, 304 // reduction))
    assert reduced.size == (400 // reduction, 304 // reduction)
    assert np.abs(decoded(data, size) - by_pillow(reduced.convert("RGB"), size)).max() <= 1


def test_a_small_crop_keeps_the_detail_of_a_large_picture() -> None:
    data = encoded(picture(5, (400, 304)))
    corner = Crop(0.0, 0.0, 0.1, 0.125)
    assert np.abs(decoded(data, 38, corner) - by_pillow(decode_image(data), 38, corner)).max() <= 1


def test_several_sizes_show_one_crop() -> None:
    draws = []

    def draw(width: int, height: int) -> Crop:
        draws.append((width, height))
        return Crop(0.25, 0.25, 0.75, 0.75)

    small, large = decode_crop(encoded(picture(1, (80, 64))), [16, 32], draw=draw)
    assert draws == [(80, 64)]
    assert small.shape == (3, 16, 16)
    halved = np.asarray(Image.fromarray(large.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BOX)).astype(
        int
    )
    assert np.abs(small.permute(1, 2, 0).numpy() - halved).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_of_the_upright_picture(orientation: int) -> None:
    image = picture(2, (72, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    upright = decode_image(buffer.getvalue())
    seen = []

    def draw(width: int, height: int) -> Crop:
        seen.append((width, height))
        return Crop(0.0, 0.0, 0.5, 0.5)

    shown = decode_crop(buffer.getvalue(), [20], draw=draw)[0].permute(1, 2, 0).numpy()
    assert seen == [upright.size]
    assert np.abs(shown - by_pillow(upright, 20, Crop(0.0, 0.0, 0.5, 0.5))).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_decode_as_elsewhere(mode: str) -> None:
    data = encoded(picture(4).convert(mode))
    assert np.abs(decoded(data, 20) - by_pillow(decode_image(data), 20)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_other_formats_decode_as_elsewhere(format: str) -> None:
    data = encoded(picture(4), format)
    assert np.abs(decoded(data, 20) - by_pillow(decode_image(data), 20)).max() <= 1


def test_damaged_files_are_judged_as_elsewhere() -> None:
    """What embed could use, training can, and shows it alike."""
    data = encoded(picture(7, (96, 96)))
    random = np.random.default_rng(0)
    verdicts = set()
    for _ in range(150):
        cut = random.choice([len(data), len(data) - 2, random.integers(len(data) // 3, len(data))])
        broken = bytearray(data[:cut])
        broken[random.integers(len(broken))] = random.integers(256)
        try:
            expected = by_pillow(decode_image(bytes(broken)), 40)
        except BadSample as error:
            verdicts.add(error.reason)
            with pytest.raises(BadSample, match=error.reason):
                decoded(bytes(broken), 40)
        else:
            verdicts.add("usable")
            assert np.abs(decoded(bytes(broken), 40) - expected).max() <= 1
    assert {"usable", "truncated image"} <= verdicts


def test_a_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(BadSample, match=r"here: too many pixels: 40 x 32"):
        decoded(encoded(picture(1)), 8, max_pixels=40 * 32 - 1, where="here")


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (500, 3), (3, 500)])
def test_the_crop_lies_inside_and_shows_the_stated_share(size: tuple[int, int]) -> None:
    for seed in range(200):
        crop = Augmentation(min_crop=0.6).draw(*size, generator(seed))
        assert 0 <= crop.left < crop.right <= 1 + 1e-9
        assert 0 <= crop.top < crop.bottom <= 1 + 1e-9
        if size == (40, 30):  # aspects of 3/4 to 4/3 fit, so only the largest areas are clipped
            assert (crop.right - crop.left) * (crop.bottom - crop.top) >= 0.55


def test_areas_aspects_and_flips_are_spread_as_stated() -> None:
    crops = [Augmentation(min_crop=0.2, flip=0.3).draw(1000, 1000, generator(seed)) for seed in range(2000)]
    area = np.array([(c.right - c.left) * (c.bottom - c.top) for c in crops])
    aspect = np.array([(c.right - c.left) / (c.bottom - c.top) for c in crops])
    free = (area < 0.5) & (area > 0.2)  # no crop so small is narrowed by the picture
    assert np.allclose(np.quantile(np.log(aspect[free]), [0.01, 0.5, 0.99]), np.log([0.755, 1, 1.325]), atol=0.05)
    assert (area < 0.5).mean() == pytest.approx(0.3 / 0.8, abs=0.04)
    assert np.mean([crop.flip for crop in crops]) == pytest.approx(0.3, abs=0.03)


def test_the_crop_is_a_function_of_the_generator_and_not_of_the_share_of_flips() -> None:
    first, again, other = (Augmentation(min_crop=0.5).draw(40, 30, generator(seed)) for seed in (1, 1, 2))
    assert first == again != other
    mirrored = Augmentation(min_crop=0.5, flip=1.0).draw(40, 30, generator(1))
    assert mirrored.flip
    assert (mirrored.left, mirrored.bottom) == (first.left, first.bottom)


def test_the_whole_square_picture_is_one_crop() -> None:
    widest = max(
        crop.right - crop.left for crop in (Augmentation(min_crop=1.0).draw(32, 32, generator(i)) for i in range(9))
    )
    assert widest == 1


@pytest.mark.parametrize(
    ("values", "message"), [({"min_crop": 0.0}, "min_crop is 0.0"), ({"flip": 1.5}, "flip is 1.5")]
)
def test_shares_that_are_none_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation(**values)
