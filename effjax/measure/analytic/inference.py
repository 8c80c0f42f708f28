"""Parameters, FLOPs, bytes and roofline time of a transformer, from its shape alone.

    multiply-accumulates of n tokens that see m = L (B n + 2 n m d) + T n + S + L C
    bytes = weights + 2 bits / 8 L n_kv d_head m                   read for it; L layers, d = heads d_head
    seconds = max(2 macs / F, bytes / B)

B are the matrices of a block; T those outside the blocks that meet every token (patches, a language model's
head), S those that meet a sample once (a classifier, a pooler), C those of a block that do (adaLN). `n = m`
is a whole sequence, `n = 1` one decoding step. Compression changes what is stored and multiplied: fewer
bits, a share of the weights left out, factors of low rank.

The techniques are those of Chitty-Venkata, Mittal, Emani, Vishwanath and Somani, "A Survey of Techniques for
Optimizing Transformer Inference", 2023, arXiv:2307.07982; `effjax.catalog.FAMILIES` has its families. The
shapes are the models' own: BERT, Devlin et al. 2019; GPT-2, Radford et al. 2019.

    >>> infer(Transformer.of_lm(model), CHIPS["v5e"], new=1, seen=4096, batch=8).bound
    'memory'
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.layers.norms import norm_size
from effjax.measure.analytic.shape import (
    Chip,
    DecoderShape,
    Number,
    ffn_biases,
    mixer_biases,
    peak_of,
)
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.switch_dit import SwitchDiTBlock
from effjax.models.dit import DiT
from effjax.models.lm import LM
from effjax.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Transformer:
    """An encoder or decoder of equal blocks; counts of elements, not of bytes."""

    depth: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = False
    vectors: int = 0
    """Biases and norms of one block."""
    conditioning: int = 0
    """Matrices of one block that meet a sample once: adaLN."""
    merged: int = 0
    """Of one block, elements of a sum of such matrices that every token of a sample meets: no parameters."""
    token_matrices: int = 0
    """Outside the blocks, met by every token."""
    sample_matrices: int = 0
    """Outside the blocks, met once by a sample."""
    unembedded: int = 0
    """Tokens that do not meet the token matrices: the class token is no patch."""
    tables: int = 0
    """Outside the blocks and not multiplied: embeddings, positions, norms, biases."""

    @property
    def block_matrices(self) -> int:
        """Elements of the matrices of one block that every token meets."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.dim * self.hidden

    @property
    def matrices(self) -> int:
        """Elements of all matrices: what compression works on."""
        inside = self.depth * (self.block_matrices + self.conditioning)
        return inside + self.token_matrices + self.sample_matrices

    @property
    def parameters(self) -> int:
        """Number of parameters; a table that is also a head is in `token_matrices` only."""
        return self.matrices + self.depth * self.vectors + self.tables

    def matrix_macs(self, new: int) -> int:
        """Multiply-accumulates of `new` tokens of one sample with weights."""
        inside = self.depth * (new * (self.block_matrices + self.merged) + self.conditioning)
        return inside + (new - self.unembedded) * self.token_matrices + self.sample_matrices

    def attention_macs(self, new: int, seen: int) -> int:
        """Multiply-accumulates of `new` queries with `seen` keys and values, none left out."""
        return 2 * self.depth * new * seen * self.heads * self.head_dim

    @classmethod
    def of_decoder(cls, shape: DecoderShape) -> "Transformer":
        """A decoder by its shape."""
        table = shape.vocab * shape.dim
        return cls(
            depth=shape.depth,
            dim=shape.dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            hidden=shape.hidden,
            gated=shape.gated,
            vectors=2 * shape.dim + shape.biases,
            token_matrices=table,
            tables=shape.dim + (0 if shape.tied else table),
        )

    @classmethod
    def of_lm(cls, model: LM) -> "Transformer":
        """A language model of this library."""
        return cls.of_decoder(DecoderShape.of(model))

    @classmethod
    def of_vit(cls, model: ViT, tokens: int, channels: int = 3) -> "Transformer":
        """A classifier of this library for pictures of `tokens` tokens, those before the patches included.

        Raises:
          UsageError: for a pool that gives more than one vector, or has parameters, and for a norm on pixels.
        """
        if model.pixel_norm:
            raise UsageError("no closed form for pixel_norm: count it with effjax.measure.count.")
        if model.pool == "none" or isinstance(model.pool, nn.Module):
            told = model.pool if isinstance(model.pool, str) else type(model.pool).__name__
            raise UsageError(f"no closed form for pool={told!r}: count it with effjax.measure.count.")
        dim, block = model.dim, model.block
        norm, heads = norm_size(block.norm, dim), 1 + model.distillation
        in_block = (norm + dim * (block.layer_scale is not None)) * (1 if block.order == "parallel" else 2)
        pooled = dim * (2 if model.pool == "token_mean" else 1)
        layer = model.representation or 0
        outside = (model.final_norm != "none") + model.patch_norm + model.pre_norm
        positions = 0 if model.positioned == "none" else tokens - model.prefix + model.positioned_prefix
        rows = model.patch_bias + positions + model.prefix + model.mask_token
        return dataclasses.replace(
            blocks_of(model.block, model.dim, model.depth, in_block),
            token_matrices=model.patch**2 * channels * dim,
            sample_matrices=pooled * layer + (layer or pooled) * model.classes * heads,
            unembedded=model.prefix,
            # Patch bias, positions and the tokens of their own; norms; biases of the layers behind the pool.
            tables=rows * dim + outside * norm + layer + model.classes * heads,
        )

    @classmethod
    def of_dit(cls, model: DiT, channels: int = 4) -> "Transformer":
        """A diffusion transformer of this library for pictures of `channels` channels.

        Raises:
          UsageError: for another block than DiT's own.
        """
        if not isinstance(model.block, DiTBlock):
            raise UsageError(
                f"no closed form for {type(model.block).__name__}: count it with effjax.measure.count."
            )
        pixels = model.patch**2 * channels
        out = pixels * (2 if model.learned_sigma else 1)
        dim = model.dim
        own = model.condition == "per_block"  # then its embedding counts with the block
        time = model.frequencies * dim + dim * dim
        labels = (2 + model.classes + model.null_class) * dim  # and the two biases of the time embedding
        experts = model.block.experts if isinstance(model.block, SwitchDiTBlock) else 0
        # The norms have no weights unless the second one is affine, the modulation has a bias, as experts
        # and their gates have.
        norms = (6 + 2 * model.block.ffn_affine) * dim + own * labels + experts * (dim + 1)
        return dataclasses.replace(
            blocks_of(model.block, dim, model.depth, norms),
            conditioning=6 * dim * dim + own * time + experts * (dim * dim + dim),
            merged=dim * dim if experts else 0,
            token_matrices=(pixels + out) * dim,
            sample_matrices=2 * dim * dim + (not own) * time,  # last modulation, time embedding
            # Patch bias, two vectors of modulation, output bias.
            tables=3 * dim + out + (not own) * labels,
        )


