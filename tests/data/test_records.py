import numpy as np
import pytest

from effjax.data.records import BadRecord, Cached, Metadata, Readable
from effjax.errors import RunError, UsageError


class Numbers:
    """Counts reads; some records are broken."""

    def __init__(self, count, broken=()):
        self.count, self.broken, self.reads = count, set(broken), 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        if index in self.broken:
            raise BadRecord(f"record {index}")
        return {"x": np.full(100, index, np.uint8)}


def values(examples):
    return [int(examples[i]["x"][0]) for i in range(len(examples))]


def test_replacement_depends_on_the_index_alone():
    assert values(Readable(Numbers(6, {1, 2, 5}), 1.0)) == [0, 3, 3, 3, 4, 0]
    backwards = Readable(Numbers(6, {1, 2, 5}), 1.0)
    assert [int(backwards[i]["x"][0]) for i in reversed(range(6))] == [0, 4, 3, 3, 3, 0]
    assert backwards.bad == {1: "record 1", 2: "record 2", 5: "record 5"}


def test_the_share_is_met_before_it_is_passed():
    readable = Readable(Numbers(10, {3}), 0.1)
    assert values(readable)[3] == 4
    with pytest.raises(RunError, match=r"1 of 10 records are broken, more than max_bad_share=0\.05"):
        Readable(Numbers(10, {3}), 0.05)[3]
    with pytest.raises(RunError, match="None of the 2 records can be read; the first fault: record 0"):
        Readable(Numbers(2, {0, 1}), 1.0)[0]


def test_cached_reads_each_example_once():
    numbers = Numbers(5, {2})
    cached = Cached(Readable(numbers, 1.0))
    reads = numbers.reads
    assert values(cached) == values(cached) == [0, 1, 3, 3, 4]
    assert numbers.reads == reads


def test_a_cache_that_would_not_fit_is_refused_early():
    numbers = Numbers(10_000)
    with pytest.raises(UsageError, match=r"about 1 MiB .*\(0 MiB\). Set cache=False"):
        Cached(numbers, limit=2**18)
    assert numbers.reads < 200
    assert len(Cached(Numbers(100), limit=10_000)) == 100


def test_metadata_without_classes():
    assert Metadata().num_classes is None
    assert Metadata(("a", "b")).num_classes == 2
