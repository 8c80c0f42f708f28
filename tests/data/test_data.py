"""The `data` section of a config, from the section to the batches."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from effjax.config import build
from effjax.data import Data
from effjax.errors import UsageError


def section(tmp_path, **changes):
    for label in ("a", "b"):
        (tmp_path / label).mkdir(exist_ok=True)
        for i in range(5):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / label / f"{i}.png")
    source = dict(kind="image_folder", root=str(tmp_path), mode="L")
    transforms = (dict(kind="random_flip"), dict(kind="normalize", mean=(0.5,), std=(0.5,)))
    return dict(source=source, transforms=transforms, batch_size=4, threads=0) | changes


def data(tmp_path, **changes):
    return build(Data, section(tmp_path, **changes), "config.data")


@pytest.mark.parametrize("cache", [False, True])
def test_open_train_evaluate(tmp_path, cache):
    opened = data(tmp_path, cache=cache).open()
    assert opened.num_examples == 10
    assert opened.metadata.class_names == ("a", "b")
    assert opened.tokenizer is None
    batch = next(opened.train(start=4))
    example = opened.example_batch()
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in example.items()
    }
    assert batch["image"].shape == (4, 8, 8, 1)
    assert opened.example_batch(3)["label"].shape == (3,)
    still = data(tmp_path, transforms=(), cache=cache).open()
    assert sum(int(batch["mask"].sum()) for batch in still.evaluate()) == 10
    assert not opened.bad_records


def test_packed_text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in (3, 9, 1, 6)))
    changes = dict(source=dict(kind="jsonl", path=str(path)), transforms=(), packing=dict(length=16))
    opened = data(tmp_path, **changes, batch_size=2).open()
    assert opened.num_examples == (5 * 19 + 4 - 1) // 16
    assert opened.tokenizer.vocabulary_size == 256
    assert next(opened.train())["tokens"].shape == (2, 16)
    assert opened.example_batch()["weights"].shape == (2, 16)
    scored = sum((batch["weights"] * batch["mask"][:, None]).sum() for batch in opened.evaluate())
    assert scored == 5 * 19 + 4 - 1, "every byte and every separator but the first"


def test_two_openings_give_the_same(tmp_path):
    one, two = (list(itertools.islice(data(tmp_path).open().train(), 4)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bach_size=4), r"config\.data\.bach_size is read by nobody.*'batch_size'"),
        (dict(source=dict(kind="tdfs", name="x")), r"config\.data\.source\.kind is 'tdfs'.*'tfds'"),
        (dict(source=dict(kind="tfds", nmae="x")), r"config\.data\.source\.nmae.*'name'"),
        (dict(transforms=(dict(kind="random_flp"),)), r"config\.data\.transforms.*'random_flip'"),
        (dict(packing=dict(lenght=8)), r"config\.data\.packing\.lenght.*'length'"),
        (dict(packing=dict(length=0)), r"config\.data\.packing: length=0 must be at least 1"),
        (dict(batch_size="4"), r"config\.data\.batch_size"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(max_bad_share=1.5), r"max_bad_share=1\.5 must be a share"),
    ],
)
def test_what_a_section_cannot_say(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        data(tmp_path, **changes)


def test_a_batch_larger_than_an_epoch(tmp_path):
    with pytest.raises(UsageError, match=r"batch_size=16 is more than the 10 examples.*at most 10"):
        data(tmp_path, batch_size=16).open().train()


@pytest.fixture
def expected():
    return dict(
        examples=10, fields=dict(image=dict(shape=(None, None, 1), dtype="uint8"), label=dict(dtype="int64"))
    )


def shapes(described):
    return {k: (v.shape, v.dtype) for k, v in described.example_batch(3).items()}


def test_absent_pictures_have_the_shapes_of_those_that_are_there(tmp_path, expected):
    resize = (dict(kind="resize", size=(4, 4)), dict(kind="to_float"))
    present = data(tmp_path, transforms=resize, expected=expected)
    absent = data(
        tmp_path, source=dict(kind="image_folder", root="nowhere"), transforms=resize, expected=expected
    )
    assert shapes(absent.described()) == shapes(present.open())
    assert absent.described().num_examples == 10


def test_absent_text_follows_from_its_packing(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "word " * 40}) + "\n")
    changes = dict(transforms=(), packing=dict(length=16))
    present = data(tmp_path, source=dict(kind="jsonl", path=str(path)), **changes)
    absent = data(tmp_path, source=dict(kind="jsonl", path="nowhere"), **changes)
    assert shapes(absent.described()) == shapes(present.open())
    assert absent.described().num_examples is None


def test_an_expectation_that_is_wrong_is_named(tmp_path, expected):
    expected["fields"]["image"] = dict(shape=(None, None, 3), dtype="uint8")
    with pytest.raises(
        UsageError, match=r"fields.image says \(None, None, 3\) uint8, and the source has \(8, 8, 1\)"
    ):
        data(tmp_path, expected=expected).open().example_batch()


def test_data_that_is_neither_here_nor_expected(tmp_path):
    with pytest.raises(UsageError, match="say in the config what it holds"):
        data(tmp_path, source=dict(kind="image_folder", root="nowhere")).described()