def blocks_of(block: Any, dim: int, depth: int, vectors: int) -> Transformer:
    """A stack of equal blocks alone, whose norms and modulation have so many `vectors` in each.

    Raises:
      UsageError: for a mixer or an FFN without a closed form.
    """
    mixer, ffn = block.mixer, block.ffn
    if type(mixer) is not Attention or not isinstance(ffn, Gated | MLP):
        raise UsageError(
            f"no closed form for {type(mixer).__name__} with {type(ffn).__name__}: count it with "
            f"effjax.measure.count."
        )
    kv_heads, size = mixer.sizes(dim)
    hidden, gated = ffn.hidden or round(dim * ffn.ratio), isinstance(ffn, Gated)
    vectors += mixer_biases(mixer, dim) + ffn_biases(ffn.use_bias, gated, dim, hidden)
    return Transformer(depth, dim, mixer.heads, kv_heads, size, hidden, gated, vectors)


# Both are blocks with a bias on every matrix and two layer norms, four times as wide inside.
# BERT: 30,522 words, 512 positions, 2 segments, a norm; the pooler has a matrix and a bias. No head.
BERT_BASE = Transformer(
    depth=12,
    dim=768,
    heads=12,
    kv_heads=12,
    head_dim=64,
    hidden=3072,
    vectors=13 * 768,
    sample_matrices=768**2,
    tables=(30_522 + 512 + 2 + 2 + 1) * 768,
)
# GPT-2: the head is the table of 50,257 words; 1024 positions and a last norm.
GPT2 = dataclasses.replace(BERT_BASE, sample_matrices=0, token_matrices=50_257 * 768, tables=(1024 + 2) * 768)


