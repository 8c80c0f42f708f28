"""What serving a decoder costs at peak rates, as a function of the context.

    kv    = 2 L n_kv d_head b n                          bytes of one user's cache of n tokens
    users = floor((M - weights) / kv)                    how many caches the memory holds
    prefill = max(n (2 P + c L n d) / F, weights / B)    seconds
    decode  = max(batch (2 P + 4 L n d) / F, (weights + batch kv) / B)       seconds a token
    switch  = 2 kv / PCIe                                one cache out, another in
    critical batch = b F / (2 B)                         where the weights' bytes cost as much as their FLOPs

F FLOP/s, B and PCIe bytes/s, M bytes; P are the parameters that multiply, d = heads d_head. Everything that
a longer context costs comes from kv. Source: Fu, "Challenges in Deploying Long-Context Transformers: A
Theoretical Peak Performance Analysis", 2024, arXiv:2405.08944.

The paper's example is Yi-34B 200K on an A100: 312e12 FLOP/s, 2e12 B/s, 80 GB. Its "GB" of a cache are 2^30
bytes and its "K" is 1000 tokens: 100K tokens take 24.58e9 bytes, which it calls 22.8 GB. `c` counts the FLOPs
of attention for each layer, channel and token of context: 4 where the whole square is multiplied, as this
library's attention does, 2 where a kernel leaves out what the causal mask hides. The paper's 14.1 s for 50K
tokens needs c of about 1, half of what a causal kernel multiplies; its text could not be had to see why.

    >>> serve(DecoderShape.of(model), CHIPS["a100"], context=50_000).users
"""

import dataclasses
import math
from collections.abc import Iterable

from effjax.errors import UsageError
from effjax.measure.analytic.shape import Chip, DecoderShape, Number, peak_of


@dataclasses.dataclass(frozen=True)
class Compression:
    """What is left of the cache along each of its four dimensions; 1 is everything. `*` combines.

    Only the cache shrinks, and with fewer tokens what a decoding step multiplies: weights and prefill stay.

    Raises:
      UsageError: for a factor that is not in (0, 1].
    """

    layers: Number = 1.0
    """Layers that keep a cache of their own: 0.5 where two share one."""
    heads: Number = 1.0
    """Key/value heads kept."""
    tokens: Number = 1.0
    """Tokens kept: a window, eviction, merging."""
    hidden: Number = 1.0
    """Bits of a token's key and value in one head: 0.25 for four bits of sixteen, or a low rank."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            factor = getattr(self, field.name)
            if not 0 < factor <= 1:
                raise UsageError(f"Compression.{field.name} is what is left, in (0, 1], not {factor}.")

    @property
    def factor(self) -> Number:
        """What is left of the cache's bytes."""
        return self.layers * self.heads * self.tokens * self.hidden

    def __mul__(self, other: "Compression") -> "Compression":
        return Compression(
            *(getattr(self, f.name) * getattr(other, f.name) for f in dataclasses.fields(self))
        )


def shared_layers(share: int) -> Compression:
    """Every `share` layers read one cache."""
    return Compression(layers=1 / share)


def fewer_heads(shape: DecoderShape, kv_heads: int) -> Compression:
    """Grouped queries with fewer key/value heads than the shape has."""
    return Compression(heads=kv_heads / shape.kv_heads)


def window(size: int, context: int) -> Compression:
    """Only the last `size` tokens are kept, or that many after eviction."""
    return Compression(tokens=min(size, context) / context)


def merged(ratio: Number) -> Compression:
    """Tokens are merged until this ratio of them is left."""
    return Compression(tokens=ratio)


def quantised(bits: Number, of: Number = 16) -> Compression:
    """Keys and values at fewer bits; scales and zero points are to be counted in `bits`."""
    return Compression(hidden=bits / of)


