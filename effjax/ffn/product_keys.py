"""Which of n^2 slots a query finds, from scores of n rows and n columns.

Sums of two scores (Lample et al. 2019, section 3.2; PEER, He 2024):

    S_ij = a_i + b_j

The k best slots lie within the k best rows and the k best columns: were slot (i, j) among them and row i not
among the k best, k rows with a larger a would each give a slot (i', j) that is better. So k^2 sums are looked
at and not n^2, and nothing is lost.

Tucker-decomposed scores (UltraMem, Huang et al. 2024, arXiv:2411.12364, section 3; TDQKR):

    S_ij = sum_m r_i^T C_m c_j,    r_i, c_j of `rank` numbers,    sum_m C_m ~ sigma u v^T

Rows are preselected by r_i u, columns by v c_j, and the k^2 slots between them are scored in full. With rank
one and scores that are not negative this is as exact; with more it is as good as the rank-one approximation,
which the loss `spread` keeps good.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def best_sums(
    rows: Float[Array, "*batch n"], columns: Float[Array, "*batch n"], chosen: int
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The largest sums of a row's and a column's score, falling, and their slots `row n + column`."""
    kept = min(chosen, rows.shape[-1])
    (a, i), (b, j) = jax.lax.top_k(rows, kept), jax.lax.top_k(columns, kept)
    grid = a[..., :, None] + b[..., None, :]  # [..., kept, kept]
    scores, at = jax.lax.top_k(grid.reshape(*grid.shape[:-2], -1), chosen)
    return scores, _slots(i, j, at, rows.shape[-1])


def best_tucker(
    rows: Float[Array, "*batch h n r"],
    columns: Float[Array, "*batch h n r"],
    cores: Float[Array, "m h r r"],
    chosen: int,
) -> tuple[Float[Array, "*batch h k m"], Int[Array, "*batch h k"]]:
    """The scores of the slots found, by each core, the best sum first, and the slots."""
    n, kept = rows.shape[-2], min(chosen, rows.shape[-2])
    u, v = rank_one(jnp.sum(jax.lax.stop_gradient(cores), axis=0))
    _, i = jax.lax.top_k(jnp.einsum("...hnr,hr->...hn", rows, u), kept)
    _, j = jax.lax.top_k(jnp.einsum("...hnr,hr->...hn", columns, v), kept)
    a = jnp.take_along_axis(rows, i[..., None], axis=-2)  # [..., H, kept, R]
    b = jnp.take_along_axis(columns, j[..., None], axis=-2)
    grid = jnp.einsum("...hir,mhrs,...hjs->...hijm", a, cores, b)
    grid = grid.reshape(*grid.shape[:-3], kept * kept, -1)  # [..., H, kept^2, M]
    _, at = jax.lax.top_k(jnp.sum(grid, axis=-1), chosen)
    return jnp.take_along_axis(grid, at[..., None], axis=-2), _slots(i, j, at, n)


def _slots(
    i: Int[Array, "*batch kept"], j: Int[Array, "*batch kept"], at: Int[Array, "*batch k"], n: int
) -> Int[Array, "*batch k"]:
    kept = i.shape[-1]
    row = jnp.take_along_axis(i, at // kept, axis=-1)
    return row * n + jnp.take_along_axis(j, at % kept, axis=-1)


def rank_one(core: Float[Array, "h r r"]) -> tuple[Float[Array, "h r"], Float[Array, "h r"]]:
    """The left and right vector of the largest singular value, the pair that points to positive numbers.

    Both may be turned round together, and then the rows of least score would be preselected. Cores start
    positive, and a positive matrix has one pair without a negative number. Found by squaring C C^T eight
    times, which leaves of the second largest value (sigma_2 / sigma_1)^512.
    """
    wide = core.astype(jnp.promote_types(core.dtype, jnp.float32))
    power = wide @ wide.swapaxes(1, 2)  # [H, R, R]
    for _ in range(8):
        power = power / jnp.maximum(jnp.max(jnp.abs(power), axis=(1, 2), keepdims=True), 1e-30)
        power = power @ power
    u = _unit(jnp.sum(power, axis=2))  # [H, R]
    return u.astype(core.dtype), _unit(jnp.einsum("hr,hrs->hs", u, wide)).astype(core.dtype)


def _unit(x: Float[Array, "h r"]) -> Float[Array, "h r"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))


def spread(cores: Float[Array, "m h r r"], margin: float = 0.15) -> Float[Array, ""]:
    """How far the cores are from rank one: the mean of max(0, d - margin)^2, d what rank one leaves.

    d^2 = |C|^2 - sigma_1^2 is the sum of all other squared singular values: with two ranks d is the second.
    """
    core = jnp.sum(cores, axis=0).astype(jnp.promote_types(cores.dtype, jnp.float32))
    u, v = rank_one(jax.lax.stop_gradient(core))
    left = jnp.sum(core**2, axis=(1, 2)) - jnp.einsum("hr,hrs,hs->h", u, core, v) ** 2
    # The root is taken where it is past the margin, and so never of zero.
    return jnp.mean((jnp.sqrt(jnp.maximum(left, margin**2)) - margin) ** 2)
