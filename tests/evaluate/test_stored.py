from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.evaluate.embedders import ModelEmbedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.protocol import Protocol
from distilclip.evaluate.stored import StoreEmbedder
from distilclip.models.clip import load_clip
from distilclip.sets.dataset import PairSet
from distilclip.sets.open import load_set
from distilclip.stages import embed
from tests.conftest import encoded, picture, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: str) -> tuple[str, str]:
    """A store and the tar that it was made from; captions and labels beside the pictures, one caption missing."""
    folder = tmp_path_factory.mktemp("stored")
    members = []
    for number in range(8):
        members += [(f"{number}.jpg", encoded(picture(number))), (f"{number}.cls", str(number % 2).encode())]
        if number != 3:
            members += [(f"{number}.txt", f"picture {number}".encode())]
    tar = write_tar(folder / "test-0.tar", members)
    store = str(folder / "store")
    embed.main(
        embed.Config(out=store, data=(tar,), model=tiny_clip_folder, device="cpu", num_workers=0, max_bad_ratio=0.5)
    )
    return store, tar


def pairs_of(tar: str) -> PairSet:
    found = load_set(f"pairs:{tar}")
    assert isinstance(found, PairSet)
    return found


def test_retrieval_from_a_store_equals_that_of_its_model(made: tuple[str, str], tiny_clip_folder: str) -> None:
    store, tar = made
    protocol = Protocol(tasks=("retrieval",), on_error="skip", max_bad_ratio=0.5)
    stored, live = (
        protocol.measure(model, pairs_of(tar)).scores
        for model in (StoreEmbedder(store, name="s"), ModelEmbedder(load_clip(tiny_clip_folder), Encoding()))
    )
    assert {s.metric: s.value for s in stored} == {s.metric: s.value for s in live}
    assert stored[0].num_test == 7
    assert stored[0].num_unreadable == 1


def test_a_store_is_a_teacher_to_agree_with(made: tuple[str, str], tiny_clip_folder: str) -> None:
    store, tar = made
    dataset = load_set(f"tar:{tar}")
    protocol = Protocol(tasks=("agreement",), on_error="skip", max_bad_ratio=0.5)
    view = protocol.view(StoreEmbedder(store, name="teacher"), dataset)  # type: ignore[arg-type]
    model = ModelEmbedder(load_clip(tiny_clip_folder), Encoding())
    found = {s.metric: s for s in protocol.measure(model, dataset, teacher=view).scores}
    assert found["cosine"].value == pytest.approx(1, abs=1e-3)  # half precision
    assert found["cka"].value == pytest.approx(1, abs=1e-3)
    assert found["cka"].num_test == 7  # the model reads all eight, the store has seven
    assert found["top1_agreement"].value is None


def test_what_a_store_cannot_do_is_said(made: tuple[str, str], tmp_path: Path) -> None:
    store, tar = made
    model = StoreEmbedder(store, name="s")
    (tmp_path / "classnames.txt").write_text("dark\nlight\n")
    copy = tmp_path / "test-0.tar"
    copy.write_bytes(Path(tar).read_bytes())
    protocol = Protocol(tasks=("zero-shot", "linear-probe", "retrieval"))
    elsewhere = protocol.measure(model, load_set(f"tar:{tmp_path}")).scores
    assert [s.task for s in elsewhere] == ["zero-shot", "linear-probe"]
    assert all("the store was not made from" in s.reason for s in elsewhere)
    here = Protocol(tasks=("zero-shot",), on_error="skip", max_bad_ratio=0.5).measure(model, load_set(f"tar:{tar}"))
    assert "numbers but no names" in here.scores[0].reason
    with pytest.raises(InputError, match="3: no caption"):
        protocol.measure(model, pairs_of(tar))
    assert model.captions(pairs_of(tar), [0], prefix="a ") is None
    assert model.lacks(pairs_of(tar).images, ("backbone",)).startswith("a store holds no features before")


def test_embeddings_are_those_of_the_store_at_unit_length(made: tuple[str, str]) -> None:
    store, tar = made
    found = StoreEmbedder(store, name="s").images(
        pairs_of(tar).images, ("embedding",), policy=ErrorPolicy("skip", 0.5), name="x"
    )
    assert found.rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found.embedding.norm(dim=1), torch.ones(7))
