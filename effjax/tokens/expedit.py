"""Token clustering and reconstruction: dense outputs from a frozen network whose middle sees few tokens.

    s_i = mean of the tokens of cell i                              adaptive average pool to h x w centres
    Q_pi = softmax_{i in N(p)} (-|z_p - s_i|^2 / tau)
    s_i <- sum_p Q_pi z_p / sum_p Q_pi                              rounds of local soft k-means
    s' = the next blocks of s
    z_p <- sum_{i in the k nearest of p} softmax_i (-|z_p - s_i|^2 / tau) s'_i

N(p) are the centres around the cell that token p lies in. The last line is the reconstruction: its weights
come from before the blocks, what they weigh from behind them. Class and register tokens are no part of it.
There are no parameters, and nothing is trained.

The published code brings the weights of the last line to length one instead of sum one, which scales each
token: its Segmenter makes logits anew, whose largest stays (`normalise="length"`). It stops the gradient of
Q, as is done here.

The sums over N(p) are masked products over all centres: at 40 x 40 tokens and 28 x 28 centres elementwise
sums over N(p) alone do a thirtieth of the multiplications and take seven times as long on a CPU.

Source: Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
NeurIPS 2022, sections 3.2 and 3.3. The defaults are its Segmenter's: tau = 50, five rounds, windows of 5 x 5
centres and k = 20; its depth estimation has tau = 1.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.tokens.amounts import check_layers
from effjax.tokens.assignment import Mixture
from effjax.tokens.point import Place, Where
from effjax.tokens.restore import Restore
from effjax.tokens.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Expedit:
    """Clusters the tokens of a grid before a block and makes them anew some blocks later.

    Attributes:
      grid: rows and columns of centres.
      after: blocks before the clustering, alpha; None in a schedule, which says it.
      blocks: those that run on the centres, beta; None means all that follow. A schedule has `Restore`.
      rounds: of k-means.
      temperature: tau.
      window: side of the square of centres that a token may belong to, an odd number.
      nearest: centres that a token is made of, k; None means all.
      normalise: whether the weights of these have sum one, or length one.
    """

    grid: tuple[int, int]
    after: int | None = None
    blocks: int | None = None
    rounds: int = 5
    temperature: float = 50.0
    window: int = 5
    nearest: int | None = 20
    normalise: Literal["sum", "length"] = "sum"

    needs: ClassVar[tuple[str, ...]] = ()
    place: ClassVar[Place] = "before_block"
    proportional: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise UsageError(f"grid={self.grid} has no centres.")
        if self.rounds < 1:
            raise UsageError(f"rounds={self.rounds}: at least one assigns tokens to centres.")
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature:g} must be above 0.")
        if self.window < 1 or not self.window % 2:
            raise UsageError(f"window={self.window} has no centre: it must be odd.")
        if self.nearest is not None and self.nearest < 1:
            raise UsageError(f"nearest={self.nearest}: a token is made of at least one centre.")
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"blocks={self.blocks}: at least one runs on the centres.")

    def points(self, depth: int) -> dict[int, Any]:
        """The layer that clusters, and the one before which tokens are made anew."""
        if self.after is None:
            raise UsageError("say after=, how many blocks come before the clustering.")
        check_layers((self.after,), depth)
        behind = depth if self.blocks is None else self.after + self.blocks
        if behind > depth:
            raise UsageError(f"{self.after} and {self.blocks} blocks are more than the {depth} there are.")
        return {self.after: self, behind: Restore()}

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Mixture:
        """Centres are what becomes of the tokens."""
        size = self._size(tokens)
        z = tokens.inner(stats.features).astype(jnp.float32)  # [B, N, C]
        weights, mass = clusters(z, size, self.grid, self.rounds, self.temperature, self.window)
        centres = weighted(weights, z)  # [B, M, C]
        nearest = weights.shape[1] if self.nearest is None else min(self.nearest, weights.shape[1])
        back = reconstruction(z, centres, self.temperature, nearest, self.normalise)
        return Mixture(weights, sizes=mass, back=back)

    def _size(self, tokens: Tokens) -> tuple[int, int]:
        size = tokens.grid
        if size is None or not tokens.whole or tokens.held:
            raise UsageError(
                "Expedit clusters a whole grid of tokens: it comes before other methods, and goes with no "
                "class token in the middle."
            )
        if self.grid[0] > size[0] or self.grid[1] > size[1]:
            raise UsageError(f"grid={self.grid} has more rows or columns than the {size} tokens.")
        return size


def clusters(
    z: Float[Array, "b n c"],
    size: tuple[int, int],
    grid: tuple[int, int],
    rounds: int,
    temperature: float,
    window: int,
) -> tuple[Float[Array, "b m n"], Float[Array, "b m"]]:
    """Of which tokens each centre is made in the last round, with weights of sum one, and its share of them.

    Args:
      z: tokens, row by row.
      size: their rows and columns.
      grid: rows and columns of centres.
      rounds: how often tokens choose centres and centres move, at least once.
      temperature: of the choice.
      window: side of the square of centres that a token chooses from.
    """
    near = neighbours(size, grid, window)[None]  # [1, N, M]
    weights, mass = _moved(z, pooled(z, size, grid), near, temperature)
    for _ in range(rounds - 1):
        weights, mass = _moved(z, weighted(weights, z), near, temperature)
    return weights, mass


def _moved(
    z: Float[Array, "b n c"], centres: Float[Array, "b m c"], near: Bool[Array, "1 n m"], temperature: float
) -> tuple[Float[Array, "b m n"], Float[Array, "b m"]]:
    """One round: of which tokens each centre is made after they have chosen."""
    logits = closeness(z, centres) / temperature  # [B, N, M]
    q = jax.lax.stop_gradient(jax.nn.softmax(jnp.where(near, logits, -jnp.inf)))  # [B, N, M]
    mass = jnp.sum(q, axis=1)  # [B, M]
    return jnp.swapaxes(q, 1, 2) / jnp.maximum(mass, 1e-16)[:, :, None], mass


def reconstruction(
    z: Float[Array, "b n c"],
    centres: Float[Array, "b m c"],
    temperature: float,
    nearest: int,
    normalise: Literal["sum", "length"] = "sum",
) -> Float[Array, "b n m"]:
    """How each token is made of its nearest centres, of which there are more where distances are equal."""
    logits = closeness(z, centres) / temperature  # [B, N, M]
    if nearest < centres.shape[1]:
        least = jax.lax.top_k(logits, nearest)[0][..., -1:]  # [B, N, 1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    mixed = jax.nn.softmax(logits)  # [B, N, M]
    return mixed if normalise == "sum" else mixed / jnp.linalg.norm(mixed, axis=-1, keepdims=True)


def closeness(z: Float[Array, "b n c"], centres: Float[Array, "b m c"]) -> Float[Array, "b n m"]:
    """`|z_p|^2 - |z_p - s_i|^2`: a softmax over i sees the same as of the negative distance alone."""
    products = jax.lax.dot_general(z, centres, (((2,), (2,)), ((0,), (0,))), precision="highest")
    return 2 * products - jnp.sum(centres**2, axis=-1)[:, None, :]


def weighted(weights: Float[Array, "b m n"], z: Float[Array, "b n c"]) -> Float[Array, "b m c"]:
    """Weighted sums of tokens."""
    return jax.lax.dot_general(weights, z, (((2,), (1,)), ((0,), (0,))))


def pooled(z: Float[Array, "b n c"], size: tuple[int, int], grid: tuple[int, int]) -> Float[Array, "b m c"]:
    """The mean of the tokens of each cell; cells share what a border cuts."""
    rows, columns = (_bins(n, m).astype(z.dtype) for n, m in zip(size, grid, strict=True))
    maps = z.reshape(z.shape[0], *size, z.shape[-1])  # [B, H, W, C]
    means = jnp.einsum("hy,byxc,wx->bhwc", rows, maps, columns)  # [B, h, w, C]
    return means.reshape(z.shape[0], -1, z.shape[-1])


def neighbours(size: tuple[int, int], grid: tuple[int, int], window: int) -> Bool[Array, "n m"]:
    """Which centres are near the cell of each token."""
    rows, columns = (
        jnp.asarray(np.abs(np.arange(n)[:, None] * m // n - np.arange(m)) <= window // 2)  # [n, m]
        for n, m in zip(size, grid, strict=True)
    )
    near = rows[:, None, :, None] & columns[None, :, None, :]  # [H, W, h, w]
    return near.reshape(size[0] * size[1], -1)


def _bins(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """Means of `m` bins over `n` places."""
    place, low = np.arange(n), np.arange(m)[:, None]
    inside = (place >= low * n // m) & (place < -(-(low + 1) * n // m))  # [m, n]
    return inside / inside.sum(axis=1, keepdims=True)
