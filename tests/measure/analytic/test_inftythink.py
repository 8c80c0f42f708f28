import pytest

from effjax.errors import UsageError
from effjax.measure.analytic.inftythink import attended, contexts, of_rounds


def brute(question, segments, summary):
    """Every token of every round, and how many it sees."""
    total = 0
    for i, segment in enumerate(segments):
        before = question + (1 + summary if i else 0)
        behind = 1 + summary if i + 1 < len(segments) else 0
        for place in range(before + segment + behind):
            total += place + 1
    return total


@pytest.mark.parametrize("segments", [[7], [5, 5, 2], [1, 4, 3, 5]])
def test_the_closed_form_is_the_sum_over_tokens(segments):
    assert attended(contexts(3, segments, 2)) == brute(3, segments, 2)


def test_full_segments_and_the_rest():
    assert of_rounds(3, 12, 2, 5) == brute(3, [5, 5, 2], 2)
    assert of_rounds(3, 10, 2, 5) == brute(3, [5, 5], 2)
    assert of_rounds(3, 4, 2, 5) == (3 + 4) * (3 + 4 + 1) // 2


def test_cost_grows_with_the_thoughts_and_not_with_their_square():
    # 4096 tokens a segment, summaries of 512, a question of 256: the figures of a long proof.
    ratio = {n: of_rounds(256, n, 512, 4096) / attended([256 + n]) for n in (4096, 32_768, 131_072)}
    assert ratio[4096] == 1
    assert ratio[131_072] == pytest.approx((256 + 2 * 512 + 4096) ** 2 / (4096 * 131_072), rel=0.05)
    assert of_rounds(256, 131_072, 512, 4096) / of_rounds(256, 65_536, 512, 4096) == pytest.approx(
        2, rel=0.02
    )


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="thoughts=0, eta=5"):
        of_rounds(3, 0, 2, 5)
