"""The blocks of a stack, each by itself: what enters the first in a trained network, and any of them alone.

Methods that teach a block to give what it gave before it was compressed need its inputs and everything else
that it is handed (positions, conditions, what is each layer's own). `found_in` runs a network in evaluation
and takes these down where a `Stack` begins; a model knows nothing of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.subject import Batch, Subject, leaf_at
from effjax.errors import UsageError
from effjax.layers.stack import Stack, layer_of

# What a stack may be told that makes its layers differ in more than their parameters.
_OTHERWISE = ("points", "before", "through", "part", "turns")


@flax.struct.dataclass
class Entered:
    """What a stack is given, for every batch in front.

    Attributes:
      x: what enters the first block.
      each: what every layer has for itself, depth behind the batches.
      shared: what all layers are given.
    """

    x: Any
    each: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack as it stands in a network.

    Attributes:
      path: of its parameters.
      stack: its definition.
      method: of the block.
    """

    path: str
    stack: Stack
    method: str

    def layer(self, variables: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The variables of one block."""
        own = {name: tree for name, tree in variables.items() if _has(tree, self.path)}
        return {name: layer_of(leaf_at(tree, self.path), number) for name, tree in own.items()}

    def run(self, variables: Mapping[str, Any], x: Any, each: Any, shared: Any) -> Any:
        """What one block makes of what enters it, in evaluation."""
        block = self.stack.block.clone(parent=None, name=None)
        y, _ = block.apply(variables, x, each, *shared, method=self.method, train=False)
        return y


def found_in(subject: Subject, batches: Sequence[Batch]) -> list[tuple[Blocks, Entered]]:
    """The stacks of a network in the order in which they run, and what enters them.

    Args:
      subject: the network.
      batches: as it was trained on.

    Raises:
      UsageError: where it has no stack, or one whose blocks cannot be run by themselves.
    """
    told: dict[str, Blocks] = {}

    @jax.jit
    def entered(variables: Any, batch: Batch) -> dict[str, Entered]:
        made: dict[str, Entered] = {}
        inside = False

        def take(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal inside
            module = context.module
            # A stack inside a stack belongs to the block that it is part of.
            if inside or not isinstance(module, Stack) or context.method_name != "__call__":
                return call(*args, **kwargs)
            path = "/".join(module.path)
            told[path] = _described(module, path, kwargs)
            made[path] = Entered(args[0], kwargs.get("each"), tuple(args[1:]))
            inside = True
            result = call(*args, **kwargs)
            inside = False
            return result

        with nn.intercept_methods(take):
            subject.task.metrics(variables, batch)
        return made

    made = [entered(subject.variables, evaluated(batch)) for batch in batches]
    if not told:
        raise UsageError(f"{type(subject.model).__name__} has no stack of blocks to teach one by one.")
    return [(told[path], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one[path] for one in made)))
            for path in told]  # fmt: skip


def evaluated(batch: Batch) -> dict[str, Array]:
    """A batch of training data as the task's metrics take it: every row counts."""
    rows = len(jax.tree.leaves(batch)[0])
    return {"mask": jnp.ones(rows), **{name: jnp.asarray(value) for name, value in batch.items()}}


def difference(a: Any, b: Any) -> Float[Array, ""]:
    """Mean squared difference of two streams, in float32."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(
        (jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))) for x, y in pairs),
        start=jnp.zeros(()),
    )


def _described(stack: Stack, path: str, kwargs: Mapping[str, Any]) -> Blocks:
    otherwise = [name for name in _OTHERWISE if kwargs.get(name)]
    if otherwise or stack.shared:
        raise UsageError(
            f"the blocks of {path!r} are run with {', '.join(otherwise) or 'shared parameters'}, and cannot "
            f"be taught one by one: round them with a step that looks at the weights alone."
        )
    return Blocks(path, stack.clone(parent=None, name=None), kwargs.get("method", "__call__"))


def _has(tree: Any, path: str) -> bool:
    for name in path.split("/"):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True
