"""Three-dimensional joints from two-dimensional ones, over a clip.

    loss = mean w_j |p - y| + a mean w_j (p_t - p_{t-1})^2 + b mean |(p_t - p_{t-1}) - (y_t - y_{t-1})|
    mpjpe = mean |p - y|, with the root in its place

in the unit of the data. Over frames and joints; the last two terms ask for smooth clips that move as they
should. a = 0.5 and b = 2 for MixSTE, Zhang et al. 2022, with weights w of the joints that are hard to see.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from effjax.errors import UsageError
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Pose:
    """Lifts the joints of a clip.

    A batch holds floats `seen` `[B, F, J, 2]` and `joints` `[B, F, J, 3]`, which are measured from the root.

    Attributes:
      model: maps what is seen to joints, with a field `joints`.
      weights: of the joints in the loss; empty weighs them alike.
      smoothness: a, of the squared steps from frame to frame.
      velocity: b, of the errors of these steps.
      root: the joint that all are measured from, known to be at zero; None means that none is.
    """

    model: nn.Module
    weights: tuple[float, ...] = ()
    smoothness: float = 0.0
    velocity: float = 0.0
    root: int | None = 0

    unit = "clips"

    def __post_init__(self) -> None:
        joints = self.model.joints
        if self.weights and len(self.weights) != joints:
            raise UsageError(f"{len(self.weights)} weights for {joints} joints: give one for each.")
        if self.root is not None and not 0 <= self.root < joints:
            raise UsageError(f"root={self.root} is none of the {joints} joints.")

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        return self.model.init(key, batch["seen"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Nothing is drawn across examples."""
        return batch

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The weighted error and its companions, and the error in the unit of the data."""
        mutable = [name for name in variables if name != "params"]
        predicted, collections = self.model.apply(
            variables, batch["seen"], train=True, rngs={"dropout": key}, mutable=mutable
        )
        return self._means(predicted.astype(jnp.float32), batch, None), collections

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """The same in evaluation."""
        predicted: Array = self.model.apply(variables, batch["seen"])  # type: ignore[assignment]
        return self._means(predicted.astype(jnp.float32), batch, batch["mask"])

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values

    def _means(
        self, predicted: Float[Array, "b f j d"], batch: Batch, mask: Float[Array, " b"] | None
    ) -> Means:
        joints = batch["joints"].astype(jnp.float32)  # [B, F, J, 3]
        weights = jnp.asarray(self.weights or (1.0,) * predicted.shape[2])[None, None]  # [1, 1, J]
        errors = predicted - joints  # [B, F, J, 3]
        loss = _over_clip(weights * _lengths(errors))  # [B]
        if self.smoothness:
            loss = loss + self.smoothness * _over_clip(weights[..., None] * _steps(predicted) ** 2)
        if self.velocity:
            loss = loss + self.velocity * _over_clip(_lengths(_steps(errors)))
        placed = predicted if self.root is None else predicted.at[:, :, self.root].set(0.0)
        mpjpe = _over_clip(_lengths(placed - joints))  # [B]
        return {"loss": Mean.of(loss, mask), "mpjpe": Mean.of(mpjpe, mask)}


def _steps(x: Float[Array, "b f j d"]) -> Float[Array, "b steps j d"]:
    return x[:, 1:] - x[:, :-1]


def _lengths(x: Float[Array, "b f j d"]) -> Float[Array, "b f j"]:
    """|x|, with the gradient 0 at 0."""
    squares = jnp.sum(x**2, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _over_clip(values: Float[Array, "b *rest"]) -> Float[Array, " b"]:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
