from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.samples import decode_image
from distilclip.errors import InputError
from distilclip.evaluate.encode import Encoding, KeptPixels, encode_images, encode_texts
from distilclip.models.clip import Clip, load_clip
from distilclip.sets.dataset import ImageRef
from tests.conftest import encoded, picture, write_tar


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: str) -> Clip:
    return load_clip(tiny_clip_folder)


def write_pictures(folder: Path, num_images: int) -> list[ImageRef]:
    folder.mkdir()
    refs = []
    for number in range(num_images):
        path = folder / f"{number}.jpg"
        path.write_bytes(encoded(picture(number)))
        refs.append(ImageRef(uri=str(path)))
    return refs


def test_features_equal_the_models_own_on_each_image_alone(clip: Clip, tmp_path: Path) -> None:
    refs = write_pictures(tmp_path / "x", 5)
    found = encode_images(clip, refs, outputs=("embedding", "backbone"), encoding=Encoding(batch_size=2))
    for row, ref in enumerate(refs):
        pixels = clip.preprocess(decode_image(Path(ref.uri).read_bytes()))[None]
        with torch.no_grad():
            torch.testing.assert_close(found.embedding[row : row + 1], clip.encode_image(pixels))
            torch.testing.assert_close(found.features["backbone"][row : row + 1], clip.backbone_features(pixels))
    torch.testing.assert_close(found.embedding.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(clip: Clip, tmp_path: Path, num_workers: int) -> None:
    refs = write_pictures(tmp_path / "x", 7)
    alone = encode_images(clip, refs, encoding=Encoding(batch_size=3))
    shared = encode_images(clip, refs, encoding=Encoding(batch_size=3, num_workers=num_workers))
    assert torch.equal(alone.embedding, shared.embedding)


def test_files_and_samples_of_a_tar_give_the_same_features(clip: Clip, tmp_path: Path) -> None:
    from distilclip.data.shards import open_shard

    refs = write_pictures(tmp_path / "x", 3)
    uri = write_tar(tmp_path / "a.tar", [(os.path.basename(r.uri), Path(r.uri).read_bytes()) for r in refs])
    samples = [ImageRef(uri=uri, key=e.key, offset=e.offset, size=e.size) for e in open_shard(uri).index()]
    assert torch.equal(encode_images(clip, refs).embedding, encode_images(clip, samples).embedding)


def test_a_border_is_cut_off_before_anything_else(clip: Clip, tmp_path: Path) -> None:
    inner = picture(3)
    framed = Image.new("RGB", (inner.width + 4, inner.height + 4), (255, 0, 0))
    framed.paste(inner, (2, 2))
    refs = []
    for name, image, border in (("inner.png", inner, 0), ("framed.png", framed, 2)):
        (tmp_path / name).write_bytes(encoded(image, "PNG"))
        refs.append(ImageRef(uri=str(tmp_path / name), border=border))
    found = encode_images(clip, refs).embedding
    assert torch.equal(found[0], found[1])
    whole = encode_images(clip, [dataclasses.replace(refs[1], border=0)]).embedding
    assert not torch.equal(found[0], whole[0])


def test_an_unreadable_image_raises_and_names_itself(clip: Clip, tmp_path: Path) -> None:
    refs = write_pictures(tmp_path / "x", 3)
    Path(refs[1].uri).write_bytes(Path(refs[1].uri).read_bytes()[:300])
    with pytest.raises(InputError, match=r"x/1\.jpg: truncated image"):
        encode_images(clip, refs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_left_out_and_counted_by_reason(clip: Clip, tmp_path: Path, num_workers: int) -> None:
    refs = write_pictures(tmp_path / "x", 6)
    whole = encode_images(clip, refs)
    Path(refs[1].uri).write_bytes(b"no image at all")
    refs[4] = dataclasses.replace(refs[4], error="duplicate key")
    found = encode_images(
        clip,
        refs,
        encoding=Encoding(batch_size=2, num_workers=num_workers),
        policy=ErrorPolicy("skip", max_bad_ratio=0.5),
    )
    assert found.rows.tolist() == [0, 2, 3, 5]
    assert sorted(error for _, error in found.unreadable) == ["duplicate key", "not an image"]
    assert found.num_unreadable == 2
    torch.testing.assert_close(found.embedding, whole.embedding[found.rows])


def test_too_many_unreadable_images_stop_even_where_they_are_skipped(clip: Clip, tmp_path: Path) -> None:
    refs = write_pictures(tmp_path / "x", 4)
    Path(refs[2].uri).write_bytes(b"no image at all")
    with pytest.raises(InputError, match="1 of 4 samples cannot be used"):
        encode_images(clip, refs, policy=ErrorPolicy("skip", max_bad_ratio=0.1))


def test_no_readable_image_at_all_is_an_error(clip: Clip, tmp_path: Path) -> None:
    refs = [dataclasses.replace(ref, error="duplicate key") for ref in write_pictures(tmp_path / "x", 2)]
    with pytest.raises(InputError, match="None of the 2 images"):
        encode_images(clip, refs, policy=ErrorPolicy("skip", max_bad_ratio=1.0))


def test_a_file_changed_since_it_was_indexed_is_noticed(clip: Clip, tmp_path: Path) -> None:
    uri = write_tar(tmp_path / "a.tar", [("0.jpg", encoded(picture(0)))])
    with pytest.raises(InputError, match="found '0' in its place"):
        encode_images(clip, [ImageRef(uri=uri, key="other", offset=0, size=os.path.getsize(uri))])


def test_a_broken_model_is_named(tiny_clip_folder: str, tmp_path: Path) -> None:
    clip = load_clip(tiny_clip_folder)
    with torch.no_grad():
        clip.model.visual.proj.fill_(torch.nan)
        clip.model.text_projection.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinite"):
        encode_images(clip, write_pictures(tmp_path / "x", 1))
    with pytest.raises(InputError, match="NaN or infinite"):
        encode_texts(clip, ["a cat"])


def test_texts_in_any_batches_are_the_same_unit_rows(clip: Clip) -> None:
    texts = [f"picture number {i}" for i in range(5)]
    some = encode_texts(clip, texts, encoding=Encoding(batch_size=2))
    torch.testing.assert_close(some, encode_texts(clip, texts))
    torch.testing.assert_close(some.norm(dim=1), torch.ones(5))


def test_bf16_is_near_fp32(clip: Clip, tmp_path: Path) -> None:
    refs = write_pictures(tmp_path / "x", 2)
    coarse = encode_images(clip, refs, encoding=Encoding(dtype=torch.bfloat16))
    assert coarse.embedding.dtype == torch.float32
    assert (coarse.embedding * encode_images(clip, refs).embedding).sum(dim=1).min() > 0.99


def test_kept_pictures_are_not_read_again(clip: Clip, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "x", 10)
    encoding = Encoding(batch_size=4)
    expected = encode_images(clip, images, encoding=encoding)
    num_bytes = 4 * 3 * clip.image_size**2 * 4  # of a batch
    kept, some = KeptPixels(), KeptPixels(budget=num_bytes)
    for pixels in (kept, some):
        first = encode_images(clip, images, encoding=encoding, kept=pixels)
        torch.testing.assert_close(first.embedding, expected.embedding, rtol=0, atol=0)
    for image in images:
        Path(image.uri).unlink()
    again = encode_images(clip, images, encoding=encoding, kept=kept)
    torch.testing.assert_close(again.embedding, expected.embedding, rtol=0, atol=0)
    partly = encode_images(clip, images, encoding=encoding, kept=some, policy=ErrorPolicy("skip", 1.0))
    assert partly.rows.tolist() == [0, 1, 2, 3]  # the one batch that there was room for
    torch.testing.assert_close(partly.embedding, expected.embedding[:4], rtol=0, atol=0)
