"""What decoding with a Block Transformer reads and multiplies, against a decoder of one stack.

    cache  = 2 b (L_b k_b floor(n / B) + L_t k_t (P + B - 1))             bytes of a sequence of n tokens
    read   = 2 b (L_b k_b n / B / B + L_t k_t (P + (B - 1) / 2))          of it, in the mean of a step
    weights = b_w (W_b + P D^2) / B + b_w (W_t + head)                    bytes a step reads for a whole batch

with `k` the channels of the keys of a layer, `W` the matrices of a stack. A step is one token of each
sequence; the block decoder runs once in B of them. Ho et al., "Block Transformer", 2024, arXiv:2406.02657:
the read of the lower cache shrinks by B for the fewer places and by B again for the fewer steps.

    >>> shape, plain = GlobalToLocal.of(model), OneStack(DecoderShape.of(lm))
    >>> best(shape, chip, 2048).tokens_per_second / best(plain, chip, 2048).tokens_per_second
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from effjax.errors import UsageError
from effjax.measure.analytic.serving import kv_bytes
from effjax.measure.analytic.shape import Chip, DecoderShape, Number, peak_of
from effjax.models.block_transformer import BlockTransformer
from effjax.models.lm import LM, DecoderBlock


@runtime_checkable
class Decoder(Protocol):
    """What a step of decoding costs; elements and operations of one sequence of `context` tokens."""

    @property
    def parameters(self) -> int: ...  # noqa: D102
    def cache_bytes(self, context: int, bytes_per_kv: Number = 2) -> Number: ...  # noqa: D102
    def cache_read(self, context: int, bytes_per_kv: Number = 2) -> Number: ...  # noqa: D102
    def weights_read(self) -> Number: ...  # noqa: D102
    def macs(self, context: int) -> Number: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class OneStack:
    """A decoder that attends to all tokens in all layers."""

    shape: DecoderShape

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.shape.parameters

    def cache_bytes(self, context: int, bytes_per_kv: Number = 2) -> Number:
        """What is kept of one sequence."""
        return context * kv_bytes(self.shape, bytes_per_kv)

    def cache_read(self, context: int, bytes_per_kv: Number = 2) -> Number:
        """A step reads all of it."""
        return self.cache_bytes(context, bytes_per_kv)

    def weights_read(self) -> Number:
        """Elements of all matrices and the head."""
        return self.shape.multiplied

    def macs(self, context: int) -> Number:
        """Multiply-accumulates of one token."""
        attention = 2 * self.shape.depth * context * self.shape.heads * self.shape.head_dim
        return self.shape.multiplied + attention


@dataclasses.dataclass(frozen=True)
class GlobalToLocal:
    """A Block Transformer: the shapes of its stacks, each as a decoder without tables of its own."""

    blocks: DecoderShape
    tokens: DecoderShape
    block_length: int
    prefix: int

    @classmethod
    def of(cls, model: BlockTransformer) -> "GlobalToLocal":
        """Reads the shapes off a definition."""

        def shape(block: DecoderBlock, depth: int) -> DecoderShape:
            return DecoderShape.of(LM(block, model.vocab, model.dim, depth))

        lower = shape(model.block_decoder, model.block_depth)
        upper = shape(model.token_decoder, model.token_depth)
        return cls(lower, upper, model.block_length, model.prefix)

    @property
    def parameters(self) -> int:
        """Both stacks and their norms, three tables, and the expansion with its bias."""
        dim, table = self.blocks.dim, self.blocks.vocab * self.blocks.dim
        stacks = self.blocks.parameters + self.tokens.parameters - 4 * table
        expansion = self.prefix * dim * (dim + 1)
        return stacks + 2 * table + table // self.block_length + expansion

    def cache_bytes(self, context: int, bytes_per_kv: Number = 2) -> Number:
        """What is kept of one sequence."""
        lower = context // self.block_length * kv_bytes(self.blocks, bytes_per_kv)
        return lower + (self.prefix + self.block_length - 1) * kv_bytes(self.tokens, bytes_per_kv)

    def cache_read(self, context: int, bytes_per_kv: Number = 2) -> Number:
        """What a step reads of it in the mean."""
        lower = context / self.block_length**2 * kv_bytes(self.blocks, bytes_per_kv)
        return lower + (self.prefix + (self.block_length - 1) / 2) * kv_bytes(self.tokens, bytes_per_kv)

    def weights_read(self) -> Number:
        """Elements of matrices in the mean of a step."""
        expansion = self.prefix * self.blocks.dim**2
        lower = self.blocks.depth * self.blocks.block_matrices + expansion
        return lower / self.block_length + self.tokens.multiplied

    def macs(self, context: int) -> Number:
        """Multiply-accumulates of one token, in the mean.

        The token decoder multiplies the prefix and all tokens but the last of a block.
        """
        lower, upper, size = self.blocks, self.tokens, self.block_length
        expansion = self.prefix * lower.dim**2
        places = self.prefix + size - 1
        attended = places * (places + 1) // 2
        below = lower.depth * (lower.block_matrices + 2 * context / size * lower.heads * lower.head_dim)
        above = upper.depth * (places * upper.block_matrices + 2 * attended * upper.heads * upper.head_dim)
        return (below + expansion + above) / size + upper.vocab * upper.dim


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding of a batch of sequences at peak rates."""

    batch: int
    seconds: Number
    """Of a step."""
    bound: str
    """`memory` or `compute`."""

    @property
    def tokens_per_second(self) -> Number:
        """Of the whole batch."""
        return self.batch / self.seconds


def decode(
    decoder: Decoder, chip: Chip, context: int, batch: int, *, dtype: str = "bfloat16", size: Number = 2
) -> Decoding:
    """A step of `batch` sequences that each hold `context` tokens.

    Args:
      decoder: `OneStack` or `GlobalToLocal`.
      chip: its rates.
      context: tokens of a sequence.
      batch: how many sequences.
      dtype: whose rate of operations counts.
      size: bytes of a weight and of an element of the cache.
    """
    read = size * decoder.weights_read() + batch * decoder.cache_read(context, size)
    memory, compute = read / chip.bandwidth, 2 * batch * decoder.macs(context) / peak_of(chip, dtype)
    return Decoding(batch, max(memory, compute), "memory" if memory >= compute else "compute")


def best(decoder: Decoder, chip: Chip, context: int, *, size: Number = 2) -> Decoding:
    """The same with as many sequences as the memory holds beside the weights.

    Raises:
      UsageError: where not one fits.
    """
    batch = math.floor((chip.memory - size * decoder.parameters) / decoder.cache_bytes(context, size))
    if batch < 1:
        raise UsageError(f"not one sequence of {context} tokens fits beside the weights: take a larger chip.")
    return decode(decoder, chip, context, batch, size=size)
