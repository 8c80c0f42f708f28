"""The few numbers that the analytic models read of a decoder and of a chip.

>>> DecoderShape.of(model)                                # any language model of this library
>>> DecoderShape(60, 7168, 56, 8, 128, 20480, 64_000)     # or a published one: Yi-34B
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.layers.norms import norm_size
from effjax.mixers.attention import Attention
from effjax.models.lm import LM, DecoderBlock

Number = int | float


@runtime_checkable
class Chip(Protocol):
    """What is read of a chip; `effjax.measure.chips.CHIPS` has them, and anything with these attributes does.

    Attributes:
      peak: FLOP/s by dtype name, `{"bfloat16": 312e12}`.
      memory: bytes of its own memory.
      bandwidth: bytes/s of that memory.
      host_link: bytes/s to the host's memory, one direction.
    """

    @property
    def peak(self) -> Mapping[str, Number]: ...  # noqa: D102
    @property
    def memory(self) -> int: ...  # noqa: D102
    @property
    def bandwidth(self) -> Number: ...  # noqa: D102
    @property
    def host_link(self) -> Number: ...  # noqa: D102


def peak_of(chip: Chip, dtype: str) -> Number:
    """FLOP/s of a chip in one dtype.

    Raises:
      UsageError: for a dtype that the chip has no rate for.
    """
    if dtype not in chip.peak:
        raise UsageError(f"the chip has no peak rate for {dtype!r}: choose one of {', '.join(chip.peak)}.")
    return chip.peak[dtype]


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """A decoder of equal blocks: attention with grouped queries, then a feed-forward layer.

    Raises:
      UsageError: where the key/value heads do not divide the heads.
    """

    depth: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    tied: bool = False
    """Whether the head is the embedding table again."""
    gated: bool = True
    """Whether the feed-forward layer has a third matrix, the gate."""
    biases: int = 0
    """Elements of the biases and head norms of one block; the two RMS norms are counted without it, so that
    other norms count by their difference."""
    others: int = 0
    """Elements outside the blocks besides embedding, one RMS norm and head: a position table, biases."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}.")

    @classmethod
    def of(cls, model: LM) -> "DecoderShape":
        """Reads the shape off a language model's definition; nothing is initialised.

        Raises:
          UsageError: for a mixer or a feed-forward layer whose cost has no closed form here.
        """
        mixer, ffn = model.block.mixer, model.block.ffn
        slides = isinstance(mixer, Attention) and mixer.window is not None
        slides |= any(layer.window is not None for layer in model.layers)
        # Attention alone: what is made from it has other weights.
        if type(mixer) is not Attention or not isinstance(ffn, Gated | MLP) or slides:
            raise UsageError(
                f"no closed form for {type(mixer).__name__}{' with a window' if slides else ''} with "
                f"{type(ffn).__name__}: count it with effjax.measure.count."
            )
        kv_heads, size = mixer.sizes(model.dim)
        hidden = ffn.hidden or round(model.dim * ffn.ratio)
        gated = isinstance(ffn, Gated)
        return cls(
            depth=model.depth,
            dim=model.dim,
            heads=mixer.heads,
            kv_heads=kv_heads,
            head_dim=size,
            hidden=hidden,
            vocab=model.vocab,
            tied=model.tied,
            gated=gated,
            biases=mixer_biases(mixer, model.dim)
            + ffn_biases(ffn.use_bias, gated, model.dim, hidden)
            + block_norms(model.block, model.dim)
            - 2 * model.dim,
            others=(norm_size(model.last_norm or model.block.norm, model.dim) - model.dim)
            + model.position_table * model.dim
            + (model.vocab if model.head_bias else 0),
        )

    @property
    def block_matrices(self) -> int:
        """Elements of the matrices of one block: those that every token is multiplied with."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.dim * self.hidden

    @property
    def multiplied(self) -> int:
        """Elements of all matrices that a token is multiplied with, the head included."""
        return self.depth * self.block_matrices + self.vocab * self.dim

    @property
    def parameters(self) -> int:
        """Number of parameters: matrices, norms, biases, the embedding, and the head where it is not tied."""
        tables = self.vocab * self.dim * (1 if self.tied else 2)
        blocks = self.depth * (self.block_matrices + 2 * self.dim + self.biases)
        return blocks + self.dim + tables + self.others


def mixer_biases(mixer: Attention, dim: int) -> int:
    """Elements of an attention layer that are no matrix: biases, and the norms of query and key."""
    kv_heads, size = mixer.sizes(dim)
    inputs = size * (mixer.heads + 2 * kv_heads) if mixer.qkv_bias else 0
    norms = 0
    if mixer.qk_norm:
        spans = (1, 1) if mixer.qk_norm_over == "head" else (mixer.heads, kv_heads)
        norms = sum(norm_size(mixer.qk_norm_kind, span * size) for span in spans)
    return inputs + (dim if mixer.out_bias else 0) + norms


def block_norms(block: DecoderBlock, dim: int) -> int:
    """Elements of the norms of one block that are as wide as the model."""
    branches = 1 if block.parallel == "one_norm" else 2
    count = {"before": branches, "after": 2, "both": branches + 2}[block.norm_at]
    return count * norm_size(block.norm, dim)


def ffn_biases(use_bias: bool, gated: bool, dim: int, hidden: int) -> int:
    """Elements of the biases of a feed-forward layer."""
    return (2 if gated else 1) * hidden + dim if use_bias else 0
