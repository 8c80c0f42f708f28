"""What a training step sends on a mesh, by split, broadcast and partial, before anything is compiled.

    gradient of a parameter   P along data and fsdp, and needed as the parameter lies:
                              an all-reduce where it is whole, a reduce-scatter where it is cut
    parameter cut by fsdp     S -> B for the way there, and once more for the way back
    kernel that contracts     its result is P along tensor, S -> B on both ways: two all-reduces of what
    what tensor cuts          leaves the branch, of as many layers as it is stacked for

That is what ranks meshes. It knows nothing of what a compiler adds: an embedding whose gradient is summed
twice, tables that are gathered whole, norms of what is cut.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from effjax.experiment import Experiment
from effjax.matching import named_leaves
from effjax.parallel.sharding import AxisRules, merge_rules
from effjax.plan.sbp import B, Layout, P, Split, boxing, boxing_on

# The axes that a search cuts; experts and sequences are cut where the config says so.
AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Step:
    """What the traffic of a training step depends on, but for the mesh.

    Attributes:
      parameters: shapes, and of every dimension the axes of a mesh that may cut it.
      rows: bytes of one number of every token of a batch; 0 where nobody says how many tokens there are.
      item: bytes of a number that is computed with.
    """

    parameters: tuple[tuple[tuple[int, ...], tuple[tuple[str, ...], ...]], ...]
    rows: int
    item: int

    @classmethod
    def of(cls, experiment: Experiment) -> "Step":
        """That of an experiment, whose data need not be here."""
        example = jax.tree.map(jnp.asarray, dict(experiment.data.described().example_batch(1)))
        boxed = jax.eval_shape(lambda: experiment.task.init(jax.random.key(0), example)["params"])
        item = jnp.dtype(experiment.train.precision.compute).itemsize
        rows = experiment.data.batch_size * _tokens(experiment.model, example) * item
        return cls(_parameters(boxed, merge_rules(experiment.sharding)), rows, item)

    def held(self, mesh: Mapping[str, int]) -> float:
        """Bytes on a device of weights, gradients and two moments in float32."""
        total = 0.0
        for shape, names in self.parameters:
            cut = [axis for axis in AXES if isinstance(_layout(axis, shape, names, mesh.get(axis, 1)), Split)]
            total += 16 * math.prod(shape) / math.prod(mesh.get(axis, 1) for axis in cut)
        return total

    def sent(self, mesh: Mapping[str, int]) -> float:
        """Bytes that all devices together receive in a step.

        Args:
          mesh: devices along the axes; those that are missing are not cut.
        """
        sizes = [mesh.get(axis, 1) for axis in AXES]
        total = 0.0
        for shape, names in self.parameters:
            own = [_layout(axis, shape, names, size) for axis, size in zip(AXES, sizes, strict=True)]
            count = math.prod(shape)
            total += boxing_on([P, P, own[2]], own, sizes, 4 * count)  # the gradient, in float32
            total += 2 * boxing_on(own, [own[0], B, own[2]], sizes, self.item * count)
            if _closes(names):
                layers = shape[0] if not names[0] and len(shape) > 2 else 1
                total += 2 * layers * boxing(P, B, sizes[2], self.rows * shape[-1])
        return total


def _parameters(
    boxed: Any, rules: AxisRules
) -> tuple[tuple[tuple[int, ...], tuple[tuple[str, ...], ...]], ...]:
    specs = jax.tree.leaves(
        nn.logical_to_mesh(nn.get_partition_spec(boxed), rules),
        is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec),
    )
    shapes = [leaf.shape for leaf in named_leaves(meta.unbox(boxed)).values()]
    found = []
    for shape, spec in zip(shapes, specs, strict=True):
        axes = [*spec, *[None] * (len(shape) - len(spec))]
        names = tuple((one,) if isinstance(one, str) else tuple(one or ()) for one in axes)
        found.append((shape, names))
    return tuple(found)


def _layout(axis: str, shape: tuple[int, ...], names: tuple[tuple[str, ...], ...], size: int) -> Layout:
    for dimension, axes in enumerate(names):
        if axis in axes and shape[dimension] % size == 0:
            return Split(dimension)
    return B


def _closes(names: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a kernel takes what is cut along tensor and gives what is not."""
    cut = ["tensor" in axes for axes in names]
    return any(cut[:-1]) and not cut[-1] and len(names) > 1


def _tokens(model: Any, example: Mapping[str, Any]) -> int:
    """Of an example; 0 where the model does not say into how many it cuts a picture."""
    if "tokens" in example:
        return int(example["tokens"].shape[1])
    if "image" in example and hasattr(model, "patch_grid"):
        rows, columns = model.patch_grid(example["image"].shape[1:3])
        return int(rows * columns)
    return 0
