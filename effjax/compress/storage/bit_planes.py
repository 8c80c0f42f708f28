"""Codes as planes of single bits, and products of whole numbers of any two widths by counting bits.

    x = sum_i 2^i X_i,  w = sum_j 2^j W_j        X_i, W_j of zeros and ones

    x . w = sum_ij 2^(i + j) popcount(X_i and W_j)                                   in whole numbers, exactly

    (x - z_x) . (w - z_w) = x . w - z_w sum x - z_x sum w + K z_x z_w

What enters is coded token by token on a grid of its own smallest and largest number, and any width of the one
goes with any width of the other, at a cost of their product.

Bit balance: where two bits give the lopsided grid {-2, -1, 0, 1}, `balanced` takes {-2, -1, 0, 1, 2}. That is
log2 5 = 2.32 bits of information, and three planes as it is stored here.

Source: Zeng et al., "ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models", AAAI
2025, arXiv:2408.08554, sections 3.3 and 3.4.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from effjax.compress.rounding import nearest
from effjax.compress.storage.packing import Planes, pack, unpack, widths
from effjax.compress.storage.uniform import FEW, QTensor, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

# Bytes that are counted at once; 8 ones each, and the sum is a byte itself.
STEP = 16


def planes_of(codes: UInt8[Array, "..."], bits: int, axis: int) -> Planes:
    """A plane of bytes for each bit, the lowest first."""
    return tuple(pack((codes >> i) & 1, 1, axis)[0] for i in range(bits))


def counts(x: UInt8[Array, "p r g bytes"], w: UInt8[Array, "q g bytes n"]) -> Int32[Array, "p q r g n"]:
    """popcount(X_i and W_j) of every plane, row, group and column.

    A loop over a few bytes at a time that is as wide as the columns: one sum over all bytes XLA would walk by
    columns on a CPU, 40 times as slow at 2048 x 8192.
    """
    step = next(step for step in range(min(STEP, x.shape[-1]), 0, -1) if x.shape[-1] % step == 0)
    xs = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, step), -2, 0)  # [bytes / step, p, R, G, step]
    ws = jnp.moveaxis(w.reshape(*w.shape[:2], -1, step, w.shape[-1]), 2, 0)  # [.., q, G, step, N]

    def add(total: Int32[Array, "p q r g n"], few: Any) -> tuple[Int32[Array, "p q r g n"], None]:
        x, w = few
        ones = [
            jax.lax.population_count(x[:, None, :, :, i, None] & w[None, :, None, :, i])  # [p, q, R, G, N]
            for i in range(step)
        ]
        return total + sum(ones[1:], start=ones[0]).astype(jnp.int32), None

    shape = (x.shape[0], w.shape[0], *x.shape[1:3], w.shape[-1])
    return jax.lax.scan(add, jnp.zeros(shape, jnp.int32), (xs, ws))[0]


def integer_product(x: UInt8[Array, "r k"], planes: Planes, bits: int, groups: int) -> Int32[Array, "r g n"]:
    """sum_k x w of every group of k, by counting bits.

    Args:
      x: codes of the rows.
      planes: of the weights' codes, packed along k.
      bits: of a code of x.
      groups: that k is cut into, between bytes.
    """
    w = jnp.stack(planes).reshape(len(planes), groups, -1, planes[0].shape[-1])  # [q, G, bytes, N]
    packed = jnp.stack(planes_of(x, bits, -1)).reshape(bits, x.shape[0], groups, -1)  # [p, R, G, bytes]
    weights = 2 ** (jnp.arange(bits)[:, None] + jnp.arange(len(planes))[None])  # [p, q]
    return jnp.einsum("pq,pqrgn->rgn", weights, counts(packed, w))


def tokens_coded(
    x: Float[Array, "*rows k"], bits: int
) -> tuple[Float[Array, "*rows k"], Float[Array, "*rows 1"], Float[Array, "*rows 1"]]:
    """Codes of every row on its own grid with its scale and zero, as floats; rounds straight through."""
    x = x.astype(jnp.float32)
    low = jnp.minimum(jnp.min(x, -1, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(x, -1, keepdims=True), 0.0)
    top = 2**bits - 1
    scale = jnp.maximum((high - low) / top, 1e-8)
    zero = jnp.clip(nearest(-low / scale), 0, top)
    return jnp.clip(nearest(x / scale) + zero, 0, top), scale, zero


@flax.struct.dataclass
class PlaneTensor(QTensor):
    """Codes with scales and zeros, where `codes` is a plane `[*front, K / 8, N]` for every single bit."""

    layout: "BitPlanes" = flax.struct.field(pytree_node=False)

    def zeros(self) -> Float[Array, "*front g n"] | float:
        """The code that stands for 0 in every group, in float32."""
        if self.zero is None:
            return float(self.layout.middle)
        planes = self.layout.planes
        return unpack(self.zero, planes, math.prod(self.outs), axis=-1).astype(jnp.float32)

    def _decoded(
        self, planes: Planes, scale: Float[Array, "*front g n2"], zero: Float[Array, "*front g n2"] | float
    ) -> Float[Array, "*front k n"]:
        rows = math.prod(self.ins)
        codes = sum(unpack((plane,), 1, rows).astype(jnp.float32) * 2**i for i, plane in enumerate(planes))
        grouped = codes.reshape(*codes.shape[:-2], scale.shape[-2], -1, codes.shape[-1])  # [.., G, K / G, N]
        zero = zero if isinstance(zero, float) else zero[..., None, :]
        return ((grouped - zero) * scale.astype(jnp.float32)[..., None, :]).reshape(codes.shape)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, with what enters in codes."""
        lead = x.shape[: x.ndim - len(self.ins)]
        rows = x.reshape(-1, math.prod(self.ins))  # [R, K]
        if not self.layout.activations:
            y = rows @ self.matrix().astype(rows.dtype)  # [R, N]
        elif rows.shape[0] <= FEW:
            y = self._counted(rows)  # [R, N]
        else:
            codes, scale, zero = tokens_coded(rows, self.layout.activations)  # [R, K], 2 x [R, 1]
            y = ((codes - zero) * scale) @ self.matrix()  # [R, N]
        return y.astype(x.dtype).reshape(*lead, *self.outs)

    def _counted(self, rows: Float[Array, "r k"]) -> Float[Array, "r n"]:
        """The product in whole numbers, put on its scales only then."""
        codes, step, offset = tokens_coded(rows, self.layout.activations)
        groups, each = self.scale.shape[-2], rows.shape[1] // self.scale.shape[-2]
        products = integer_product(codes.astype(jnp.uint8), self.codes, self.layout.activations, groups)
        ones = jnp.ones((1, rows.shape[1]), jnp.uint8)
        of_w = integer_product(ones, self.codes, 1, groups)[0]  # [G, N]
        of_x = jnp.sum(codes.reshape(codes.shape[0], groups, each), -1)[..., None]  # [R, G, 1]
        zero = jnp.broadcast_to(jnp.asarray(self.zeros()), self.scale.shape)[None]  # [1, G, N]
        offset = offset[..., None]  # [R, 1, 1]
        whole = products - zero * of_x - offset * of_w[None] + each * offset * zero  # [R, G, N]
        return step * jnp.sum(whole * self.scale.astype(jnp.float32)[None], 1)


