from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distilclip.errors import InputError
from distilclip.measures.retrieval import retrieval, retrieval_ranks

Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def coarse(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    """Rows of a few whole numbers: products are exact, and ties are everywhere."""
    return torch.randint(0, 4, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed)).float()


def noisy_pairs(num_images: int, captions_each: int, dim: int, seed: int) -> Pairs:
    """Unit embeddings; captions lie around their images."""
    random = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(num_images, dim, generator=random), dim=1)
    image_of_text = torch.arange(num_images).repeat_interleave(captions_each)
    noise = torch.randn(len(image_of_text), dim, generator=random) / dim**0.5
    return image, F.normalize(image[image_of_text] + 4 * noise, dim=1), image_of_text


def unit(num_rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive_ranks(image: torch.Tensor, text: torch.Tensor, image_of_text: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sort every list of similarities in float64, look for the first own entry."""
    # One by one, because a library may add up the same numbers in another order at the edge of a matrix.
    scores = torch.stack([(row.double() * text.double()).sum(dim=1) for row in image])
    captions = scores.argsort(dim=1, descending=True, stable=True)
    images = scores.T.argsort(dim=1, descending=True, stable=True)
    image_ranks = [[int(image_of_text[j]) for j in captions[i]].index(i) for i in range(len(image))]
    return image_ranks, [images[j].tolist().index(int(image_of_text[j])) for j in range(len(text))]


@pytest.mark.parametrize("tile_elements", [1, 40, 1 << 24])
def test_ranks_equal_sorting_the_full_matrix(tile_elements: int) -> None:
    image, text = coarse(12, 3, seed=1), coarse(30, 3, seed=2)
    image_of_text = torch.cat([torch.arange(12), torch.randint(0, 12, (18,))])
    found = retrieval_ranks(image, text, image_of_text, tile_elements=tile_elements)
    assert tuple(ranks.tolist() for ranks in found) == naive_ranks(image, text, image_of_text)


def test_copies_rank_by_position_whatever_a_product_rounds_to() -> None:
    image, text, image_of_text = noisy_pairs(40, 2, 67, seed=3)
    image, text = image.repeat(3, 1), text.repeat(3, 1)
    image_of_text = torch.cat([image_of_text + 40 * copy for copy in range(3)])
    expected = naive_ranks(image, text, image_of_text)
    for tile_elements in (35, 1000, 1 << 22):
        found = retrieval_ranks(image, text, image_of_text, tile_elements=tile_elements)
        assert tuple(ranks.tolist() for ranks in found) == expected
    first, second, third = torch.tensor(expected[0]).view(3, 40)
    assert (first <= second).all()
    assert (second <= third).all()


def test_similarities_closer_than_float32_can_tell_are_told_apart() -> None:
    # The second caption is nearer by 2^-30: in float32 both products are 1.
    image = torch.tensor([[1.0, 2.0**-15], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 2.0**-15], [0.0, 1.0]])
    assert image[0] @ text[0] == image[0] @ text[1]
    image_ranks, _ = retrieval_ranks(image, text, torch.tensor([1, 0, 1]))
    assert image_ranks[0] == 0
    image_ranks, _ = retrieval_ranks(image, text, torch.tensor([0, 1, 1]))
    assert image_ranks[0] == 1


def test_a_model_that_maps_everything_to_one_point_gets_chance() -> None:
    image_ranks, text_ranks = retrieval_ranks(torch.ones(5, 4), torch.ones(10, 4), torch.arange(10) % 5)
    assert image_ranks.tolist() == [0, 1, 2, 3, 4]
    assert text_ranks.tolist() == [0, 1, 2, 3, 4] * 2


def test_lengths_other_than_one_are_taken_as_they_are() -> None:
    image, text, image_of_text = noisy_pairs(20, 3, 16, seed=4)
    text = text * torch.logspace(-3, 3, 60)[:, None]
    found = retrieval_ranks(image, text, image_of_text)
    assert tuple(ranks.tolist() for ranks in found) == naive_ranks(image, text, image_of_text)


def test_any_of_an_images_captions_counts() -> None:
    image = torch.eye(2)
    text = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]])  # the first caption of image 0 is bad, its second good
    image_ranks, text_ranks = retrieval_ranks(image, text, torch.tensor([0, 0, 1]))
    assert image_ranks.tolist() == [0, 1]
    assert text_ranks.tolist() == [1, 0, 0]


def test_permuting_images_permutes_their_ranks() -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(9, 4, generator=generator), torch.randn(18, 4, generator=generator)
    owner = torch.arange(18) % 9
    order = torch.randperm(9, generator=generator)
    image_ranks, text_ranks = retrieval_ranks(image, text, owner)
    permuted, same = retrieval_ranks(image[order], text, order.argsort()[owner])
    assert torch.equal(permuted, image_ranks[order])
    assert torch.equal(same, text_ranks)


def test_matching_pairs_are_all_found() -> None:
    x = unit(20, 8, seed=0)
    found = retrieval(x, x, torch.arange(20))
    assert found.image_to_text_recall(1) == found.text_to_image_recall(1) == 1.0


def test_recall_counts_ranks_below_k() -> None:
    image = torch.eye(3)
    text = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.9], [0.0, 0.3, 0.8]])
    found = retrieval(image, text, torch.arange(3))
    assert found.image_to_text.tolist() == [0, 1, 1]
    assert found.text_to_image.tolist() == [0, 1, 0]
    assert found.image_to_text_recall(1) == pytest.approx(1 / 3)
    assert found.text_to_image_recall(1) == pytest.approx(2 / 3)
    assert found.image_to_text_recall(2) == found.text_to_image_recall(2) == 1.0


def test_recall_grows_with_k_to_one() -> None:
    found = retrieval(unit(10, 4, seed=1), unit(30, 4, seed=2), torch.arange(30) % 10)
    recalls = [found.image_to_text_recall(k) for k in range(1, 31)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == found.text_to_image_recall(10) == 1.0


def test_the_modules_worked_example_from_tensors_arrays_and_lists() -> None:
    image, text, pairs = [[1.0, 0.0], [0.0, 1.0]], [[0.1, 0.9], [0.9, 0.1], [0.2, 0.8]], [0, 0, 1]
    arrays = np.array(image), np.array(text, np.float16), np.array(pairs, np.int32)
    arrays[0].flags.writeable = False  # as rows of a memory map are
    for given in ((image, text, pairs), arrays, tuple(map(torch.tensor, (image, text, pairs)))):
        found = retrieval(*given)
        assert found.image_to_text.tolist() == [0, 1]
        assert found.text_to_image.tolist() == [1, 0, 0]
        assert found.image_to_text_recall(1) == 1 / 2
        assert found.text_to_image_recall(1) == pytest.approx(2 / 3)


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("image", "text", "pairs", "message"),
    [
        (EYE[0], EYE, [0, 1, 2], r"image has shape \[3\] and torch.float32; give floats of shape"),
        (EYE.long(), EYE, [0, 1, 2], "image has shape .* and torch.int64; give floats"),
        (EYE[:0], EYE, [0, 1, 2], "image is empty"),
        (EYE, EYE[:, :2], [0, 1, 2], "text has 2 columns where 3 are needed"),
        (EYE, [[1.0], [2.0, 3.0]], [0, 1], "text cannot be read as an array"),
        (EYE, EYE, [0, 1], "pairs has 2 entries for 3 rows"),
        (EYE, EYE, torch.tensor([[0], [1], [2]]), r"pairs has shape \[3, 1\]"),
        (EYE, EYE, torch.tensor([0.0, 1.0, 2.0]), "pairs has .* torch.float32; give whole numbers"),
        (EYE, EYE, [0, 1, 3], r"pairs\[2\] is 3; it must be from 0 to 2"),
        (EYE, EYE, [0, -1, 2], r"pairs\[1\] is -1; it must be from 0 to 2"),
        (EYE, EYE, [0, 0, 2], "Image 1 has no caption in pairs"),
        (
            EYE,
            torch.where(EYE.bool().roll(1, 0), torch.nan, EYE),
            [0, 1, 2],
            "text holds NaN or infinity, first in row 0",
        ),
        (EYE * torch.inf, EYE, [0, 1, 2], "image holds NaN or infinity"),
    ],
)
def test_what_is_wrong_with_an_input_is_said(image: Any, text: Any, pairs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        retrieval(image, text, pairs)
