"""Growth of a TokenFormer: more parameter tokens, and the same outputs.

    K' = [K; 0],    V' = [V; anything],    tau' = tau

Under `norm_gelu` and `gelu_norm` a key of zeros has the score 0 and the weight 0, and the norm of the scores
stays: Theta(X K'^T) V' = Theta(X K^T) V. The keys learn from the first step on, as the slope of gelu at 0 is
a half and values are not zero. Were tau = sqrt(n) to grow with n, weights would change: under `gelu_norm` by
the factor sqrt(n' / n) alike, under `norm_gelu` inside of gelu. Wang et al., "TokenFormer", 2024,
arXiv:2410.23168, section 3.3. The released code starts keys that are new at random; the paper's zeros are
what is here.

    big = widen(small, slots=2140, ffn_slots=8560)
    params = grow(big, params, key, tokens)
    opt_state = padded(opt_state, jax.eval_shape(optimizer.init, params))
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Int, PRNGKeyArray

from effjax.errors import UsageError
from effjax.ffn.pattention import PattentionFFN
from effjax.matching import path_of
from effjax.mixers.token_parameter import TokenParameterAttention
from effjax.models.lm import LM


def widen(model: LM, slots: int, ffn_slots: int, output_slots: int | None = None) -> LM:
    """The definition with more parameter tokens, and tau as it was.

    Args:
      model: with token-parameter attention and FFN.
      slots: of the query, key and value projections.
      ffn_slots: of the FFN.
      output_slots: of the output projection; None means `slots`.

    Raises:
      UsageError: for another model, fewer tokens than it has, or softmax weights, which no key leaves alone.
    """
    mixer, ffn = model.block.mixer, model.block.ffn
    if not isinstance(mixer, TokenParameterAttention) or not isinstance(ffn, PattentionFFN):
        raise UsageError("only a TokenFormer grows: token-parameter attention with a pattention FFN.")
    if "softmax" in (mixer.theta, ffn.theta):
        raise UsageError("softmax gives weight to a key of zeros: only norm_gelu and gelu_norm can grow.")
    after, before = output_slots or slots, mixer.output_slots or mixer.slots
    if slots < mixer.slots or after < before or ffn_slots < ffn.slots:
        had = f"{mixer.slots}, {before} and {ffn.slots}"
        raise UsageError(
            f"slots={slots}, output_slots={after} and ffn_slots={ffn_slots} are fewer than {had}."
        )
    mixer = mixer.clone(
        slots=slots,
        output_slots=after,
        scale_slots=mixer.scale_slots or mixer.slots,
        output_scale_slots=mixer.output_scale_slots or before,
    )
    ffn = ffn.clone(slots=ffn_slots, scale_slots=ffn.scale_slots or ffn.slots)
    return model.clone(block=model.block.clone(mixer=mixer, ffn=ffn))


def grow(big: nn.Module, params: Any, key: PRNGKeyArray, tokens: Int[Array, "b n"]) -> Any:
    """The parameters of `big` that give the outputs of the smaller model.

    Args:
      big: what `widen` made.
      params: of the smaller model, without names on their axes.
      key: of the new value tokens, which start as those of `big` do.
      tokens: any, for their shape.
    """
    fresh = meta.unbox(big.init(key, tokens))["params"]

    def larger(path: Any, old: Array, new: Array) -> Array:
        start = new if path_of(path).endswith("values/kernel") else jnp.zeros_like(new)
        return _corner(path_of(path), old, start)

    return jax.tree_util.tree_map_with_path(larger, params, fresh)


def padded(tree: Any, like: Any) -> Any:
    """Every leaf in the shape of another tree's, zeros behind it: an optimiser's moments after growth.

    Raises:
      UsageError: for a leaf that is larger than its counterpart.
    """

    def larger(path: Any, old: Any, new: Any) -> Array:
        return _corner(path_of(path), jnp.asarray(old), jnp.zeros(new.shape, jnp.result_type(old)))

    return jax.tree_util.tree_map_with_path(larger, tree, like)


def _corner(path: str, old: Array, new: Array) -> Array:
    """`new` with `old` in its first places."""
    if old.ndim != new.ndim or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        raise UsageError(f"{path} has shape {old.shape} and cannot grow to {new.shape}.")
    return new.at[tuple(slice(size) for size in old.shape)].set(old.astype(new.dtype))
