"""Keys and values in few bits.

    zero = min x,   scale = (max x - min x) / (2^bits - 1)           of each group of numbers
    code = round((x - zero) / scale),   x ~ zero + scale code        |error| <= scale / 2

A group lies along a token (`group` channels of a head) or along a channel (`group` tokens that follow each
other). Keys have channels that are large in every token, which share a scale only along the channel; values
have none: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
arXiv:2402.02750, section 3, with keys by channel, values by token, groups of 32 and the last 128 tokens as
they are.

A byte holds 8 / bits codes. The last `residual` tokens are read as they were written. A group along a channel
can be quantised only when all of its tokens are there: until then they are among these. Here they slide by
one token a step, keys and values alike, and a prompt's own queries read what is held; in the authors' code
keys wait until `residual` are together, and a prompt reads itself as it is.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.storage import What
from effjax.errors import UsageError

Along = Literal["channel", "token"]


@flax.struct.dataclass
class Codes:
    """Keys or values of one layer.

    The fields are annotated `Any` because the same class also carries their shapes and names of axes.

    Attributes:
      codes: `[B, slots, groups, D bits / 8]` uint8.
      scale: `[B, slots, groups, D / group]`, or `[B, slots / group, groups, D]` along channels.
      zero: likewise; both in the dtype that is read.
      recent: `[B, residual, groups, D]`, the token of slot s at s mod residual; None where none are kept.
      written: `[B]` int, slots written so far; None likewise.
      along: what a group lies along.
    """

    codes: Any
    scale: Any
    zero: Any
    recent: Any = None
    written: Any = None
    along: Along = flax.struct.field(pytree_node=False, default="token")


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Codes of a few bits, with a scale and a zero for each group.

    Any slot may be written (`put`) only where groups lie along tokens and none are kept as they are:
    `keys="token", residual=0`. Groups along channels are of slots, and padding in front takes part in them.

    Attributes:
      bits: of a number: 2, 4 or 8.
      keys: what the groups of keys lie along.
      values: what those of values lie along.
      group: numbers that share a scale: channels of a head, or tokens.
      residual: latest tokens that are held as they are.
    """

    bits: int = 2
    keys: Along = "channel"
    values: Along = "token"
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise UsageError(f"bits={self.bits} do not fill a byte: give 2, 4 or 8.")
        if self.group < 1:
            raise UsageError(f"group={self.group} must be at least 1.")
        if self.residual < 0:
            raise UsageError(f"residual={self.residual} must be at least 0.")
        if "channel" in (self.keys, self.values) and (not self.residual or self.residual % self.group):
            raise UsageError(
                f"residual={self.residual} holds no whole groups of tokens: along channels give a multiple "
                f"of group={self.group}."
            )

    @property
    def rewinds(self) -> bool:
        """Not where slots share a scale, or the latest are kept beside the others."""
        return self.keys == self.values == "token" and not self.residual

    def empty(
        self, what: What, batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike
    ) -> Codes:
        """Zeros.

        Raises:
          UsageError: where groups do not divide a head, or a head does not fill its bytes.
        """
        along: Along = getattr(self, what)
        if along == "token" and head_dim % self.group:
            raise UsageError(f"group={self.group} does not divide the {head_dim} channels of a head.")
        if head_dim * self.bits % 8:
            raise UsageError(f"{head_dim} channels of {self.bits} bits do not fill bytes: give more bits.")
        blocks = -(-slots // self.group)
        scales = (blocks, groups, head_dim) if along == "channel" else (slots, groups, head_dim // self.group)
        kept = min(self.residual, blocks * self.group)
        return Codes(
            codes=jnp.zeros((batch, slots, groups, head_dim * self.bits // 8), jnp.uint8),
            scale=jnp.zeros((batch, *scales), dtype),
            zero=jnp.zeros((batch, *scales), dtype),
            recent=jnp.zeros((batch, kept, groups, head_dim), dtype) if kept else None,
            written=jnp.zeros(batch, jnp.int32) if kept else None,
            along=along,
        )

    def axes(self, what: What) -> Codes:
        """Names of the axes."""
        names = ("batch", "slots", "kv_heads", "head_dim")
        more: dict[str, Any] = dict(recent=names, written=("batch",)) if self.residual else {}
        return Codes(names, names, names, **more, along=getattr(self, what))

    def append(
        self,
        held: Codes,
        new: Float[Array, "b n groups d"],
        written: Int[Array, "*b"],
        count: Int[Array, " b"] | None = None,
    ) -> Codes:
        """Writes `n` slots behind the first `written`; `count` of them are tokens, the rest padding."""
        if held.along == "token":
            codes, scale, zero = self._by_token(new, held.scale.dtype)
            plain = Plain()
            held = dataclasses.replace(
                held,
                codes=plain.append(held.codes, codes, written),
                scale=plain.append(held.scale, scale, written),
                zero=plain.append(held.zero, zero, written),
            )
        each = jnp.broadcast_to(written, new.shape[:1])  # [B]
        if held.along == "channel":
            held = self._append_blocks(held, new, each)
        return held if held.recent is None else _remember(held, new, each, count)

    def put(self, held: Codes, new: Float[Array, "b n groups d"], slots: Int[Array, "b n *groups"]) -> Codes:
        """Writes these slots.

        Raises:
          UsageError: where slots cannot be written one by one.
        """
        if held.along == "channel" or held.recent is not None:
            raise UsageError(
                "slots that are written in any order share no scale, and none is the latest: a policy that "
                "evicts or merges needs quantised storage with keys='token', values='token', residual=0."
            )
        codes, scale, zero = self._by_token(new, held.scale.dtype)
        plain = Plain()
        return dataclasses.replace(
            held,
            codes=plain.put(held.codes, codes, slots),
            scale=plain.put(held.scale, scale, slots),
            zero=plain.put(held.zero, zero, slots),
        )

    def read(self, held: Codes) -> Float[Array, "b slots groups d"]:
        """All slots."""
        slots = held.codes.shape[1]
        axis = 1 if held.along == "channel" else 3
        scale, zero = (jnp.repeat(x, self.group, axis)[:, :slots] for x in (held.scale, held.zero))
        numbers = dequantise(unpack(held.codes, self.bits), scale, zero)  # [B, S, G, D]
        return self._with_recent(held, numbers, jnp.arange(slots)[None])

    def read_at(self, held: Codes, slots: Int[Array, "b m *groups"]) -> Float[Array, "b m groups d"]:
        """These slots."""
        at, by_channel = Plain().read_at, held.along == "channel"
        scale, zero = (
            at(x, slots // self.group) if by_channel else jnp.repeat(at(x, slots), self.group, 3)
            for x in (held.scale, held.zero)
        )
        numbers = dequantise(unpack(at(held.codes, slots), self.bits), scale, zero)  # [B, M, G, D]
        return self._with_recent(held, numbers, slots)

    def _by_token(self, new: Float[Array, "b n groups d"], dtype: DTypeLike) -> tuple[Array, Array, Array]:
        """Packed codes, scales and zeros of tokens."""
        parted = new.reshape(*new.shape[:3], -1, self.group)  # [B, N, G, D / group, group]
        codes, scale, zero = quantise(parted, self.bits, 4, dtype)
        return pack(codes.reshape(new.shape), self.bits), scale[..., 0], zero[..., 0]

    def _append_blocks(
        self, held: Codes, new: Float[Array, "b n groups d"], written: Int[Array, " b"]
    ) -> Codes:
        """Quantises every block of `group` slots that new tokens go into, whole or not yet."""
        (batch, count, *rest), size, plain = new.shape, self.group, Plain()
        blocks = -(-(count - 1) // size) + 1
        first = written // size  # [B], the block that the first of them goes into
        begun = (first * size)[:, None] + jnp.arange(size)[None]  # [B, group]
        rows = jnp.concatenate(
            [
                plain.read_at(held.recent, begun % held.recent.shape[1]),
                jnp.zeros((batch, (blocks - 1) * size, *rest), held.recent.dtype),
            ],
            axis=1,
        )  # [B, blocks group, G, D]
        rows = plain.append(rows, new, written % size)
        parted = rows.reshape(batch, blocks, size, *rest)  # [B, blocks, group, G, D]
        codes, scale, zero = quantise(parted, self.bits, 2, held.scale.dtype)
        # Slots and blocks behind the last are out of range, and not written.
        slots = (first * size)[:, None] + jnp.arange(blocks * size)[None]  # [B, blocks group]
        which = first[:, None] + jnp.arange(blocks)[None]  # [B, blocks]
        return dataclasses.replace(
            held,
            codes=plain.put(held.codes, pack(codes.reshape(rows.shape), self.bits), slots),
            scale=plain.put(held.scale, scale[:, :, 0], which),
            zero=plain.put(held.zero, zero[:, :, 0], which),
        )

    def _with_recent(
        self, held: Codes, numbers: Float[Array, "b m groups d"], slots: Int[Array, "#b m *groups"]
    ) -> Float[Array, "b m groups d"]:
        """The same numbers, but of the latest slots as they were written."""
        if held.recent is None:
            return numbers
        slots = jnp.broadcast_to(slots, (numbers.shape[0], *slots.shape[1:]))
        kept = held.recent.shape[1]
        written = held.written.reshape(-1, *[1] * (slots.ndim - 1))
        latest = (slots < written) & (slots >= written - kept)  # [B, M, ...]
        latest = latest.reshape(*latest.shape, *[1] * (4 - latest.ndim))
        return jnp.where(latest, Plain().read_at(held.recent, slots % kept), numbers)


def _remember(
    held: Codes,
    new: Float[Array, "b n groups d"],
    written: Int[Array, " b"],
    count: Int[Array, " b"] | None,
) -> Codes:
    """Keeps the latest tokens as they are, in the place of those before them."""
    size, tokens = held.recent.shape[1], jnp.full_like(written, new.shape[1]) if count is None else count
    at = jnp.arange(new.shape[1])[None]  # [1, N]
    latest = (at < tokens[:, None]) & (at >= tokens[:, None] - size)  # [B, N]
    # What is not among the latest goes out of range: it is not written.
    places = jnp.where(latest, (written[:, None] + at) % size, size)  # [B, N]
    return dataclasses.replace(held, recent=Plain().put(held.recent, new, places), written=written + tokens)


def quantise(
    x: Float[Array, "*shape"], bits: int, axis: int, dtype: DTypeLike
) -> tuple[UInt8[Array, "*shape"], Float[Array, "*one"], Float[Array, "*one"]]:
    """Codes, scales and zeros, where the numbers along an axis share theirs.

    Args:
      x: numbers.
      bits: of a code.
      axis: of a group, whose size becomes 1 in scale and zero.
      dtype: of scale and zero; codes are those of the rounded ones.
    """
    x, levels, wide = x.astype(jnp.float32), 2**bits - 1, jnp.float32
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    zero, scale = low.astype(dtype), ((high - low) / levels).astype(dtype)
    step = jnp.where(scale == 0, 1, scale).astype(wide)  # all alike: the code is 0
    codes = jnp.clip(jnp.round((x - zero.astype(wide)) / step), 0, levels)
    return codes.astype(jnp.uint8), scale, zero


def dequantise(
    codes: UInt8[Array, "*shape"], scale: Float[Array, "*shape"], zero: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Numbers of the codes, in the dtype of scale and zero."""
    wide = jnp.float32
    return (zero.astype(wide) + scale.astype(wide) * codes.astype(wide)).astype(scale.dtype)


def pack(codes: UInt8[Array, "*rest d"], bits: int) -> UInt8[Array, "*rest bytes"]:
    """Bytes of the codes: byte i holds those of i, i + bytes, i + 2 bytes, .., from the lowest bit on."""
    each = 8 // bits
    parted = codes.reshape(*codes.shape[:-1], each, -1)  # [..., each, bytes]
    shifts = (jnp.arange(each, dtype=jnp.uint8) * bits).reshape(*[1] * (parted.ndim - 2), each, 1)
    return jnp.sum(jax.lax.shift_left(parted, jnp.broadcast_to(shifts, parted.shape)), -2, dtype=jnp.uint8)


def unpack(packed: UInt8[Array, "*rest bytes"], bits: int) -> UInt8[Array, "*rest d"]:
    """The codes of bytes that `pack` made."""
    each = 8 // bits
    pieces = [jax.lax.shift_right_logical(packed, jnp.full_like(packed, bits * i)) for i in range(each)]
    return jnp.concatenate(pieces, axis=-1) & jnp.uint8(2**bits - 1)
