from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from effjax.config import build, describe
from effjax.data import Data
from effjax.errors import RunError, UsageError


def resolve(**section: Any) -> Data:
    return build(Data, ConfigDict(section), "config.data")


def test_digits_from_a_config(data_dir: str) -> None:
    data = resolve(
        source=dict(kind="tfds", name="digits", data_dir=data_dir),
        transforms=(dict(kind="random_shift"), dict(kind="normalize", mean=(0.5,), std=(0.5,))),
        batch_size=32,
        cache=True,
    ).open()
    assert data.num_examples == 1437
    assert data.metadata.num_classes == 10
    assert data.tokenizer is None
    batch, expected = next(data.train()), data.example_batch()
    assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {
        n: (v.shape, v.dtype) for n, v in expected.items()
    }
    assert batch["image"].shape == (32, 8, 8, 1)
    assert batch["image"].min() == -1.0
    assert len(np.unique(batch["label"])) > 4
    assert data.example_batch(1)["image"].shape == (1, 8, 8, 1)
    assert not any(value.any() for value in expected.values())


def test_caching_changes_nothing(data_dir: str) -> None:
    section = dict(source=dict(kind="tfds", name="digits", data_dir=data_dir, split="test"), batch_size=32)
    kept, read = (next(resolve(**section, cache=cache).open().train(start=640)) for cache in (True, False))
    for name in kept:
        np.testing.assert_array_equal(kept[name], read[name])


def test_documents_from_a_config(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{chr(97 + i) * 30}"}}\n' for i in range(20)))
    data = resolve(
        source=dict(kind="jsonl", path=str(path)),
        packing=dict(length=16, tokenizer=dict(kind="bytes")),
        batch_size=8,
    ).open()
    assert data.tokenizer is not None
    assert data.tokenizer.vocabulary_size == 256
    assert data.num_examples == (20 * 31 - 1) // 16
    batch, expected = next(data.train()), data.example_batch()
    assert {n: (v.shape, v.dtype) for n, v in batch.items()} == {
        n: (v.shape, v.dtype) for n, v in expected.items()
    }
    evaluated = list(data.evaluate())
    scored = sum(float((b["weights"] * b["mask"][:, None]).sum()) for b in evaluated)
    assert scored == 20 * 30
    # Two processes see the batch of one.
    halves = [next(data.train(start=8, process_index=p, process_count=2)) for p in range(2)]
    whole = next(data.train(start=8))
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[name])


def test_broken_pictures_are_reported_and_end_the_run(picture_folder: Path) -> None:
    (picture_folder / "cat" / "20.png").write_bytes(b"no picture")
    section = dict(source=dict(kind="image_folder", root=str(picture_folder)), batch_size=5)
    data = resolve(**section, max_bad_share=0.2).open()
    (batch,) = data.evaluate()
    assert batch["image"][:, 0, 0, 0].tolist() == [40, 50, 10, 30, 30]
    ((index, fault),) = data.bad_records.items()
    assert index == 3
    assert "cat/20.png" in fault
    with pytest.raises(RunError, match=r"(?s)1 of 5 records are broken.*cat/20\.png"):
        list(resolve(**section).open().evaluate())


def test_pictures_of_different_sizes_need_a_resize(picture_folder: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(picture_folder / "ant" / "big.png")
    section = dict(source=dict(kind="image_folder", root=str(picture_folder)), batch_size=6)
    with pytest.raises(UsageError, match=r"'image' has different shapes.*resize"):
        list(resolve(**section).open().evaluate())
    (batch,) = resolve(**section, transforms=(dict(kind="resize", size=(4, 4)),)).open().evaluate()
    assert batch["image"].shape == (6, 4, 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(transforms=(dict(kind="random_flipp"),)),
            r"config\.data\.transforms\[0\]\.kind is 'random_flipp'",
        ),
        (
            dict(transforms=(dict(kind="resize", sise=(4, 4)),)),
            r"config\.data\.transforms\[0\]\.sise.*'size'",
        ),
        (dict(packing=dict(lenght=3)), r"config\.data\.packing\.lenght.*'length'"),
        (dict(packing=dict(length=3, tokenizer=dict(kind="byte"))), r"packing\.tokenizer\.kind.*'bytes'"),
        (dict(source=dict(kind="folder")), r"config\.data\.source\.kind is 'folder'.*'image_folder'"),
        (dict(batch_size=0), r"config\.data: batch_size=0 must be at least 1"),
        (dict(seed=-1), r"seed=-1 must be at least 0"),
        (dict(max_bad_share=2.0), r"max_bad_share=2\.0 must be a share"),
        (dict(prefetsh=1), r"config\.data\.prefetsh.*'prefetch'"),
    ],
)
def test_a_misspelling_is_named_with_its_path(change: dict, message: str) -> None:
    section = dict(source=dict(kind="tfds", name="digits"), batch_size=4)
    with pytest.raises(UsageError, match=message):
        resolve(**(section | change))


def test_a_batch_larger_than_an_epoch_is_refused(picture_folder: Path) -> None:
    data = resolve(source=dict(kind="image_folder", root=str(picture_folder)), batch_size=6).open()
    with pytest.raises(UsageError, match=r"batch_size=6 is more than the 5 examples of an epoch"):
        data.train()


def test_a_definition_is_plain_data() -> None:
    section = dict(source=dict(kind="tfds", name="digits"), batch_size=4)
    assert resolve(**section) == resolve(**section)
    assert describe(resolve(**section))["source"]["name"] == "digits"
