import itertools
import threading

import numpy as np
import pytest

from effjax.data.images import Normalize, RandomFlip, RandomShift
from effjax.data.order import EpochOrder
from effjax.data.pipeline import Shuffled, eval_batches, seek, stack, train_batches
from effjax.errors import UsageError

COUNT = 22


class Pictures:
    """`COUNT` pictures, each recognised by its label."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (6, 6, 1), dtype=np.uint8)
        return {"image": image, "label": index}


AUGMENT = (RandomShift(2), RandomFlip(), Normalize((0.5,), (0.5,)))


def train(count, *, seed=3, transforms=AUGMENT, **options):
    options = {"batch_size": 8, "threads": 0} | options
    batches = train_batches(Shuffled(Pictures(), seed), transforms, seed=seed, **options)
    return list(itertools.islice(batches, count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches]).tolist()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_what_one_reads(processes):
    parts = [train(7, process_index=i, process_count=processes) for i in range(processes)]
    joined = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, train(7))


@pytest.mark.parametrize("k", [1, 2, 5])  # 2 and 5 batches of 8 end within an epoch of 22
def test_resuming_equals_skipping(k):
    assert_same(train(4, start=8 * k), train(4 + k)[k:])


def test_position_does_not_hang_on_the_batch_size():
    assert labels(train(6, batch_size=4, start=8)) == labels(train(4))[8:]


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(threads):
    assert_same(train(9, threads=threads, prefetch=3), train(9, threads=0))


def test_epochs_hold_everything_once_in_another_order():
    seen = labels(train(11))  # 88 examples are 4 epochs
    epochs = [seen[i * COUNT : (i + 1) * COUNT] for i in range(4)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert seen != labels(train(11, seed=4))


def test_augmentation_differs_between_epochs_and_seeds():
    def picture(seed, epoch):
        batches = train(3 * (epoch + 1), seed=seed)
        seen = labels(batches)[epoch * COUNT : (epoch + 1) * COUNT]
        place = epoch * COUNT + seen.index(5)
        return batches[place // 8]["image"][place % 8]

    views = [picture(seed, epoch).tobytes() for seed in (3, 4, 5) for epoch in (0, 1)]
    assert len(set(views)) >= 5  # 50 views of a picture: two of six may agree, hardly more


def test_a_transform_draws_only_what_belongs_to_its_example():
    """What the transform before it draws for one example must not move the numbers of the next."""
    rng = np.random.Generator(np.random.Philox(3))
    draws = {}
    for number in (0, 1, 2):
        seek(rng, number)
        draws[number] = rng.integers(0, 2**32, 5, dtype=np.uint32)
    for used in (0, 1, 3, 7):
        rng.integers(0, 10, used, dtype=np.uint32)
        seek(rng, 1)
        np.testing.assert_array_equal(rng.integers(0, 2**32, 5, dtype=np.uint32), draws[1])
    assert not set(draws[0]) & set(draws[1])


def test_order_survives_being_asked_from_many_threads():
    order, seen = EpochOrder(50, 1), {}

    def ask(first):
        for epoch in range(first, first + 40):
            seen.setdefault(epoch % 7, []).append(order.of(epoch % 7).copy())

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for epoch, orders in seen.items():
        assert all((other == EpochOrder(50, 1).of(epoch)).all() for other in orders)
    np.testing.assert_array_equal(EpochOrder(5, None).of(3), np.arange(5))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_passes_once_in_order_and_masks_the_filling(processes):
    parts = [
        list(
            eval_batches(
                Pictures(), AUGMENT[2:], batch_size=8, process_index=i, process_count=processes, threads=2
            )
        )
        for i in range(processes)
    ]
    rows = [np.concatenate([b["label"] for b in batches]).tolist() for batches in zip(*parts, strict=True)]
    masks = [np.concatenate([b["mask"] for b in batches]) for batches in zip(*parts, strict=True)]
    assert list(itertools.chain(*rows)) == [*range(COUNT), 0, 0]
    np.testing.assert_array_equal(np.concatenate(masks), [1.0] * COUNT + [0.0] * 2)
    assert all(mask.dtype == np.float32 for mask in masks)


def test_evaluation_refuses_what_is_random():
    with pytest.raises(UsageError, match="RandomShift is random, and evaluation must not be"):
        eval_batches(Pictures(), AUGMENT, batch_size=8)


def test_a_batch_that_does_not_divide():
    with pytest.raises(UsageError, match=r"batch_size=10 does not divide over 4 processes. Take 8 or 12"):
        train(1, batch_size=10, process_count=4)
    with pytest.raises(UsageError, match=r"batch_size=3 .* Take 4\."):
        train(1, batch_size=3, process_count=4)
    with pytest.raises(UsageError, match="process_index=4 is not one of 4"):
        train(1, process_index=4, process_count=4)


def test_stack_widths():
    example = {"a": np.int64(5), "b": 2.5, "c": np.zeros(3, np.uint8), "d": True, "e": np.float16(1)}
    kinds = {name: str(column.dtype) for name, column in stack([example, example]).items()}
    assert kinds == {"a": "int32", "b": "float32", "c": "uint8", "d": "bool", "e": "float16"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.zeros((4, 5, 3)), np.zeros((4, 6, 3))], r"shapes .*\(4, 5, 3\), \(4, 6, 3\).*kind='resize'"),
        ([b"text", b"more"], r"holds bytes, no numbers.*fields="),
        ([1, 2**31], "numbers that int32 cannot, such as 2147483648"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [0, 2])
def test_what_does_not_stack(values, message, threads):
    batches = train_batches(lambda n: {"x": values[n % 2]}, (), batch_size=2, seed=0, threads=threads)
    with pytest.raises(UsageError, match=f"The field 'x' .*{message}"):
        next(batches)
