import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data
from effjax.data.captions import OneHotText
from effjax.errors import UsageError


def text(transform, **fields):
    return transform(fields, np.random.default_rng(0))["text"]


def test_a_label_is_one_word():
    made = text(OneHotText(10), label=np.int64(3))
    assert made.shape == (1, 10)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[0], np.arange(10) == 3)


def test_no_word_is_zeros_wherever_it_stands():
    transform = OneHotText(4, source="classes", no_word=0)
    made = text(transform, classes=np.array([2, 0, 3, 0, 0], np.int32))
    expected = np.zeros((5, 4), np.float32)
    expected[0, 2] = expected[2, 3] = 1.0
    np.testing.assert_array_equal(made, expected)
    assert not text(transform, classes=np.zeros(5, np.int32)).any()


def test_zeros_fill_the_length():
    made = text(OneHotText(4, length=3), label=2)
    np.testing.assert_array_equal(made, [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_batches_of_digits_and_scenes_hold_text():
    def batch(name, **fields):
        transforms = (dict(kind="one_hot_text", **fields),)
        section = dict(batch_size=4, source=dict(kind="tfds", name=name), transforms=transforms)
        return next(build(Data, section, "config.data").open().evaluate())

    digits = batch("digits", words=10)
    np.testing.assert_array_equal(digits["text"].argmax(-1)[:, 0], digits["label"])
    scenes = batch("scenes", words=4, source="classes", no_word=0)
    assert scenes["text"].shape == (4, 5, 4)
    np.testing.assert_array_equal(scenes["text"].sum(-1), scenes["classes"] > 0)


@pytest.mark.parametrize(
    ("transform", "fields", "message"),
    [
        (OneHotText(10), dict(classes=np.zeros(5, int)), r"'label'; an example here has 'classes'"),
        (OneHotText(4), dict(label=4), r"holds 4, .* words 0 to 3"),
        (OneHotText(4), dict(label=-1), r"holds -1"),
        (OneHotText(4, source="classes", length=2), dict(classes=np.zeros(3, int)), r"3 words .* length=2"),
    ],
)
def test_bad_input(transform, fields, message):
    with pytest.raises(UsageError, match=message):
        text(transform, **fields)


def test_a_width_of_nothing_is_refused():
    with pytest.raises(UsageError, match="words=0"):
        OneHotText(0)
