import numpy as np
import pytest

from effjax.data.builders import digits
from effjax.data.sources import Tfds


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    return {split: Tfds("digits", split=split, data_dir=folder).open() for split in ("train", "test")}


def examples(reader):
    return [reader[i] for i in range(len(reader))]


def test_every_digit_is_there_once_with_its_label(splits):
    assert {name: len(reader) for name, reader in splits.items()} == {"train": 1437, "test": 360}
    import sklearn.datasets  # a second and a half, for these tests alone

    bunch = sklearn.datasets.load_digits()
    truth = {
        image.astype(int).tobytes(): int(label)
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    assert len(truth) == 1797  # the pixels alone identify a digit
    seen = {}
    for reader in splits.values():
        for example in examples(reader):
            image = example["image"]
            assert image.shape == (8, 8, 1)
            assert image.dtype == np.uint8
            counts = np.round(image[..., 0] * (16 / 255)).astype(int)
            np.testing.assert_array_equal(np.round(counts * (255 / 16)), image[..., 0])
            assert counts.tobytes() not in seen  # also says that the splits are disjoint by content
            seen[counts.tobytes()] = int(example["label"])
    assert seen == truth


def test_range_and_proportions(splits):
    test = examples(splits["test"])
    assert max(example["image"].max() for example in test) == 255
    assert min(example["image"].min() for example in test) == 0
    counts = np.bincount([example["label"] for example in test], minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_metadata(splits):
    metadata = splits["train"].metadata
    assert metadata.num_classes == 10
    assert metadata.image_shape == (8, 8, 1)
    assert metadata.identity != splits["test"].metadata.identity


def test_rows_are_a_partition():
    train, test = digits.split_rows()
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