@dataclasses.dataclass(frozen=True)
class BitPlanes(Uniform):
    """A layout of codes in planes.

    Attributes:
      bits: of a code of the weights.
      group: weights that share a scale, a multiple of 8; 0 for all of an output.
      symmetric: whether codes lie evenly on both sides of 0.
      scale: dtype of the scales.
      activations: bits of a code of what enters; 0 leaves it as it is.
      balanced: whether two bits get a fifth code, so that they reach as far up as down.
    """

    bits: int = 2
    group: int = 0
    symmetric: bool = True
    activations: int = 8
    balanced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations:
            widths(self.activations)
        if self.group < 0 or self.group % 8:
            raise UsageError(f"group={self.group}: planes have groups of whole bytes, multiples of 8, or 0.")
        if self.balanced and (self.bits != 2 or not self.symmetric):
            raise UsageError("balanced is the symmetric grid of bits=2: set balanced=False.")

    @property
    def planes(self) -> int:
        """Single bits of a code."""
        return 3 if self.balanced else self.bits

    @property
    def levels(self) -> int:
        """The largest code."""
        return 4 if self.balanced else 2**self.bits - 1

    @property
    def lowest(self) -> int:
        """The smallest code that is used."""
        return 1 if self.symmetric and not self.balanced else 0

    @property
    def middle(self) -> int:
        """The code of 0 on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def grid(
        self, low: Float[Array, "*shape"], high: Float[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """Scale and zero of a grid from `low` to `high`; see `Uniform.grid`."""
        if not self.balanced:
            return super().grid(low, high)
        scale = jnp.maximum(-low, high).astype(jnp.float32) / 2
        scale = scale.astype(self.scale).astype(jnp.float32)
        return jnp.where(scale <= 0, 1.0, scale), jnp.full_like(scale, self.middle)

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight takes as it is stored: three planes where it is balanced."""
        own = jnp.dtype(self.scale).itemsize * 8 + (0 if self.symmetric else self.planes)
        return self.planes + own * self.groups(rows) / rows

    def held(
        self,
        codes: Array,
        scale: Float[Array, "*front g n2"],
        zero: Float[Array, "*front g n2"],
        place: Place,
    ) -> PlaneTensor:
        """What holds these codes."""
        codes = codes.astype(jnp.uint8)
        return PlaneTensor(
            codes=planes_of(codes, self.planes, -2),
            scale=scale.astype(self.scale),
            zero=None if self.symmetric else pack(zero.astype(jnp.uint8), self.planes, axis=-1),
            layout=self,
            ins=place.ins,
            outs=place.outs,
            turned=place.turned,
        )

    def names(self, place: Place) -> PlaneTensor:
        """Names of the axes of what `store` makes."""
        held: Any = super().names(place)
        return PlaneTensor(
            held.codes[:1] * self.planes, held.scale, held.zero, self, place.ins, place.outs, place.turned
        )
