"""Prediction of answers in a prompt of examples, by a model that goes through many iterates.

    loss = 1 / S sum_s mean_i |prediction_s,i - target_i|^2

over the S iterates that the model predicts from: iterates that are all asked for the answer converge to it,
Yang et al. 2024 (looped transformers). Evaluation looks at the last.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class InContext:
    """Squared errors at the places of a prompt that are asked.

    A batch holds a `prompt` `[B, N, D]`, `targets` `[B, N, O]` and `weights` `[B, N]`, 1 where the target is
    asked. In evaluation `mask` `[B]` is 0 on rows that do not count.

    Attributes:
      model: maps a prompt to predictions `[S, B, N, O]` of the last `window` iterates, the last one last.
    """

    model: nn.Module

    unit = "prompts"

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        return self.model.init(key, batch["prompt"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Nothing is drawn across examples."""
        return batch

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The error of all iterates, and of the last one by itself."""
        mutable = [name for name in variables if name != "params"]
        predictions, collections = self.model.apply(
            variables, batch["prompt"], train=True, rngs={"dropout": key}, mutable=mutable
        )  # [S, B, N, O]
        errors = self._errors(predictions, batch)  # [S, B, N]
        weights = batch["weights"]
        means = {"loss": Mean.of(jnp.mean(errors, axis=0), weights), "last": Mean.of(errors[-1], weights)}
        return means, collections

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """The error of the last iterate: at all places as `loss`, and as `final` where most is known."""
        model = self.model.clone(window=1)
        predictions: Array = model.apply(variables, batch["prompt"])  # type: ignore[assignment]
        errors = self._errors(predictions, batch)[-1]  # [B, N]
        weights = batch["weights"] * batch["mask"][:, None]
        return {
            "loss": Mean.of(errors, weights),
            "final": Mean.of(errors[:, -1], weights[:, -1]),
        }

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from the averages."""
        return values

    @staticmethod
    def _errors(predictions: Array, batch: Batch) -> Array:
        """Squared errors `[S, B, N]`, a mean over the numbers of a target."""
        difference = predictions.astype(jnp.float32) - batch["targets"][None].astype(jnp.float32)
        return jnp.mean(jnp.square(difference), axis=-1)
