"""Two matrices with something between them, made narrower there in closed form.

Of what enters a module its second moments C = E[x x^T] are known, and how much each layer shall lose.

    rows       s_i = [C (C + ridge I)^-1]_ii = 1 - ridge [(C + ridge I)^-1]_ii,    the k largest stay
               W <- (S^T C S)^+ S^T C W                           Nystrom: least squares from those that stay
    channels   s_i = ||C_q^1/2 e_i|| ||C_k^1/2 e_i|| = (C_q,ii C_k,ii)^1/2
               ||Q K^T - Q_S K_S^T||_F <= N sum_{i not in S} s_i   CR: the k largest make the bound least
    joined     V S^2 V^T = C,  U' S' V'^T = S V^T W
               A, B = V S^-1 U'_k, S'_k V'^T_k                     the best of rank k for E ||x W - x A B||^2
    shares     phi ~ exp(-influence / epsilon), as far as no share is above the most

Here C is of what leaves the first matrix; with X before it and C = W_V^T X^T X W_V these are the factors of
svd(C^1/2 W_V), without a root of a larger matrix or its inverse.

Source: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025,
arXiv:2408.09632, algorithms 1 to 3 and section 3.3. All in float64 on the host.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from effjax.errors import UsageError

# Of correlations summed in float32: directions below such a share of the largest are rounding.
_NOTHING = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What is known of rows x.

    Attributes:
      count: of rows.
      mean: E[x].
      square: E[x x^T].
    """

    count: float
    mean: Float[np.ndarray, " k"]
    square: Float[np.ndarray, "k k"]

    def through(
        self, kernel: Float[np.ndarray, "k n"], bias: Float[np.ndarray, " n"] | None = None
    ) -> "Moments":
        """Of x W + b."""
        mean, square = self.mean @ kernel, kernel.T @ self.square @ kernel  # [N], [N, N]
        if bias is not None:
            cross = np.outer(mean, bias)
            square, mean = square + cross + cross.T + np.outer(bias, bias), mean + bias
        return Moments(self.count, mean, square)

    def correlation(self, constant: bool) -> Float[np.ndarray, "k k"]:
        """E[x x^T], or the covariance where a constant makes up for the mean."""
        return self.square - np.outer(self.mean, self.mean) if constant else self.square


def leverage(square: Float[np.ndarray, "k k"], ridge: float) -> Float[np.ndarray, " k"]:
    """The ridge leverage score of every column of x, of X^T X."""
    return 1 - ridge * np.diag(_inverse(square, ridge))  # [K]


def stay(
    square: Float[np.ndarray, "k k"], count: int, ridge: float, in_turn: bool
) -> Int[np.ndarray, " count"]:
    """The columns that stay, in order.

    Args:
      square: X^T X.
      count: of them.
      ridge: of the scores.
      in_turn: whether the column with the least score goes and the others are scored again; of two that are
        alike one then stays, where at once both or none may.
    """
    if not in_turn:
        return np.sort(np.argsort(-leverage(square, ridge), kind="stable")[:count])
    inverse = _inverse(square, ridge)  # [K, K]
    there = np.ones(len(square), bool)
    for _ in range(len(square) - count):
        worst = int(np.argmax(np.where(there, np.diag(inverse), -np.inf)))
        column = inverse[:, worst]
        inverse = inverse - np.outer(column, column) / column[worst]  # of the others alone
        there[worst] = False
    return np.flatnonzero(there)


def _inverse(square: Float[np.ndarray, "k k"], ridge: float) -> Float[np.ndarray, "k k"]:
    """(C + ridge I)^-1, where rounding has left C no less than nothing."""
    values, vectors = np.linalg.eigh(square)
    return vectors / (np.maximum(values, 0.0) + ridge) @ vectors.T


def refitted(
    square: Float[np.ndarray, "k k"], rows: Int[np.ndarray, " m"], kernel: Float[np.ndarray, "k n"]
) -> Float[np.ndarray, "m n"]:
    """(S^T C S)^+ S^T C W: what comes nearest to x W from some columns of x."""
    size = np.sqrt(np.diag(square)[rows])  # [M]
    size = np.where(size > 0, size, 1.0)
    among = square[np.ix_(rows, rows)] / np.outer(size, size)  # [M, M], ones along the diagonal
    back = np.linalg.pinv(among, rcond=_NOTHING, hermitian=True)
    return back @ (square[rows] / size[:, None]) @ kernel / size[:, None]


def product_scores(
    query: Float[np.ndarray, "h units"], key: Float[np.ndarray, "g units"]
) -> Float[np.ndarray, "g units"]:
    """What each unit has of the products of queries and keys, at most.

    Args:
      query: mean squares of each unit of the queries; consecutive heads share a key.
      key: of the keys.
    """
    together = query.reshape(len(key), -1, query.shape[1]).sum(1)  # [G, units], of all queries of a key
    return np.sqrt(together * key)


def joined(
    square: Float[np.ndarray, "e e"], kernel: Float[np.ndarray, "e n"], rank: int
) -> tuple[Float[np.ndarray, "e k"], Float[np.ndarray, "k n"]]:
    """A and B of a rank with the least E ||x W - x A B||^2.

    Args:
      square: E[x x^T].
      kernel: W.
      rank: of A B; columns of A and rows of B that are not needed are zero.
    """
    values, vectors = np.linalg.eigh(square)
    there = values > _NOTHING * max(values[-1], 0.0)
    size, basis = np.sqrt(values[there]), vectors[:, there]  # [R], [E, R]
    left, sizes, right = np.linalg.svd(size[:, None] * (basis.T @ kernel), full_matrices=False)
    found = min(rank, len(sizes))
    first = np.zeros((len(square), rank))
    second = np.zeros((rank, kernel.shape[1]))
    first[:, :found] = basis / size @ left[:, :found]  # V S^-1 U'_k
    second[:found] = sizes[:found, None] * right[:found]  # S'_k V'^T_k
    return first, second


def shares(
    mean: float,
    logits: Float[np.ndarray, " l"],
    costs: Float[np.ndarray, " l"],
    most: Float[np.ndarray, " l"],
) -> Float[np.ndarray, " l"]:
    """The share that everything loses, ~ exp(logits), of which none is above the most that it can lose.

    Args:
      mean: of the shares, weighted by costs; it is met.
      logits: -influence / epsilon.
      costs: of everything; where all are alike the mean is the plain one.
      most: that can go.

    Raises:
      UsageError: for a mean above that of the most.
    """
    total, largest = mean * costs.sum(), float(costs @ most)
    if total > largest * (1 + 1e-12):
        raise UsageError(
            f"{mean:.2%} shall go, and {largest / costs.sum():.2%} can: let other kinds of units go, or "
            f"fewer stay."
        )
    found, free = np.zeros(len(costs)), (costs > 0) & (most > 0)
    while free.any():
        left = total - float(costs[~free] @ found[~free])
        weights = np.exp(logits[free] - logits[free].max())
        found[free] = left * weights / (costs[free] @ weights)
        over = free & (found > most)
        if not over.any():
            break
        found[over], free = most[over], free & ~over
    return found
