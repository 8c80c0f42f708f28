"""LayerNorm Scaling, and the ordinary model that it is.

    x <- x + mixer(norm(x) / sqrt(l)),   x <- x + ffn(norm(x) / sqrt(l))          l = 1 .. depth

With norms before the branches the variance of `x` grows with depth like an exponential, so that deep blocks
come near the identity and learn little; divided so it grows like a polynomial. `LM.norm_scaling` switches it
on for training. A scaled norm is a norm with smaller parameters, so that a trained model needs no code of its
own: `folded` moves the factors into them.

Source: Sun et al., "The Curse of Depth in Large Language Models", NeurIPS 2025, section 4.
"""

from typing import Any

from effjax.errors import UsageError
from effjax.models.lm import LM

NORMS = "mixer_norm", "ffn_norm"


def folded(model: LM, params: dict[str, Any]) -> tuple[LM, dict[str, Any]]:
    """The plain model that computes the same, and its parameters.

    Args:
      model: with `norm_scaling`.
      params: its parameters, a tree of nested dicts.

    Raises:
      UsageError: for a model without, or whose norms are the same in all layers.
    """
    scales = model.scales()
    if scales is None:
        raise UsageError("the model has norm_scaling=False: there is nothing to fold.")
    blocks = dict(params["blocks"])
    for name in NORMS:
        if name not in blocks:
            continue
        if any(leaf.shape[0] != model.depth or leaf.ndim < 2 for leaf in blocks[name].values()):
            raise UsageError(f"{name} is shared by all layers, and each needs a factor of its own.")
        blocks[name] = {
            leaf: value * scales[:, None].astype(value.dtype) for leaf, value in blocks[name].items()
        }
    return model.clone(norm_scaling=False), {**params, "blocks": blocks}