@dataclasses.dataclass(frozen=True)
class Shrink:
    """What compression leaves of the matrices; vectors and tables stay as they are.

    Raises:
      UsageError: for a sparsity outside [0, 1), or a rank ratio or bits that are not positive.
    """

    weight_bits: Number = 16
    kv_bits: Number = 16
    sparsity: Number = 0
    """Share of the weights that is left out, of bytes as of work: structured, or hardware that skips."""
    rank: Number | None = None
    """Rank of every block matrix's two factors, over the smaller of its sides; None leaves it whole."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity is the share left out, in [0, 1), not {self.sparsity}.")
        if min(self.weight_bits, self.kv_bits, 1 if self.rank is None else self.rank) <= 0:
            raise UsageError("weight_bits, kv_bits and rank must be positive.")

    def block_matrices(self, model: Transformer) -> Number:
        """Elements left of one block's matrices; m x n at rank r has r (m + n), and may so become more."""
        inner, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        sides = [(model.dim, inner)] * 2 + [(model.dim, kv)] * 2
        sides += [(model.dim, model.hidden)] * (3 if model.gated else 2)
        if self.rank is None:
            left: Number = sum(m * n for m, n in sides)
        else:
            left = sum(self.rank * min(m, n) * (m + n) for m, n in sides)
        return left * (1 - self.sparsity)


@dataclasses.dataclass(frozen=True)
class Inference:
    """One call of a model on one chip."""

    weight_elements: Number
    weight_bytes: Number
    kv_bytes: Number
    """Keys and values of the tokens seen, of the whole batch."""
    activation_bytes: Number
    """The widest moment between two blocks: residual stream and the FFN's hidden channels."""
    flops: Number
    intensity: Number
    """FLOPs a byte of weights and cache."""
    compute_seconds: Number
    memory_seconds: Number

    @property
    def seconds(self) -> Number:
        """The roofline: what it takes at least."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of the two it is."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


def infer(
    model: Transformer,
    chip: Chip,
    *,
    new: int,
    seen: int | None = None,
    batch: int = 1,
    shrink: Shrink | None = None,
    dtype: str = "bfloat16",
    activation_bits: Number = 16,
) -> Inference:
    """Evaluates the closed forms for `new` tokens of each sample that attend to `seen` tokens in all.

    Args:
      model: its shape.
      chip: rates.
      new: tokens computed: the sequence, or 1 for a decoding step.
      seen: tokens attended to, the new ones included; by default `new`, without a cache.
      batch: samples; weights are read once for all of them.
      shrink: what compression leaves.
      dtype: what the matrix units compute in, a name in `chip.peak`.
      activation_bits: of activations.

    Raises:
      UsageError: for fewer tokens seen than new ones, an empty batch, or a dtype without a rate.
    """
    cached, seen, shrink = seen is not None, new if seen is None else seen, shrink or Shrink()
    if not 0 < new <= seen or batch < 1:
        raise UsageError(f"new={new}, seen={seen}, batch={batch}: give 0 < new <= seen and batch >= 1.")
    left = shrink.block_matrices(model)
    outside = model.matrices - model.depth * model.block_matrices
    kept = model.depth * left + outside * (1 - shrink.sparsity)
    plain = model.parameters - model.matrices
    weights = kept * shrink.weight_bits / 8 + plain * activation_bits / 8
    kv = batch * 2 * model.depth * seen * model.kv_heads * model.head_dim * shrink.kv_bits / 8
    other = model.matrix_macs(new) - new * model.depth * model.block_matrices
    per_sample = new * model.depth * left + other * (1 - shrink.sparsity)
    flops = 2 * batch * (per_sample + model.attention_macs(new, seen))
    # A table is looked up, not read: one row a token, next to nothing.
    read = weights - plain * activation_bits / 8 + (kv if cached else 0)
    return Inference(
        weight_elements=kept + plain,
        weight_bytes=weights,
        kv_bytes=kv,
        activation_bytes=batch * new * (model.dim + model.hidden) * activation_bits / 8,
        flops=flops,
        intensity=flops / read,
        compute_seconds=flops / peak_of(chip, dtype),
        memory_seconds=read / chip.bandwidth,
    )