@dataclasses.dataclass(frozen=True)
class Serving:
    """What one replica on `devices` chips does at peak rates with users of one context length."""

    context: int
    devices: int
    weight_bytes: Number
    """Of the whole model."""
    kv_bytes_per_token: Number
    kv_bytes_per_user: Number
    users: int
    """Caches that fit beside the weights; 0 where not even the weights fit."""
    prefill_seconds: Number
    prefill_flops: Number
    decode_flops_per_token: Number
    decode_seconds_per_token: Number
    """For a batch of one."""
    switch_seconds: Number
    """One user's cache out to the host, another's in; infinite where the chip has no link to the host."""
    critical_batch: Number
    """Tokens in flight from which the weights are bound by compute."""
    peak: Number
    """FLOP/s of all devices."""
    bandwidth: Number
    """Bytes/s of all devices."""

    def decode_seconds(self, batch: int) -> Number:
        """Seconds of one step that gives every user of a batch one token."""
        read = (self.weight_bytes + batch * self.kv_bytes_per_user) / self.bandwidth
        return max(read, batch * self.decode_flops_per_token / self.peak)


def serve(
    shape: DecoderShape,
    chip: Chip,
    context: int,
    *,
    devices: int = 1,
    bytes_per_weight: Number = 2,
    bytes_per_kv: Number = 2,
    dtype: str = "bfloat16",
    compression: Compression | None = None,
    attention: Number = 2,
) -> Serving:
    """Evaluates the closed forms above; `devices` chips share weights and caches evenly, each with its own
    link to the host, and what they tell each other takes no time.

    Args:
      shape: of the model.
      chip: rates and memory.
      context: tokens of each user.
      devices: chips of one replica (tensor parallel).
      bytes_per_weight: 0.5 for four bits.
      bytes_per_kv: bytes of an element of the cache before `compression`.
      dtype: what the matrix units compute in, a name in `chip.peak`.
      compression: what is left of the cache.
      attention: c above.

    Raises:
      UsageError: for a context or a number of devices below one, or a dtype without a rate.
    """
    if context < 1 or devices < 1:
        raise UsageError(f"context={context} and devices={devices} must both be at least 1.")
    compression = compression or Compression()
    peak, bandwidth = devices * peak_of(chip, dtype), devices * chip.bandwidth
    weights = shape.parameters * bytes_per_weight
    channels = shape.heads * shape.head_dim
    per_token = kv_bytes(shape, bytes_per_kv) * compression.factor
    kv = context * per_token
    prefill_flops = context * (2 * shape.multiplied + attention * shape.depth * context * channels)
    decode_flops = 2 * shape.multiplied + 4 * shape.depth * context * channels * compression.tokens
    return Serving(
        context=context,
        devices=devices,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_bytes_per_user=kv,
        users=max(0, math.floor((devices * chip.memory - weights) / kv)),
        prefill_seconds=max(prefill_flops / peak, weights / bandwidth),
        prefill_flops=prefill_flops,
        decode_flops_per_token=decode_flops,
        decode_seconds_per_token=max(decode_flops / peak, (weights + kv) / bandwidth),
        switch_seconds=2 * kv / (devices * chip.host_link) if chip.host_link else math.inf,
        critical_batch=bytes_per_weight * peak / (2 * bandwidth),
        peak=peak,
        bandwidth=bandwidth,
    )


def kv_bytes(shape: DecoderShape, bytes_per_kv: Number = 2) -> Number:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * shape.depth * shape.kv_heads * shape.head_dim * bytes_per_kv


def sweep(shape: DecoderShape, chip: Chip, contexts: Iterable[int], **options: object) -> tuple[Serving, ...]:
    """One `serve` for each context; `options` are those of `serve`."""
    return tuple(serve(shape, chip, context, **options) for context in contexts)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Sessions:
    """Sessions a second, by where the caches of users who are reading stay."""

    resident: Number
    """In the chip's memory: no more users at once than fit."""
    swapped: Number
    """In the host's memory: any number of users, and every turn pays a switch."""

    @property
    def best(self) -> Number:
        """The better of the two."""
        return max(self.resident, self.swapped)


def sessions(serving: Serving, *, turns: int, answer: int, reading: Number) -> Sessions:
    """Throughput where every user asks `turns` times, gets `answer` tokens and reads for `reading` seconds.

    The device works for one user at a time, `busy` seconds a session, and serves others while one reads:

        busy = prefill + turns * answer * decode
        resident = min(1 / busy, users / (busy + turns * reading)),   swapped = 1 / (busy + turns * switch)
    """
    busy = serving.prefill_seconds + turns * answer * serving.decode_seconds_per_token
    return Sessions(
        resident=min(1 / busy, serving.users / (busy + turns * reading)),
        swapped=1 / (busy + turns * serving.switch_seconds),
    )
