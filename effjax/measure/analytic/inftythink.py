"""What attention costs where reasoning is cut in rounds: keys attended to, all queries together.

    one context      T (T + 1) / 2                       T = |q| + n tokens
    in rounds        sum_i T_i (T_i + 1) / 2             T_i = |q| + [1 + |s|] + n_i + [1 + |s|]

A round of n_i <= eta tokens reads the question, the summary of the round before behind its mark, which the
first has not, and writes its own behind another, which the last does not. Token `t` of a context attends to
`t`. For n >> eta the ratio is about (|q| + 2 |s| + eta)^2 / (eta n). Times `2 H d` and the layers these are
the multiply-accumulates of attention.

Source: Yan et al. 2025, arXiv:2503.06692, section 3, gives the orders.
"""

from collections.abc import Iterable

from effjax.errors import UsageError


def attended(contexts: Iterable[int]) -> int:
    """Keys that are attended to in contexts of so many tokens."""
    return sum(size * (size + 1) // 2 for size in contexts)


def contexts(question: int, segments: Iterable[int], summary: int) -> list[int]:
    """Tokens in the cache at the end of each round.

    Args:
      question: its tokens.
      segments: tokens of each round's reasoning.
      summary: tokens of a summary.
    """
    sizes = list(segments)
    last = len(sizes) - 1
    return [question + size + (1 + summary) * ((i > 0) + (i < last)) for i, size in enumerate(sizes)]


def of_rounds(question: int, thoughts: int, summary: int, eta: int) -> int:
    """Keys attended to where segments are as long as they may be.

    Raises:
      UsageError: for no thoughts, or segments of no tokens.
    """
    if thoughts < 1 or eta < 1:
        raise UsageError(f"thoughts={thoughts}, eta={eta}: both are at least 1 token.")
    whole, rest = divmod(thoughts, eta)
    return attended(contexts(question, [eta] * whole + [rest] * (rest > 0), summary))
