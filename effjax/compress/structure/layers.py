"""A network taken apart into its layers, and put together again from others.

Every layer is a definition with its variables, whether its network scans over equal layers or has a
definition for each. Put together, layers whose definitions are equal are scanned over again; otherwise the
network lists them, and is an ordinary smaller network either way.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from effjax.compress.subject import Subject
from effjax.errors import UsageError
from effjax.layers.stack import Stack, layer_name
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.metaformer import Block
from effjax.models.blocks.several import copied
from effjax.models.dit import DiT
from effjax.models.lm import LM, DecoderBlock
from effjax.models.pyramid import Pyramid, Stage
from effjax.models.vit import ViT


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a network.

    Attributes:
      stack: which stack of layers it is of: the stage of a pyramid, else 0.
      number: of the layer in its stack, as the network was when it was taken apart.
      block: its definition.
      variables: its variables by collection, unboxed.
      axes: names of the axes of each parameter, by path in the block.
      turned: whether the network turns its heads by rotary positions, whatever its mixer says.
    """

    stack: int
    number: int
    block: nn.Module
    variables: Mapping[str, Any]
    axes: Mapping[str, tuple[str | None, ...]]
    turned: bool = False

    @property
    def params(self) -> Any:
        """Its parameters."""
        return self.variables.get("params", {})

    @property
    def where(self) -> str:
        """How it is called in messages."""
        return f"layer {self.number}" if not self.stack else f"layer {self.number} of stage {self.stack}"


def take_apart(subject: Subject) -> tuple[Layer, ...]:
    """The layers of a network, in order.

    Raises:
      UsageError: for a network whose layers do not stand for themselves.
    """
    model = subject.model
    if isinstance(model, Pyramid):
        found = []
        for stage in range(len(model.stages)):
            found += _stage(subject, stage, model.stages[stage])
        return tuple(found)
    _check_isotropic(model)
    stack = Stack(model.block, model.depth, blocks=model.layer_blocks)
    of_stack = {name: tree["blocks"] for name, tree in subject.variables.items() if "blocks" in tree}
    names = _names(subject.boxed()["blocks"])
    kinds = model.layers if isinstance(model, LM) else ()
    turned = any(kind.rotary_base is not None for kind in kinds)
    made = []
    for number in range(model.depth):
        if model.layer_blocks:
            start = f"{layer_name(number)}/"
            own = {path.removeprefix(start): axes for path, axes in names.items() if path.startswith(start)}
        else:
            own = {path: axes[1:] for path, axes in names.items()}
        variables = stack.layer_variables(of_stack, number)
        made.append(Layer(0, number, stack.layer_block(number), variables, own, turned))
    return tuple(made)


def put_together(subject: Subject, layers: Sequence[Layer]) -> Subject:
    """The network with other layers, and all that stands around them as it was.

    Args:
      subject: what was taken apart.
      layers: changed, and of each stack as many as shall be left, in order.

    Raises:
      UsageError: where a stack has no layer left, or layers are left out that know their place.
    """
    model = subject.model
    if isinstance(model, Pyramid):
        return _pyramid(subject, layers)
    kept = [layer.number for layer in layers]
    if not kept:
        raise UsageError("no layer is left: keep at least one.")
    changed: dict[str, Any] = dict(depth=len(kept))
    if kept != list(range(model.depth)):
        changed |= _moved(model, kept)
    blocks = tuple(layer.block for layer in layers)
    # Layers of one definition may still be stored in other ways.
    forms: list[Any] = [jax.tree.structure(dict(layer.variables)) for layer in layers]
    alike = all(block == blocks[0] for block in blocks) and all(form == forms[0] for form in forms)
    changed |= dict(block=blocks[0], layer_blocks=()) if alike else dict(layer_blocks=blocks)
    changed["unroll"] = min(model.unroll, len(kept))
    variables = dict(subject.variables)
    had = {name for name, tree in variables.items() if "blocks" in tree}
    for name in had | {name for layer in layers for name in layer.variables}:
        own = {layer_name(i): each.variables[name] for i, each in enumerate(layers) if name in each.variables}
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own.values()) if alike and own else own
        variables[name] = {**variables.get(name, {}), "blocks": stacked}
    return subject.with_model(model.clone(**changed), variables)


