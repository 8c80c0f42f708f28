import numpy as np
import pytest

from effjax.data.records import BadRecord, Cached, Metadata, Readable
from effjax.errors import RunError, UsageError


class WithFaults:
    """Numbers, some of which cannot be read."""

    def __init__(self, count: int, faults: set[int]):
        self.count, self.faults, self.reads = count, faults, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.reads += 1
        if index in self.faults:
            raise BadRecord(f"record-{index}.png: torn")
        return {"label": np.int32(index)}


def test_a_broken_record_gives_way_to_the_next() -> None:
    readable = Readable(WithFaults(100, {3, 4, 99}), 0.03)
    read = [int(readable[i]["label"]) for i in range(100)]
    assert read == [0, 1, 2, 5, 5, *range(5, 99), 0]
    assert dict(readable.bad) == {i: f"record-{i}.png: torn" for i in (3, 4, 99)}
    # What stands for a record does not depend on what was read before it.
    assert int(Readable(WithFaults(100, {3, 4, 99}), 0.03)[3]["label"]) == 5


def test_a_broken_record_counts_once() -> None:
    readable = Readable(WithFaults(100, {7}), 0.01)
    for _ in range(5):
        assert int(readable[7]["label"]) == 8
    assert len(readable.bad) == 1


def test_too_many_broken_records_end_the_run_by_name() -> None:
    readable = Readable(WithFaults(100, {3, 7}), 0.01)
    assert int(readable[3]["label"]) == 4
    with pytest.raises(
        RunError, match=r"(?s)2 of 100 records.*max_bad_share=0\.01.*record-3\.png.*record-7\.png"
    ):
        readable[7]


def test_nothing_readable_ends_the_run_even_where_all_may_be_broken() -> None:
    with pytest.raises(RunError, match=r"None of the 3 records can be read.*record-1\.png: torn"):
        Readable(WithFaults(3, {0, 1, 2}), 1.0)[1]


def test_cached_examples_are_read_once() -> None:
    source = WithFaults(10, set())
    cached = Cached(source)
    assert [int(cached[i]["label"]) for i in (9, 0, 9)] == [9, 0, 9]
    assert (len(cached), source.reads) == (10, 10)


def test_a_cache_that_would_grow_too_large_is_refused_early() -> None:
    source = WithFaults(1_000_000, set())
    with pytest.raises(UsageError, match=r"about 8 MiB .*cache_limit allows \(1 MiB\).*cache=False"):
        Cached(source, limit=2**20)
    assert source.reads < 200


def test_data_without_classes_has_no_number_of_them() -> None:
    assert Metadata().num_classes is None
