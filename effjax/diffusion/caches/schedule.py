"""When each branch of each layer is computed again, chosen from how alike its outputs are from call to call.

    best(updates, S) = max over 0 = u_0 < u_1 < ... of  sum_i sum_(u_i <= n < u_(i+1)) similarity(u_i, n)

which dynamic programming finds: the first `m` updates up to call `n` are the first `m - 1` up to some earlier
call, and one interval more. A branch is what a layer adds to the stream: attention, then feed-forward.

Source: Ji et al., "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026, the adaptive
caching scheduler and the bubbling union, as in the published code (kyji/BAC).
"""

import numpy as np
from jaxtyping import Bool, Float

from effjax.errors import UsageError


def similarity(outputs: Float[np.ndarray, "calls *rest"]) -> Float[np.ndarray, "calls calls"]:
    """Cosine between a branch's outputs at every two calls, over all examples together."""
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)  # [S, B N C]
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = flat / np.maximum(length, np.finfo(np.float64).tiny)
    return flat @ flat.T


def best_updates(alike: Float[np.ndarray, "calls calls"], updates: int) -> list[int]:
    """The calls to compute at, the first among them, so that what stands in for the others is most alike.

    Raises:
      UsageError: for fewer than one update, or more than there are calls.
    """
    calls = len(alike)
    if not 1 <= updates <= calls:
        raise UsageError(f"updates={updates} must lie between 1 and the {calls} calls of the sampler.")
    # reach[a, b]: what an update at a is worth until b, both included.
    reach = np.cumsum(np.triu(alike), axis=1)
    value = reach[0].copy()  # of the best choice so far that covers 0 .. n
    last = np.zeros((updates, calls), int)  # where its newest update is
    for m in range(1, updates):
        # An update at a behind the best choice of one update less for 0 .. a - 1.
        grown = np.full((calls, calls), -np.inf)
        for a in range(m, calls):
            grown[a, a:] = value[a - 1] + reach[a, a:]
        last[m] = np.argmax(grown, axis=0)
        value = np.max(grown, axis=0)
    chosen, end = [], calls - 1
    for m in reversed(range(updates)):
        chosen.append(int(last[m, end]))
        end = chosen[-1] - 1
    return chosen[::-1]


def bubbled(
    fresh: Bool[np.ndarray, "calls layers branches"],
    volatile: Float[np.ndarray, "layers branches"],
    union: int,
) -> Bool[np.ndarray, "calls layers branches"]:
    """Updates the most volatile branches also wherever a feed-forward branch behind them is updated.

    A feed-forward branch that is computed from a stale stream keeps the error for all calls to come.

    Args:
      fresh: when each branch is computed; the last branch of a layer is the feed-forward one.
      volatile: mean difference of a branch's outputs between calls.
      union: how many branches, the most volatile first.

    Raises:
      UsageError: for more branches than there are.
    """
    if not 0 <= union <= volatile.size:
        raise UsageError(f"union={union} must lie between 0 and the {volatile.size} branches of the network.")
    behind = np.logical_or.accumulate(fresh[:, ::-1, -1], axis=1)[:, ::-1]  # [S, L], this layer's or later
    grown = fresh.copy()
    for place in np.argsort(volatile, axis=None)[::-1][:union]:
        layer, branch = np.unravel_index(place, volatile.shape)
        grown[:, layer, branch] |= behind[:, layer]
    return grown


def volatility(outputs: Float[np.ndarray, "calls *rest"]) -> float:
    """Mean absolute difference of a branch's outputs, over all pairs of calls."""
    flat = outputs.reshape(len(outputs), -1)
    pairs = [np.mean(np.abs(flat[i + 1 :] - flat[i]), axis=1) for i in range(len(flat) - 1)]
    return float(np.mean(np.concatenate(pairs)))