def _check_isotropic(model: nn.Module) -> None:
    if not isinstance(model, ViT | DiT | LM) or not isinstance(model.block, Block | DiTBlock | DecoderBlock):
        held = f" of {type(model.block).__name__}" if hasattr(model, "block") else ""
        raise UsageError(
            f"{type(model).__name__}{held} has layers that cannot be taken apart; ViT, DiT, LM and pyramids "
            f"whose blocks are one layer have others."
        )
    if getattr(model, "shared", ()):
        raise UsageError("layers that share parameters cannot be taken apart: prune before sharing.")


def _moved(model: Any, kept: Sequence[int]) -> dict[str, Any]:
    """What changes in a definition whose layers are these, of those it had."""
    if getattr(model, "norm_scaling", False) or getattr(model, "condition", "shared") == "per_block":
        raise UsageError("layers that know their place (norm_scaling, condition='per_block') have to stay.")
    if getattr(model, "layers", ()) and isinstance(model, LM):
        return dict(layers=tuple(model.layers[number % len(model.layers)] for number in kept))
    return {}


def _names(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """Names of the axes of every parameter by path."""
    flat = flatten_dict(boxed, sep="/")
    return {path: tuple(box.names) if hasattr(box, "names") else () for path, box in flat.items()}


def _stage(subject: Subject, number: int, stage: Stage) -> list[Layer]:
    """The layers of a stage: the members of its cycles, and what is left behind them."""
    if stage.first is not None or not all(isinstance(block, Block) for block in stage.blocks):
        raise UsageError(f"stage {number} has blocks of several layers, which cannot be taken apart.")
    key = f"stages_{number}"
    trees = {name: tree[key] for name, tree in subject.variables.items() if key in tree}
    names = _names(subject.boxed()[key])
    count = len(stage.blocks)
    whole = stage.depth // count * count
    layers = []
    for layer in range(stage.depth):
        member = layer % count
        path = f"rest_{member}" if layer >= whole else "stack" if count == 1 else f"stack/members_{member}"
        row = layer // count if layer < whole else 0
        variables = {
            name: jax.tree.map(lambda leaf, row=row: leaf[row], found)
            for name, tree in trees.items()
            if (found := _at(tree, path)) is not None
        }
        own = {p.removeprefix(f"{path}/"): axes[1:] for p, axes in names.items() if p.startswith(f"{path}/")}
        block = stage.blocks[member].clone(parent=None, name=None)
        layers.append(Layer(number, layer, block, variables, own))
    return layers


def _pyramid(subject: Subject, layers: Sequence[Layer]) -> Subject:
    """A stage with a definition for each layer is one cycle of them."""
    model = subject.model
    variables = {name: dict(tree) for name, tree in subject.variables.items()}
    stages = list(model.stages)
    for number, stage in enumerate(model.stages):
        own = [layer for layer in layers if layer.stack == number]
        if not own and stage.depth:
            raise UsageError(f"stage {number} has no layer left: keep at least one.")
        blocks = _period([layer.block for layer in own], stage.blocks)
        # Members of a cycle that share an instance of a part would share its parameters.
        cycle = tuple(copied(block) for block in blocks)
        stages[number] = stage.clone(depth=len(own), blocks=cycle, parent=None, name=None)
        count = len(blocks)
        for name, tree in variables.items():
            held = tree.get(f"stages_{number}", {})
            kept = {k: value for k, value in held.items() if k != "stack" and not k.startswith("rest_")}
            made = _cycles([layer.variables.get(name) for layer in own], count)
            if kept or made:
                tree[f"stages_{number}"] = {**kept, **made}
    return subject.with_model(model.clone(stages=tuple(stages)), variables)


def _period(blocks: Sequence[nn.Module], cycle: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The cycle that there was, where definitions still follow it; else the first so many, or all of them."""
    for found in (cycle, blocks[: len(cycle)]):
        if all(block == found[i % len(found)] for i, block in enumerate(blocks)):
            return found
    return blocks


def _cycles(trees: Sequence[Any], count: int) -> dict[str, Any]:
    """The variables of a stage from those of its layers, of which so many are a cycle."""
    if all(tree is None for tree in trees):
        return {}
    whole = len(trees) // count * count
    stack = lambda own: jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)  # noqa: E731
    made: dict[str, Any] = {}
    if whole:
        members = {f"members_{i}": stack(trees[i:whole:count]) for i in range(count)}
        made["stack"] = members["members_0"] if count == 1 else members
    return made | {f"rest_{i}": stack([tree]) for i, tree in enumerate(trees[whole:])}


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        if name not in tree:
            return None
        tree = tree[name]
    return tree
