"""Binary coding: a weight as a sum of a few scales with signs, and the product that looks sums up.

    w ~ sum_{i < q} alpha_i b_i + z,     b_i in {-1, 1}           alpha and z for every group of g weights

    greedy        r = w - mean w;    b_i = sign r,  alpha_i = mean |r|,  r <- r - alpha_i b_i
    alternating   (alpha, z) by least squares for these b, then for every weight the b that are nearest

A grid of whole codes is one of these exactly:

    s (c - zero) :   b_i = 2 c_i - 1  for bit i of c,    alpha_i = s 2^(i-1),    z = s ((2^q - 1) / 2 - zero)

The product with a vector never decodes a weight. For every run of mu inputs the 2^mu sums that signs can give
are computed once, and mu signs of a plane in a byte are the number of the sum that is wanted:

    y_n = sum_g ( sum_i alpha_ign sum_{runs r of g} T[r, key_irn]  +  z_gn sum_{k of g} x_k )

    2^mu K / mu  additions for the tables, which all outputs share, and  q N K / mu  look-ups for N K products

Bits a weight, with scales of 16 bits:  q + 16 q / g + 16 / g.

Source: Park et al., "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in
Large-Scale Generative Language Models", ICLR 2024, arXiv:2206.09557, sections 3.1 to 3.3; the fit is that of
Xu et al., "Alternating Multi-bit Quantization for Recurrent Neural Networks", ICLR 2018.

At 2048 x 8192 and one row, on two cores: 0.6, 0.9 and 1.2 ms at best for 2, 3 and 4 planes by tables, over 3
by planes of single bits; codes of a uniform grid take 0.95, 1.7 and 1.1, bfloat16 0.8 (jax 0.10.1).
"""

import dataclasses
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.kernels import Implementation, binary_product
from effjax.compress.storage.matrices import Matrices, flat
from effjax.compress.storage.packing import pack, unpack, widths
from effjax.compress.storage.product import few_rows
from effjax.compress.storage.uniform import FEW, QTensor, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

# Inputs whose signs fill a byte.
MU = 8


