"""`digits`: 1,797 handwritten digits, 8x8 pixels, the ones that scikit-learn ships."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_SHARE = 0.2


class Digits(tfds.core.GeneratorBasedBuilder):
    """The test half of the UCI "Optical Recognition of Handwritten Digits" data, as scikit-learn has it.

    Fields: `image` `[8, 8, 1]` uint8 in 0..255 (the source's 0..16, scaled), `label` in 0..9. Splits: `train`
    1,437 and `test` 360, disjoint, each class in its own proportion. Source: Alpaydin and Kaynak, 1998.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; TFDS's own look-up wants a package it does not require

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 pixels.",
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        train, test = split_rows()
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = load()
        for row in rows:
            yield int(row), {"image": png(images[row, :, :, 0]), "label": int(labels[row])}


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns all images `[1797, 8, 8, 1]` uint8 and labels `[1797]`, in scikit-learn's order."""
    from sklearn.datasets import load_digits  # half a second, and needed once in the life of a data directory

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return images[..., None], bunch.target.astype(np.int32)


def split_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers of train and test: a fixed permutation, cut class by class.

    The cumulative count is rounded, not the count of each class, so that the split sizes come out at 1,437
    and 360 exactly.
    """
    labels = load()[1]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) * (1.0 - TEST_SHARE)
    in_train = np.floor(place + (1.0 - TEST_SHARE)) > np.floor(place)
    return np.sort(by_class[in_train]), np.sort(by_class[~in_train])


def png(pixels: np.ndarray) -> io.BytesIO:
    """Returns a lossless PNG file of `[H, W]` or `[H, W, 3]` uint8, as TFDS takes encoded images."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    file.seek(0)
    return file
