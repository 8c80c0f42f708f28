import itertools
from typing import Any

import numpy as np
import pytest

from effjax.data.images import Normalize, RandomErasing, RandomFlip, RandomShift
from effjax.data.pipeline import Shuffled, eval_batches, seek, stack, train_batches
from effjax.errors import UsageError

AUGMENT = (RandomShift(1), RandomFlip(), Normalize((0.5,), (0.5,)), RandomErasing(0.5))


def batches(source: Any, count: int, **options: Any) -> list[dict[str, np.ndarray]]:
    options = dict(batch_size=8, seed=3) | options
    stream = Shuffled(source, options["seed"])
    return list(itertools.islice(train_batches(stream, AUGMENT, **options), count))


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(numbers: Any, processes: int) -> None:
    alone = batches(numbers(21), 6)
    parts = [batches(numbers(21), 6, process_index=p, process_count=processes) for p in range(processes)]
    assert parts[0][0]["label"].shape == (8 // processes,)
    joined = [
        {name: np.concatenate([b[name] for b in rows]) for name in rows[0]}
        for rows in zip(*parts, strict=True)
    ]
    assert_same(alone, joined)


@pytest.mark.parametrize("consumed", [1, 3, 5])
def test_resuming_equals_skipping(numbers: Any, consumed: int) -> None:
    """Also across the border of an epoch, which 21 examples reach within the third batch."""
    straight = batches(numbers(21), 7)
    assert_same(straight[consumed:], batches(numbers(21), 7 - consumed, start=8 * consumed))


def test_another_batch_size_goes_on_with_the_same_examples(numbers: Any) -> None:
    eight = np.concatenate([b["image"] for b in batches(numbers(21), 6)])
    six = np.concatenate([b["image"] for b in batches(numbers(21), 4, batch_size=6, start=24)])
    np.testing.assert_array_equal(eight[24:], six)


def test_threads_change_nothing(numbers: Any) -> None:
    assert_same(batches(numbers(21), 6, threads=0), batches(numbers(21), 6, threads=3, prefetch=2))


def test_each_epoch_is_a_permutation_of_its_own(numbers: Any) -> None:
    def epochs(seed: int) -> np.ndarray:
        labels = [b["label"] for b in batches(numbers(24), 9, seed=seed)]
        return np.concatenate(labels).reshape(3, 24)

    first = epochs(3)
    np.testing.assert_array_equal(np.sort(first, axis=1), np.tile(np.arange(24), (3, 1)))
    orders = {tuple(row) for row in np.concatenate([first, epochs(4)])} | {tuple(range(24))}
    assert len(orders) == 7


def test_augmentation_is_drawn_anew_each_epoch() -> None:
    class One:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"image": np.arange(64, dtype=np.uint8).reshape(8, 8, 1)}

    stream = Shuffled(One(), 0)
    batch = next(train_batches(stream, (RandomShift(3),), batch_size=64, seed=0))
    assert len(np.unique(batch["image"].reshape(64, -1), axis=0)) > 30


def test_what_an_example_draws_does_not_depend_on_the_one_before() -> None:
    """32-bit draws leave half a word behind, which must not leak."""
    rng = np.random.Generator(np.random.Philox(5))
    seek(rng, 9)
    expected = rng.integers(0, 2**31, 3, dtype=np.int32), rng.standard_normal(2), rng.random()
    for draws in range(6):
        seek(rng, 1000 + draws)
        rng.integers(0, 2**31, draws, dtype=np.int32)
        seek(rng, 9)
        again = rng.integers(0, 2**31, 3, dtype=np.int32), rng.standard_normal(2), rng.random()
        for a, b in zip(expected, again, strict=True):
            np.testing.assert_array_equal(a, b)
    seek(rng, 10)
    assert rng.random() != expected[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_example_once(numbers: Any, processes: int) -> None:
    parts = [
        list(eval_batches(numbers(21), (), batch_size=8, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert [len(part) for part in parts] == [3] * processes
    seen = []
    for rows in zip(*parts, strict=True):
        labels, mask = (np.concatenate([b[name] for b in rows]) for name in ("label", "mask"))
        assert mask.dtype == np.float32
        assert labels.shape == mask.shape == (8,)
        seen += labels[mask == 1].tolist()
        assert set(labels[mask == 0].tolist()) <= {0}
    assert seen == list(range(21))


def test_evaluation_refuses_chance(numbers: Any) -> None:
    with pytest.raises(UsageError, match="RandomFlip is random"):
        eval_batches(numbers(8), (RandomFlip(),), batch_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(process_count=3), r"batch_size=8 does not divide over 3 processes\. Take 6 or 9"),
        (dict(process_count=16), r"Take 16 or 16|Take 16\."),
        (dict(process_count=2, process_index=2), r"process_index=2 is not one of 2"),
    ],
)
def test_rows_that_cannot_be_dealt_out_are_refused(numbers: Any, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batches(numbers(21), 1, **options)


def test_batches_take_the_widths_jax_computes_in() -> None:
    batch = stack([{"i": 1, "f": 0.5, "b": True, "u": np.uint8(3), "w": np.arange(2)}] * 2)
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "i": "int32",
        "f": "float32",
        "b": "bool",
        "u": "uint8",
        "w": "int32",
    }
    assert batch["w"].shape == (2, 2)


def test_what_does_not_stack_is_named() -> None:
    with pytest.raises(UsageError, match=r"'image' has different shapes.*\(2, 2\), \(3, 2\).*resize"):
        stack([{"image": np.zeros((3, 2))}, {"image": np.zeros((2, 2))}])
    with pytest.raises(UsageError, match=r"'text' holds bytes, no numbers"):
        stack([{"text": b"one"}, {"text": b"two"}])


def test_an_error_in_a_thread_reaches_the_caller(numbers: Any) -> None:
    with pytest.raises(UsageError, match=r"put it after normalize"):
        next(train_batches(Shuffled(numbers(9), 0), (RandomErasing(),), batch_size=4, seed=0, threads=2))
