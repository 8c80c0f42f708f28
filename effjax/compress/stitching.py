"""Networks of the first layers of one trained network and the last of another, with a linear map between.

    x = small_at( .. small_1(embed(picture)))                 [B, N, C1]
    z = x M + b                                               [B, N, C2]
    y = head(large_depth( .. large_{to + 1}(z)))

    (M, b) = argmin |X M + 1 b - Z|^2       X leaves layer `at` of the small one, Z enters the large one's

What is made is an ordinary network between the two: its layers are of two widths, and the last of the small
one's closes with the map (`Block.width`). `paths` are those of a family of two, from nearly the small network
to nearly the large one; neighbours have one map (`map_of`), which starts as the mean of theirs.

Pan, Cai and Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586, section 3; the bias of the
least squares, which layers follow which, and which share a map, are those of the published code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.subject import Batch, Subject
from effjax.compress.trajectory import asked
from effjax.errors import UsageError
from effjax.models.blocks.metaformer import Block
from effjax.models.vit import ViT

# What may differ between two networks that are stitched.
_OWN = {"dim", "depth", "block", "layer_blocks", "unroll", "remat", "drop_path", "parent", "name"}
# What stands before the layers, and is the small network's.
_FRONT = (
    "embed",
    "stem",
    "patch_norm",
    "mask_token",
    "positions",
    "class_token",
    "distillation_token",
    "registers",
    "pre_norm",
)


def paths(small: int, large: int, kernel: int = 2) -> tuple[tuple[int, int], ...]:
    """The stitches `(at, to)` of two networks of such depths, by a window that slides over both.

    Args:
      small: layers of the small network.
      large: layers of the large one, at least as many.
      kernel: neighbours that a layer may be followed by.
    """
    made = []
    for at in range(1, small + 1):
        place = round(at * large / small)
        made += [(at, to) for to in range(max(place - kernel, 0), min(place, large - 1) + 1)]
    return tuple(made)


def fitted(
    x: Float[np.ndarray, "r c1"], z: Float[np.ndarray, "r c2"], ridge: float = 0.0
) -> tuple[Float[np.ndarray, "c1 c2"], Float[np.ndarray, " c2"]]:
    """The map and bias that come nearest from some tokens to others, by least squares in float64.

    Args:
      x: tokens.
      z: what they shall become.
      ridge: what is added to the squares of the map, times the mean square of the tokens.
    """
    centre, goal = x.mean(0), z.mean(0)
    moved = x - centre
    if ridge:
        size = np.sqrt(ridge * np.mean(moved**2) * len(x))
        moved = np.concatenate([moved, size * np.eye(x.shape[1])])
        target = np.concatenate([z - goal, np.zeros((x.shape[1], z.shape[1]))])
    else:
        target = z - goal
    kernel = np.linalg.lstsq(moved, target, rcond=None)[0]
    return kernel, goal - centre @ kernel


def map_of(small: int, large: int, at: int, to: int, kernel: int = 2) -> int:
    """Which map a path goes through: of two networks of one depth, that of the first window that holds both.

    Args:
      small: layers of the small network.
      large: layers of the large one.
      at, to: the path.
      kernel: neighbours that a window holds.
    """
    return at - 1 if small != large else max(max(at - 1, to) - kernel + 1, 0)


def streams(network: Subject, batches: Sequence[Batch]) -> list[Float[np.ndarray, "rows channels"]]:
    """The tokens that enter the first layer and that leave each one, in float64.

    Args:
      network: of which.
      batches: of training data.
    """
    hear = jax.jit(lambda v, b: asked(network, v, b)(dataclasses.replace(network, variables=v))[1])
    found = [hear(network.variables, evaluated(batch)) for batch in batches]
    return [
        np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in parts])
        for parts in zip(*found, strict=True)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two networks, taken apart once for all paths between them.

    Attributes:
      small: whose embedding and first layers are taken.
      large: whose last layers and head are taken.
      front, back: the layers of each.
    """

    small: Subject
    large: Subject
    front: tuple[Layer, ...]
    back: tuple[Layer, ...]

    @classmethod
    def of(cls, small: Subject, large: Subject) -> "Pair":
        """Takes two networks apart.

        Raises:
          UsageError: for networks that cannot be stitched.
        """
        _check(small, large)
        return cls(small, large, take_apart(small), take_apart(large))

    def path(self, at: int, to: int, stitch: Mapping[str, Any] | None = None) -> Subject:
        """The network of the first layers of one and the last of the other.

        Args:
          at: how many layers of the small one come first.
          to: how many of the first layers of the large one are left out.
          stitch: the kernel and bias of the map between them; zero where None.

        Raises:
          UsageError: for layers that they do not have.
        """
        small, large = self.small.model, self.large.model
        if not 1 <= at <= small.depth or not 0 <= to < large.depth:
            raise UsageError(
                f"at={at} is from 1 to the {small.depth} layers of the small network, and to={to} from 0 and "
                f"below the {large.depth} of the large one."
            )
        *front, last = self.front[:at]
        if stitch is None:
            stitch = {"kernel": jnp.zeros((small.dim, large.dim)), "bias": jnp.zeros(large.dim)}
        params = {**last.params, "stitch": dict(stitch)}
        block = last.block.clone(width=large.dim, parent=None, name=None)
        closed = dataclasses.replace(last, block=block, variables={**last.variables, "params": params})
        joined = (*front, closed, *self.back[to:])
        layers = [dataclasses.replace(layer, number=i) for i, layer in enumerate(joined)]
        held = {
            **{name: leaf for name, leaf in self.large.params.items() if name not in _FRONT},
            **{name: leaf for name, leaf in self.small.params.items() if name in _FRONT},
        }
        model = large.clone(dim=small.dim, depth=len(layers), block=layers[0].block, layer_blocks=())
        return put_together(self.large.with_model(model, {"params": held}), layers)


def as_stitch(
    kernel: Float[np.ndarray, "c1 c2"], bias: Float[np.ndarray, " c2"]
) -> dict[str, Float[Array, "..."]]:
    """The parameters of a map."""
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def _check(small: Subject, large: Subject) -> None:
    for network in (small, large):
        if not isinstance(network.model, ViT) or not isinstance(network.model.block, Block):
            raise UsageError(f"{type(network.model).__name__} cannot be stitched: two ViTs can.")
        if set(network.variables) != {"params"}:
            raise UsageError("networks that keep averages cannot be stitched.")
    fields = (field.name for field in dataclasses.fields(large.model) if field.name not in _OWN)
    unlike = [name for name in fields if getattr(small.model, name) != getattr(large.model, name)]
    unlike += [
        f"block.{name}"
        for name in ("norm", "epsilon")
        if getattr(small.model.block, name) != getattr(large.model.block, name)
    ]
    if unlike:
        raise UsageError(f"the two networks cannot be stitched: they differ in {', '.join(unlike)}.")
