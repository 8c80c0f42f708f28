"""Layer plans: how often each block of a trained language model runs, said beforehand.

    x <- B_l(x), c_l times,   l = 1 .. L           c_l = 0 skips a block, 1 executes it, 2 repeats it

A plan is the counts `(c_1, ..., c_L)`. `planned` makes the network that runs it: the blocks that are left out
are not there any more and a repeated one stands twice, with the same weights and a cache of its own each
time. It is an ordinary `LM` of as many blocks as run, and costs as much. Early exit behind block r is the
plan of r ones, and a published list of removed layers is a plan without these. Any subset of the blocks is a
draft for speculative decoding whose weights are there already: Zhang et al., "Draft & Verify", ACL 2024,
arXiv:2309.08168, section 3.1.

Routers that make a plan for each sequence are in `effjax.models.routed_lm`.

Sources: Men et al., "ShortGPT", 2024, arXiv:2403.03853 (blocks removed by a list); Heakl et al., "Dr.LLM",
ICLR 2026, arXiv:2510.12773 (skip, execute and repeat).
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from effjax.decoding.layer_router import EXECUTE, REPEAT, SKIP
from effjax.errors import UsageError
from effjax.layers.stack import layers_of
from effjax.models.lm import LM

Plan = tuple[int, ...]


def skipping(depth: int, layers: Collection[int]) -> Plan:
    """The plan of all blocks but these, counted from 0.

    Raises:
      UsageError: for a block that is not there.
    """
    _known(depth, layers)
    return tuple(SKIP if layer in layers else EXECUTE for layer in range(depth))


def keeping(depth: int, layers: Collection[int]) -> Plan:
    """The plan of these blocks alone, counted from 0.

    Raises:
      UsageError: for a block that is not there.
    """
    _known(depth, layers)
    return tuple(EXECUTE if layer in layers else SKIP for layer in range(depth))


def repeating(depth: int, layers: Collection[int]) -> Plan:
    """The plan in which these blocks, counted from 0, run twice.

    Raises:
      UsageError: for a block that is not there.
    """
    _known(depth, layers)
    return tuple(REPEAT if layer in layers else EXECUTE for layer in range(depth))


def early_exit(depth: int, blocks: int) -> Plan:
    """The plan that stops behind so many blocks.

    Raises:
      UsageError: for none, or more than there are.
    """
    if not 1 <= blocks <= depth:
        raise UsageError(f"an exit behind {blocks} of {depth} blocks: choose from 1 to {depth}.")
    return (EXECUTE,) * blocks + (SKIP,) * (depth - blocks)


@dataclasses.dataclass(frozen=True)
class SkipLayers:
    """Leaves blocks out.

    Attributes:
      layers: which, counted from 0.
    """

    layers: tuple[int, ...]

    def plan(self, depth: int) -> Plan:
        """The plan, of so many blocks."""
        return skipping(depth, self.layers)


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """Stops behind the first blocks.

    Attributes:
      blocks: how many run.
    """

    blocks: int

    def plan(self, depth: int) -> Plan:
        """The plan, of so many blocks."""
        return early_exit(depth, self.blocks)


PLANS: dict[str, Any] = {"early_exit": EarlyExit, "skip_layers": SkipLayers}


def order_of(plan: Sequence[int]) -> tuple[int, ...]:
    """The blocks that a plan runs, one after the other: `(0, 1, 1, 3)` of `(1, 2, 0, 1)`."""
    return tuple(layer for layer, count in enumerate(plan) for _ in range(count))


def planned(model: LM, variables: Mapping[str, Any], plan: Sequence[int]) -> tuple[LM, dict[str, Any]]:
    """Returns the network that runs a plan, and its variables.

    Args:
      model: the trained one.
      variables: of it. Where its layers stand apart (`LM.layers_apart`) no weight is copied: a repeated block
        is one array under two numbers.
      plan: how often each block runs; any number of times.

    Raises:
      UsageError: for a plan of another depth, a negative count, a plan that runs nothing, or one that moves
        blocks that are scaled by their place.
    """
    if len(plan) != model.depth or min(plan) < 0:
        raise UsageError(f"plan={tuple(plan)}: give a count of 0 or more for each of {model.depth} blocks.")
    order = order_of(plan)
    if not order:
        raise UsageError("the plan runs no block, which leaves no network: keep at least one.")
    if model.norm_scaling and order != tuple(range(len(order))):
        raise UsageError(
            "with norm_scaling a block knows its place: keep the first blocks, or fold the factors into the "
            "weights first, by effjax.compress.norm_scaling.folded."
        )
    stack = model.stack()
    cut: dict[str, Any] = {}
    for name, tree in variables.items():
        if "blocks" not in tree:
            cut[name] = tree
        elif name == "params":
            cut[name] = {**tree, "blocks": stack.layers_of(tree["blocks"], order)}
        else:
            taken = stack.layers_of if model.layer_blocks else layers_of
            cut[name] = {**tree, "blocks": taken(tree["blocks"], order)}
    kinds = model.layers and tuple(model.layers[layer % len(model.layers)] for layer in order)
    blocks = model.layer_blocks and tuple(model.layer_blocks[layer] for layer in order)
    changed: dict[str, Any] = dict(depth=len(order), layers=kinds, layer_blocks=blocks)
    return model.clone(**changed, unroll=min(model.unroll, len(order))), cut


def _known(depth: int, layers: Collection[int]) -> None:
    for layer in layers:
        if not 0 <= layer < depth:
            raise UsageError(f"layer {layer} is not there: the model has the layers 0 to {depth - 1}.")