@flax.struct.dataclass
class BinaryCoded(Matrices):
    """A kernel, or one of every layer or expert, in planes of signs.

    Attributes:
      signs: `[*front, q, K / 8, N]` bytes; a bit of 1 is a plus.
      alpha: `[*front, q, G, N]`.
      offset: `[*front, G, N]`, the z of the module's docstring.
      layout: how it is coded.
      ins: sizes of the axes that are summed over.
      outs: sizes of those of the product.
      turned: whether the array has `outs` before `ins`.
    """

    signs: Any
    alpha: Any
    offset: Any
    layout: "BinaryCoding" = flax.struct.field(pytree_node=False)
    ins: tuple[int, ...] = flax.struct.field(pytree_node=False)
    outs: tuple[int, ...] = flax.struct.field(pytree_node=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def front(self) -> tuple[int, ...]:
        """Sizes of the axes before those of one kernel."""
        return self.offset.shape[:-2]

    def matrix(self) -> Float[Array, "*front k n"]:
        """All weights as matrices, in float32."""
        rows = math.prod(self.ins)
        bits = unpack((self.signs,), 1, rows).astype(jnp.float32)  # [.., q, K, N]
        alpha, offset = self.alpha.astype(jnp.float32), self.offset.astype(jnp.float32)
        parts = (2 * bits - 1).reshape(*alpha.shape[:-1], -1, alpha.shape[-1])  # [.., q, G, K / G, N]
        weights = jnp.sum(parts * alpha[..., None, :], -4) + offset[..., None, :]  # [.., G, K / G, N]
        return weights.reshape(*weights.shape[:-3], rows, weights.shape[-1])

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`."""
        lead = x.shape[: x.ndim - len(self.ins)]
        rows = x.reshape(-1, math.prod(self.ins))  # [R, K]
        if self.layout.implementation != "plain":
            y = binary_product(rows, self.alpha, self.offset, self.signs, self.layout.implementation)
        elif rows.shape[0] > FEW:
            y = _many(rows, self)  # [R, N]
        elif self.layout.tables:
            y = looked_up(rows, self).astype(rows.dtype)  # [R, N]
        else:
            y = jax.lax.platform_dependent(rows, self, cpu=_few, default=_many)  # [R, N]
        return y.reshape(*lead, *self.outs)


@dataclasses.dataclass(frozen=True)
class BinaryCoding:
    """A layout of signs.

    Attributes:
      bits: planes of signs, q.
      group: weights that share scales; 0 for all of an output.
      rounds: of the alternating fit; 0 leaves the greedy one.
      tables: whether the product with few rows looks sums up; a group is then a multiple of 8.
      scale: dtype of scales and offsets.
      implementation: of the product, see `effjax.compress.storage.kernels`.
    """

    bits: int = 3
    group: int = 128
    rounds: int = 10
    tables: bool = True
    scale: Literal["float32", "float16", "bfloat16"] = "float16"
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        widths(self.bits)
        if self.group < 0 or self.rounds < 0:
            raise UsageError(
                f"group={self.group}, rounds={self.rounds}: give weights of a group, 0 for all of an output, "
                f"and rounds of at least 0."
            )

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """How many groups there are along `rows` weights.

        Raises:
          UsageError: where a group does not divide them, or bytes of signs where they are keys.
        """
        groups = Uniform(self.bits, self.group, False).groups(rows, where)
        if self.tables and rows // groups % MU:
            raise UsageError(
                f"{where}: groups of {rows // groups} are no multiple of the {MU} signs that are a key: give "
                f"such a group, or tables=False."
            )
        return groups

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight of such a matrix takes, with its share of scales and offsets."""
        each = jnp.dtype(self.scale).itemsize * 8
        return self.bits + each * (self.bits + 1) * self.groups(rows) / rows

    def store(self, kernel: Float[Array, "..."], place: Place) -> BinaryCoded:
        """A kernel in this layout."""
        matrix = flat(kernel, place).astype(jnp.float32)
        groups = self.groups(matrix.shape[-2])
        parts = matrix.reshape(*matrix.shape[:-2], groups, -1, matrix.shape[-1])  # [.., G, g, N]
        alpha, offset, signs = fitted(jnp.moveaxis(parts, -2, -1), self.bits, self.rounds)
        plus = jnp.moveaxis(signs > 0, (-2, -4, -1), (-4, -3, -2)).astype(jnp.uint8)  # [.., q, G, g, N]
        return BinaryCoded(
            signs=pack(plus.reshape(*plus.shape[:-3], matrix.shape[-2], plus.shape[-1]), 1)[0],
            alpha=jnp.moveaxis(alpha, -1, -3).astype(self.scale),
            offset=offset.astype(self.scale),
            layout=self,
            ins=place.ins,
            outs=place.outs,
            turned=place.turned,
        )

    def names(self, place: Place) -> BinaryCoded:
        """Names of the axes of what `store` makes."""
        held = Uniform(1, 0, False).names(place)
        *front, k, n = held.codes[0]
        return BinaryCoded(
            (*front, None, k, n), (*front, None, None, n), (*front, None, n),
            self, place.ins, place.outs, place.turned,
        )  # fmt: skip


def fitted(
    weights: Float[Array, "*groups g"], bits: int, rounds: int
) -> tuple[Float[Array, "*groups q"], Float[Array, "*groups"], Float[Array, "*groups q g"]]:
    """Scales, offset and signs of every group.

    Args:
      weights: the groups.
      bits: planes of signs.
      rounds: of the alternating fit after the greedy one.
    """
    offset = jnp.mean(weights, -1)
    rest, alphas, planes = weights - offset[..., None], [], []
    for _ in range(bits):
        sign = jnp.where(rest < 0, -1.0, 1.0)
        alphas.append(jnp.mean(jnp.abs(rest), -1))
        planes.append(sign)
        rest = rest - alphas[-1][..., None] * sign
    start = jnp.stack(alphas, -1), offset, jnp.stack(planes, -2)

    def refine(best: Any, _: None) -> tuple[Any, None]:
        alpha, offset = _least_squares(weights, best[2])
        signs = _nearest(weights, alpha, offset)
        # Least squares of planes that coincide may miss: what is not better is not taken.
        better = _error(weights, alpha, offset, signs) < _error(weights, *best)
        new = alpha, offset, signs
        return jax.tree.map(
            lambda n, o: jnp.where(better.reshape(better.shape + (1,) * (n.ndim - better.ndim)), n, o),
            new,
            best,
        ), None

    return jax.lax.scan(refine, start, length=rounds)[0]


def _least_squares(
    weights: Float[Array, "*groups g"], signs: Float[Array, "*groups q g"]
) -> tuple[Float[Array, "*groups q"], Float[Array, "*groups"]]:
    """The scales and the offset with the least squared error for these signs."""
    columns = jnp.concatenate([signs, jnp.ones_like(signs[..., :1, :])], -2)  # [.., q + 1, g]
    gram = columns @ jnp.swapaxes(columns, -1, -2)  # [.., q + 1, q + 1]
    ridge = (
        1e-5 * weights.shape[-1] * jnp.eye(gram.shape[-1]).reshape((1,) * (gram.ndim - 2) + gram.shape[-2:])
    )
    seen = columns @ weights[..., None]  # [.., q + 1, 1]
    found = jnp.linalg.solve(gram + ridge, seen)[..., 0]  # [.., q + 1]
    return found[..., :-1], found[..., -1]


def _nearest(
    weights: Float[Array, "*groups g"], alpha: Float[Array, "*groups q"], offset: Float[Array, "*groups"]
) -> Float[Array, "*groups q g"]:
    """The signs of every weight that come nearest to it."""
    bits = alpha.shape[-1]
    table = 2.0 * ((jnp.arange(2**bits)[:, None] >> jnp.arange(bits)[None]) & 1) - 1  # [2^q, q]

    def compare(best: Any, signs: Float[Array, " q"]) -> tuple[Any, None]:
        level = offset + jnp.sum(alpha * signs.reshape((1,) * (alpha.ndim - 1) + signs.shape), -1)
        far = jnp.abs(weights - level[..., None])
        nearer = far < best[0]
        shape = (1,) * (weights.ndim - 1) + (bits, 1)
        return (
            jnp.where(nearer, far, best[0]),
            jnp.where(nearer[..., None, :], signs.reshape(shape), best[1]),
        ), None

    start = jnp.full(weights.shape, jnp.inf), jnp.zeros((*weights.shape[:-1], bits, weights.shape[-1]))
    return jax.lax.scan(compare, start, table)[0][1]


def _error(
    weights: Float[Array, "*groups g"],
    alpha: Float[Array, "*groups q"],
    offset: Float[Array, "*groups"],
    signs: Float[Array, "*groups q g"],
) -> Float[Array, "*groups"]:
    told = jnp.sum(alpha[..., None] * signs, -2) + offset[..., None]
    return jnp.sum(jnp.square(weights - told), -1)


def from_uniform(
    held: QTensor, scale: Literal["float32", "float16", "bfloat16"] = "float32", tables: bool = True
) -> BinaryCoded:
    """The same weights in planes of signs; to the bit where `scale` is float32.

    Args:
      held: codes of a uniform grid, with a scale for each output at least.
      scale: dtype of scales and offsets.
      tables: see `BinaryCoding`.

    Raises:
      UsageError: for a grid that all outputs share.
    """
    grid = held.layout
    if grid.group < 0:
        raise UsageError("group=-1 has one scale for the matrix: give 0, which is one for an output.")
    rows = math.prod(held.ins)
    codes = unpack(held.codes, grid.bits, rows)  # [.., K, N]
    shifts = range(grid.bits)
    signs = jnp.stack([pack((codes >> i) & 1, 1)[0] for i in shifts], -3)  # [.., q, K / 8, N]
    step = held.scale.astype(jnp.float32)  # [.., G, N]
    alpha = jnp.stack([step * 2.0 ** (i - 1) for i in shifts], -3)  # [.., q, G, N]
    offset = step * (grid.levels / 2 - held.zeros())  # [.., G, N]
    layout = BinaryCoding(grid.bits, grid.group, 0, tables, scale)
    layout.groups(rows)
    return BinaryCoded(
        signs, alpha.astype(scale), offset.astype(scale), layout, held.ins, held.outs, held.turned
    )


def tables_of(x: Float[Array, "r k"]) -> Float[Array, "r runs 256"]:
    """All sums of 8 inputs with signs, by the byte of the signs; one addition an entry."""
    runs = jnp.pad(x, ((0, 0), (0, -x.shape[1] % MU))).reshape(x.shape[0], -1, MU)  # [R, K / 8, 8]
    sums = -jnp.sum(runs, -1, keepdims=True)  # [R, K / 8, 1]
    for j in range(MU):
        sums = jnp.concatenate([sums, sums + 2 * runs[..., j, None]], -1)  # [R, K / 8, 2^(j + 1)]
    return sums


def looked_up(x: Float[Array, "r k"], kernel: BinaryCoded) -> Float[Array, "r n"]:
    """The product by look-ups alone, in float32."""
    x = x.astype(jnp.float32)
    sums, groups = tables_of(x), kernel.alpha.shape[-2]  # [R, K / 8, 256]

    def add(y: Float[Array, "r n"], plane: Any) -> tuple[Float[Array, "r n"], None]:
        keys, alpha = plane  # [K / 8, N], [G, N]
        found = jax.vmap(lambda table: jnp.take_along_axis(table, keys.astype(jnp.int32), 1))(sums)
        parts = jnp.sum(found.reshape(x.shape[0], groups, -1, keys.shape[1]), 2)  # [R, G, N]
        return y + jnp.sum(parts * alpha[None], 1), None

    # A scan, as XLA merges four planes and more into one loop that is several times as slow.
    return jax.lax.scan(add, _offsets(x, kernel), (kernel.signs, kernel.alpha.astype(jnp.float32)))[0]


def work(rows: int, columns: int, bits: int, mu: int = MU) -> tuple[int, int]:
    """Additions that make the tables of a vector of `rows`, and look-ups for `columns` outputs."""
    return 2**mu * rows // mu, bits * columns * rows // mu


def _offsets(x: Float[Array, "r k"], kernel: BinaryCoded) -> Float[Array, "r n"]:
    offset = kernel.offset.astype(jnp.float32)
    return jnp.sum(x.reshape(x.shape[0], offset.shape[0], -1), -1) @ offset


def _many(rows: Float[Array, "r k"], kernel: BinaryCoded) -> Float[Array, "r n"]:
    return rows @ kernel.matrix().astype(rows.dtype)


def _few(rows: Float[Array, "r k"], kernel: BinaryCoded) -> Float[Array, "r n"]:
    """Planes of single bits, each read where it lies: alpha (2 p - 1) is a grid of two codes."""
    x = rows.astype(jnp.float32)
    y = _offsets(x, kernel)  # [R, N]
    for plane, alpha in zip(kernel.signs, kernel.alpha.astype(jnp.float32), strict=True):
        y = y + few_rows(x, (plane,), 1, 2 * alpha, 0.5)
    return y.astype(rows.dtype)
