"""Image classification with soft targets.

loss = - sum_c t_c log softmax(logits)_c,     t smoothed and, in training, mixed

What the model sows as `losses` is added in training.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax.train.tasks.auxiliary import LOSSES, with_auxiliary
from effjax.train.tasks.mean import Mean, Means
from effjax.train.tasks.mixing import Mixing, mix, one_hot

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Assigns one of the model's classes to each picture.

    Attributes:
      model: maps images `[B, H, W, C]` to logits `[B, classes]`.
      smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
      mixing: mixup and CutMix; None leaves pictures alone.
    """

    model: nn.Module
    smoothing: float = 0.0
    mixing: Mixing | None = None

    unit = "images"

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        return self.model.init(key, batch["image"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Makes soft targets and mixes the pictures."""
        images = batch["image"]
        targets = one_hot(batch["label"], self.model.classes, self.smoothing)  # [B, classes]
        if self.mixing is not None:
            images, targets = mix(images, targets, key, self.mixing)
        return {"image": images, "target": targets}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """Cross-entropy with the soft targets, and agreement with their largest entry."""
        mutable = [LOSSES, *(name for name in variables if name != "params")]
        logits, collections = self.model.apply(
            variables, batch["image"], train=True, rngs={"dropout": key}, mutable=mutable
        )
        logits = logits.astype(jnp.float32)  # [B, classes]
        right = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)  # [B]
        loss = -jnp.sum(batch["target"] * jax.nn.log_softmax(logits), axis=-1)  # [B]
        return with_auxiliary({"loss": Mean.of(loss), "accuracy": Mean.of(right)}, collections)

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """Cross-entropy with the labels and top-1 accuracy."""
        logits: Array = self.model.apply(variables, batch["image"])  # type: ignore[assignment]
        logits = logits.astype(jnp.float32)  # [B, classes]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=-1)[:, 0]
        right = jnp.argmax(logits, -1) == batch["label"]  # [B]
        return {
            "loss": Mean.of(-picked, batch["mask"]),
            "accuracy": Mean.of(right, batch["mask"]),
        }

    def answers(self, variables: Any, batch: Batch) -> Array:
        """The class of each example, `[B]`."""
        return jnp.argmax(self.model.apply(variables, batch["image"]), -1)  # type: ignore[arg-type]

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values
