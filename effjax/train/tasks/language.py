"""Next-token prediction on packed documents.

    loss = sum_i w_i (-log p(target_i) + z_loss log^2 Z_i) / sum_i w_i,      Z_i = sum_v exp(logit_iv)

in nats a token, and what the model sows as `losses`. The second term keeps the normaliser Z near 1:
Chowdhery et al. 2022, section 5, with z_loss = 1e-4. Where `sharpness` is set, evaluation also says how much
the loss rises in a box around the logits, see `effjax.measure.sharpness`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.errors import UsageError
from effjax.measure.sharpness import relative_rise, worst_logits
from effjax.train.tasks.auxiliary import LOSSES, with_auxiliary
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


def cross_entropy(
    logits: Float[Array, "b n vocab"], targets: Int[Array, "b n"]
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """Returns `-log p(target)` and `log Z` at each place, in float32.

    The target's logit is a masked sum and not a gather: it fuses with the sum of exponentials, needs no
    second array of the logits' size, and stays local where the vocabulary is sharded.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]  # [B, N, V]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)  # [B, N]
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, N]
    return log_z - picked, log_z


@dataclasses.dataclass(frozen=True)
class Language:
    """Predicts each next token.

    A batch holds integers `tokens`, `targets`, `segments` and `positions`, each `[B, N]`, and `weights`
    `[B, N]`: 0 where the target is padding or lies in another document. In evaluation `mask` `[B]` is 0 on
    rows that do not count.

    Attributes:
      model: maps tokens, positions and segments to logits `[B, N, V]`.
      z_loss: factor of the squared log normaliser in training; 0 leaves it out.
      sharpness: half the side of the box around logits in evaluation, such as 5e-4; 0 leaves it out.
    """

    model: nn.Module
    z_loss: float = 0.0
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise UsageError(f"sharpness={self.sharpness} is the side of a box: it must be at least 0.")

    unit = "tokens"

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        return self.model.init(key, batch["tokens"], batch["positions"], batch["segments"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Nothing is drawn across examples."""
        return batch

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """Cross-entropy with the other losses, whose shares also stand by themselves, and accuracy.

        Where there are others, the cross-entropy alone is `cross_entropy`.
        """
        mutable = [LOSSES, *(name for name in variables if name != "params")]
        logits, collections = self.model.apply(
            variables,
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            train=True,
            rngs={"dropout": key},
            mutable=mutable,
        )
        means, log_z = self._means(logits, batch, batch["weights"])
        plain = means["loss"]
        if self.z_loss:
            penalty = Mean.of(self.z_loss * log_z**2, batch["weights"])
            total = dataclasses.replace(means["loss"], total=means["loss"].total + penalty.total)
            means = {**means, "loss": total, "z_loss": penalty}
        means, collections = with_auxiliary(means, collections)
        return (means if means["loss"] is plain else {**means, "cross_entropy": plain}), collections

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """Cross-entropy and accuracy, and where asked the largest cross-entropy near these logits."""
        logits: Array = self.model.apply(  # type: ignore[assignment]
            variables, batch["tokens"], batch["positions"], batch["segments"]
        )
        weights = batch["weights"] * batch["mask"][:, None]
        means, _ = self._means(logits, batch, weights)
        if self.sharpness:
            worst, _ = cross_entropy(worst_logits(logits, batch["targets"], self.sharpness), batch["targets"])
            means = {**means, "worst_loss": Mean.of(worst, weights)}
        return means

    def answers(self, variables: Any, batch: Batch) -> Array:
        """The likeliest next token everywhere, `[B, N]`."""
        logits: Array = self.model.apply(  # type: ignore[assignment]
            variables, batch["tokens"], batch["positions"], batch["segments"]
        )
        return jnp.argmax(logits, -1)

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Adds the perplexity and the bits a token, and the sharpness where it was measured."""
        nats = values.get("cross_entropy", values["loss"])
        if "worst_loss" in values:
            values = {**values, "sharpness": float(relative_rise(values["worst_loss"], values["loss"]))}
        # Past e^700 a double overflows and the figure says nothing anyway.
        return {**values, "perplexity": math.exp(min(nats, 700.0)), "bits_per_token": nats / math.log(2.0)}

    @staticmethod
    def _means(
        logits: Float[Array, "b n vocab"], batch: Batch, weights: Float[Array, "b n"]
    ) -> tuple[Means, Float[Array, "b n"]]:
        losses, log_z = cross_entropy(logits, batch["targets"])
        right = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)  # [B, N]
        return {"loss": Mean.of(losses, weights), "accuracy": Mean.of(right, weights)}, log_z
