from tests.interop import fuzz


def test_two_hundred_broken_files_are_refused_or_read(tmp_path):
    outcomes, findings = fuzz.fuzz(200, seed=1, folder=tmp_path)
    assert findings == []
    assert sum(outcomes.values()) == 200
    assert {mutation for mutation, _ in outcomes} == {
        f.__name__ for f in [*fuzz.MUTATIONS, fuzz.change_index]
    }
    refused = sum(times for (_, result), times in outcomes.items() if result != "read")
    assert refused > 150


def test_the_tool_finds_a_reader_that_crashes_hoards_or_keeps_silent(tmp_path, monkeypatch):
    honest = fuzz.read

    def crash(path):
        raise IndexError("off by one")

    def hoard(path):
        memory = bytearray(fuzz.MEMORY_LIMIT)
        leaves = honest(path)
        del memory
        return leaves

    file, _ = fuzz.real_files(tmp_path)
    for reader, said in ((crash, "off by one"), (hoard, "bytes were allocated")):
        monkeypatch.setattr(fuzz, "read", reader)
        try:
            fuzz.outcome(file)
        except (IndexError, AssertionError) as error:
            assert said in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{reader.__name__} went unnoticed")
