"""GemFilter: an early layer says which tokens of a long prompt matter, and the model reads those alone.

    s_j = sum_h q_n^h . k_j^h                          of layer r, after rotation; n is the last token
    chosen = sort(top_k(mean of s over `pool` neighbours))
    text = generate(prompt[chosen])

The first pass runs the layers before `r` and of layer r the projections to queries and keys. What it keeps is
`k` token numbers: they go through the whole model at fresh positions, so that every layer's cache has `k`
places. All layers and heads read the same tokens, which a person can read too. For N tokens, of m layers,

    multiply-accumulates: about r / m of the model's own for N tokens, and its own for k

`softmax` would not change the order of one head's scores, but it would that of their sum: the products are
summed as they are, not scaled. Query heads that share a key are summed before they meet it. Neighbours that
do not exist count as zeros, and nothing is always kept, as in the published code.

Source: Shi, Ming, Nguyen, Liang and Joty, "Discovering the Gems in Early Layers", 2024, arXiv:2409.17422,
algorithm 1; github.com/SalesforceAIResearch/GemFilter, whose layers count from 0 as here: 13 of 32 for
Llama-3.1-8B, 19 of 40 for Mistral-Nemo-12B, 19 of 32 for Phi-3.5-mini, with 1024 to 4096 tokens.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.layers.stack import Stack
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.lm import LM, DecoderBlock


@dataclasses.dataclass(frozen=True)
class GemFilter:
    """Which tokens of a prompt are read.

    Attributes:
      layer: whose queries and keys choose, from 0; as many layers run before it.
      keep: tokens that stay of a longer prompt.
      pool: neighbouring scores that are averaged, an odd number; 1 takes each as it is.
      recent: last tokens that stay in any case; the published code has 0.
    """

    layer: int
    keep: int
    pool: int = 5
    recent: int = 0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UsageError(f"layer={self.layer} must be 0, the first, or more.")
        if self.keep < 1:
            raise UsageError(f"keep={self.keep} must be at least 1 token.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"pool={self.pool} must be odd: a score and as many on either side of it.")
        if not 0 <= self.recent <= self.keep:
            raise UsageError(f"recent={self.recent} must be between 0 and keep={self.keep}.")

    def check(self, model: nn.Module) -> None:
        """Refuses models that have no such layer.

        Raises:
          UsageError: for a model other than a plain `LM`, without attention, or without so many layers.
        """
        plain = type(model) is LM and type(model.block) is DecoderBlock
        if not plain or not isinstance(model.block.mixer, Attention):
            named = type(model.block.mixer).__name__ if plain else type(model).__name__
            raise UsageError(
                f"{named} has no queries and keys to choose tokens by: GemFilter needs an LM of attention."
            )
        if self.layer >= model.depth:
            raise UsageError(f"layer={self.layer} of {model.depth}: the last one is {model.depth - 1}.")
        if model.layer_blocks and model.layer_blocks[self.layer].mixer is None:
            raise UsageError(f"layer={self.layer} has no mixer: choose another.")


def compress(
    model: LM, variables: Any, prompts: Int[Any, "b n"], lengths: Int[Any, " b"], gems: GemFilter
) -> tuple[Int[Array, "b k"], Int[Array, " b"]]:
    """The tokens that stay, in their order, as prompts for `generate`.

    Args:
      model: attention's queries and keys choose.
      variables: of the model. Where its layers do not stand apart those that run are copied.
      prompts: tokens, padded in front; see `left_pad`.
      lengths: how many tokens of each row are the prompt, at least 1.
      gems: which layer chooses, and how many.

    Returns:
      Rows of `min(keep, n)` tokens, padded in front where a prompt is shorter, and their lengths. Where no
      prompt can be longer than `keep` they are those given, and nothing runs.

    Raises:
      UsageError: as `GemFilter.check` does.
    """
    gems.check(model)
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    if gems.keep >= prompts.shape[1]:
        return prompts, lengths
    places = choose(scores(model, variables, prompts, lengths, gems.layer), lengths, gems)
    return jnp.take_along_axis(prompts, places, axis=1), jnp.minimum(lengths, gems.keep)


@functools.partial(jax.jit, static_argnames="gems")
def choose(scores: Float[Array, "b n"], lengths: Int[Array, " b"], gems: GemFilter) -> Int[Array, "b k"]:
    """Places of the tokens that stay, rising; of equal scores the first is kept.

    Args:
      scores: of each token.
      lengths: of the prompts, which end together. A shorter one than `keep` keeps all its tokens, with
        padding in front.
      gems: how many.
    """
    place, (_, n) = jnp.arange(scores.shape[1])[None], scores.shape
    exists = place >= n - lengths[:, None]  # [B, N]
    scores = jax.lax.reduce_window(
        jnp.where(exists, scores, 0.0), 0.0, jax.lax.add, (1, gems.pool), (1, 1), "SAME"
    )  # [B, N]: the mean times `pool`
    scores = jnp.where(place >= n - gems.recent, jnp.inf, scores)
    _, places = jax.lax.top_k(jnp.where(exists, scores, -jnp.inf), min(gems.keep, n))  # [B, k]
    return jnp.sort(places, axis=1)


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def scores(
    model: LM, variables: Any, prompts: Int[Array, "b n"], lengths: Int[Array, " b"], layer: int
) -> Float[Array, "b n"]:
    """What the last token's query of one layer makes of every key, summed over heads, in float32.

    Args:
      model: as in `compress`.
      variables: of the model.
      prompts: tokens, padded in front.
      lengths: how many tokens of each row are the prompt.
      layer: which, from 0.
    """
    n = prompts.shape[1]
    positions = jnp.arange(n)[None, :] - (n - lengths)[:, None]  # [B, N], negative on padding
    context = Context(positions=positions, valid=positions >= 0)
    first = _FirstLayers(**_fields(model), layers_run=layer)
    x, _ = first.apply(variables, prompts, context, None, False, method="forward")  # [B, N, C]

    # Each in a pass of its own: who wants no value, or of all queries the last, computes no others.
    q, _ = _queries_and_keys(model, variables, x[:, -1:], positions[:, -1:], layer)  # [B, 1, H, D]
    _, k = _queries_and_keys(model, variables, x, positions, layer)  # [B, N, G, D]
    (b, _, groups, d), precise = k.shape, dict(preferred_element_type=jnp.float32)
    q = q.reshape(b, groups, -1, d).astype(jnp.float32).sum(axis=2)  # [B, G, D]
    return jnp.einsum("bgd,bngd->bn", q, k.astype(jnp.float32), **precise)  # [B, N]


def _queries_and_keys(
    model: LM, variables: Any, x: Float[Array, "b n c"], positions: Int[Array, "b n"], layer: int
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"]]:
    """Those of one layer, normalised and rotated."""
    block, *own = (
        _Projections(**_fields(each) | {"mixer": each.mixer and _Project(each.mixer), "ffn": None})
        for each in (model.block, *model.layer_blocks)
    )
    stack: Any = Stack(block, model.depth, shared=model.shared, blocks=tuple(own))
    of_stack = {name: tree["blocks"] for name, tree in variables.items() if "blocks" in tree}
    context, part = Context(positions=positions), (layer, layer + 1)
    _, (q, k) = stack.apply(of_stack, x, context, each=(None, model.own()), part=part)  # [1, ..]
    return q[0], k[0]


class _FirstLayers(LM):
    """What enters layer `layers_run` of an `LM`, whose parameters it has."""

    layers_run: int = 0

    @nn.compact
    def forward(
        self, tokens: Int[Array, "b n"], context: Context, caches: Any, train: bool
    ) -> tuple[Float[Array, "b n c"], None]:
        x, _ = self.embed(tokens, context, None)  # [B, N, C]
        if self.layers_run:
            stack = self.stack(unroll=self.unroll, name="blocks")
            x, _ = stack(x, context, each=(None, self.own()), part=(0, self.layers_run))  # [B, N, C]
        return x, None


class _Projections(DecoderBlock):
    """Of a block the norm before the mixer, and what the mixer makes of its output."""

    @nn.compact
    def residual(
        self, x: Float[Array, "b n c"], cache: Any, context: Context, train: bool
    ) -> tuple[Float[Array, "b n c"], Any]:
        return x, self.mixer(self._before(x, "mixer_norm", context, train), context)

    def __call__(
        self, x: Float[Array, "b n c"], each: Any, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], Any]:
        return self.step(x, each, context, train)


class _Project(nn.Module):
    """Of attention the projections, under its own names."""

    attention: Attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], context: Context
    ) -> tuple[Float[Array, "b n h d"], Float[Array, "b n g d"]]:
        q, k, _ = self.attention.project(x, context.positions, context)
        return q, k


def _fields(module: nn.Module) -> dict[str, Any]:
    """What a module is made of, for another one that is made of the same."""
    names = (field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name"))
    return {name: getattr(module, name) for name in names}
