"""The same model with some of its layers left out.

    x <- block_l(x)                                             for the layers l that are kept, in their order

Embedding, last norm and head are those of the whole model. Any subset is a draft for speculative decoding
that needs no training and whose weights are there already: Zhang et al., "Draft & Verify: Lossless Large
Language Model Acceleration via Self-Speculative Decoding", ACL 2024, arXiv:2309.08168, section 3.1. The first
layers alone are early exit, for which Elhoushi et al., "LayerSkip", ACL 2024, arXiv:2404.16710, train.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from effjax.errors import UsageError
from effjax.layers.stack import Stack, layers_of
from effjax.models.lm import LM


def fewer_layers(model: LM, variables: Mapping[str, Any], kept: Sequence[int]) -> tuple[LM, dict[str, Any]]:
    """A model of the layers that are kept, and its variables.

    Args:
      model: any; each layer keeps its kind, where they differ.
      variables: its own, with the layers stacked or apart. Layers that stand apart are not copied.
      kept: numbers of layers, from 0, in rising order.

    Raises:
      UsageError: for no layers, layers that are not there, another order, or norms scaled by the number of
        their layer.
    """
    if not kept:
        raise UsageError("no layer is kept: name at least one.")
    if strange := [layer for layer in kept if not 0 <= layer < model.depth]:
        raise UsageError(f"layer {strange[0]} is not there: the model has the layers 0 to {model.depth - 1}.")
    if list(kept) != sorted(set(kept)):
        raise UsageError(f"layers {', '.join(map(str, kept))}: name each once, in rising order.")
    if model.norm_scaling and list(kept) != list(range(len(kept))):
        raise UsageError(
            "norm_scaling divides by the number of the layer, which changes: keep the first layers, or fold "
            "the factors into the norms with effjax.compress.norm_scaling.folded."
        )

    stack = Stack(model.block, model.depth, shared=model.shared)
    cut: dict[str, Any] = {}
    for name, tree in variables.items():
        if "blocks" not in tree:
            cut[name] = tree
        elif name == "params":
            cut[name] = {**tree, "blocks": stack.layers_of(tree["blocks"], kept)}
        else:
            cut[name] = {**tree, "blocks": layers_of(tree["blocks"], kept)}
    kinds = tuple(model.layers[layer % len(model.layers)] for layer in kept) if model.layers else ()
    return model.clone(depth=len(kept), layers=kinds), cut
