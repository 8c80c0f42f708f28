"""Stitches two trained networks of one family together: the first layers of a small one, the last of a large.

    x = small_at( .. small_1(embed(picture)))                 [B, N, C1]
    z = x M + b                                               [B, N, C2]
    y = head(large_depth( .. large_{to + 1}(z)))

    (M, b) = argmin |X M + 1 b - Z|^2       X leaves layer `at` of the small one, Z enters the large one's

What is made is an ordinary network between the two: its layers are of two widths, and the last of the small
one's closes with the linear map (`Block.width`). It starts by least squares on calibration batches, and is
trained on by `recover`, taught by the large network, or by its own config. `paths` are those of the paper's
family, from nearly the small network to nearly the large one.

Pan, Cai and Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586, section 3; the bias of the
least squares, and which layers follow which, are those of the published code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from effjax.compress.blocks import evaluated
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.subject import Calibration, Subject
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


@dataclasses.dataclass(frozen=True)
class Stitch:
    """Takes the first layers from a smaller network.

    Attributes:
      small: folder of its run.
      at: how many of its layers come first.
      to: how many of the first layers of the network itself are left out.
      batches: of training data that the map is fitted on.
      ridge: what is added to the squares, times their mean, so that few tokens fit it too.
    """

    small: str
    at: int
    to: int
    batches: int = 4
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.at < 1 or self.to < 0 or self.batches < 1:
            raise UsageError(
                f"at={self.at} and batches={self.batches} are at least 1, to={self.to} at least 0."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Stitches.

        Raises:
          UsageError: for networks that cannot be stitched, or layers that they do not have.
        """
        if calibration.open is None:
            raise UsageError("there is no folder to open here: stitch through experiments.compress.")
        small = calibration.open(self.small)
        made = stitched(small, subject, self.at, self.to)
        x, z = self._streams(small, subject, calibration)
        kernel, bias = fitted(x, z, self.ridge)
        left = np.sum((x @ kernel + bias - z) ** 2) / np.sum((z - z.mean(0)) ** 2)
        depth = subject.model.depth
        calibration.report(
            f"{self.at} of {small.model.depth} layers, then {depth - self.to} of {depth}: "
            f"{macs(made) / macs(subject):.4f} of the MACs; the map leaves {left:.4g} of the variance."
        )
        return with_map(made, self.at, kernel, bias)

    def _streams(
        self, small: Subject, large: Subject, calibration: Calibration
    ) -> tuple[Float[np.ndarray, "r c1"], Float[np.ndarray, "r c2"]]:
        """Tokens that leave the small network's layers, and those that enter the large one's, in float64."""
        found: list[list[np.ndarray]] = []
        for batch in calibration.first(self.batches):
            rows = []
            for network, at in ((small, self.at), (large, self.to)):
                hear = jax.jit(
                    lambda v, b, net=network: asked(net, v, b)(dataclasses.replace(net, variables=v))[1]
                )
                x = np.asarray(hear(network.variables, evaluated(batch))[at], np.float64)
                rows.append(x.reshape(-1, x.shape[-1]))
            found.append(rows)
        x, z = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return x, z


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


def stitched(small: Subject, large: Subject, at: int, to: int) -> Subject:
    """The network of the first layers of one and the last of another, whose map is zero.

    Args:
      small: whose embedding and first `at` layers are taken.
      large: whose layers from `to` on, and head, are taken.
      at: layers.
      to: layers.

    Raises:
      UsageError: for networks that cannot be stitched, or layers that they do not have.
    """
    _check(small, large, at, to)
    front, back = take_apart(small)[:at], take_apart(large)[to:]
    last, width = front[-1], large.model.dim
    block = last.block.clone(width=width, parent=None, name=None)
    params = {
        **last.params,
        "stitch": {"kernel": jnp.zeros((small.model.dim, width)), "bias": jnp.zeros(width)},
    }
    closed = dataclasses.replace(last, block=block, variables={**last.variables, "params": params})
    layers = [dataclasses.replace(layer, number=i) for i, layer in enumerate((*front[:-1], closed, *back))]
    held = {
        **{name: leaf for name, leaf in large.params.items() if name not in _FRONT},
        **{name: leaf for name, leaf in small.params.items() if name in _FRONT},
    }
    model = large.model.clone(dim=small.model.dim, depth=len(layers), block=layers[0].block, layer_blocks=())
    around = large.with_model(model, {"params": held})
    return put_together(around, layers)


def with_map(
    network: Subject, at: int, kernel: Float[np.ndarray, "c1 c2"], bias: Float[np.ndarray, " c2"]
) -> Subject:
    """A stitched network with this map behind layer `at`."""
    layers: list[Layer] = list(take_apart(network))
    layer = layers[at - 1]
    stitch = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    params = {**layer.params, "stitch": stitch}
    layers[at - 1] = dataclasses.replace(layer, variables={**layer.variables, "params": params})
    return put_together(network, layers)


def _check(small: Subject, large: Subject, at: int, to: int) -> None:
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
    if at > small.model.depth or to >= large.model.depth:
        raise UsageError(
            f"at={at} is at most the {small.model.depth} layers of the small network, and to={to} below the "
            f"{large.model.depth} of the large one."
        )
