"""Conditional diffusion: predict what a process mixed into a picture.

loss = E_{x_0, t, eps} L(model(x_t, t, label), x_0, eps, t),   x_t and L from the process;
label -> "no label" with probability `label_dropout`, for classifier-free guidance (Ho and Salimans 2022).

What is shown may be a picture, a latent or a video, and what it is told a label or the features of a text.

A model may predict on the way, too: what it sows as `predictions` in training, pairs of a prediction and the
pixels `[B, ..., 1]` that were computed, is what the loss is the mean of, the last prediction among them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from effjax.config import part
from effjax.diffusion.caches import Stages
from effjax.diffusion.denoiser import Condition, Denoiser, memoryless
from effjax.diffusion.examples import across, mean_of_each
from effjax.diffusion.process import KINDS as PROCESSES
from effjax.diffusion.process import Process
from effjax.errors import UsageError
from effjax.train.tasks.auxiliary import LOSSES, with_auxiliary
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]

# What a model predicts on the way.
PREDICTIONS = "predictions"

# Steps of the golden ratio cover [0, 1) evenly, whatever their number.
_GOLDEN = 0.6180339887498949


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Trains `model(x_t, t, label, train)` to undo the noise of a process.

    Pictures are float `[B, H, W, C]`, in [-1, 1] or the autoencoder's latents; labels are int `[B]`. The
    process computes in float32 and the network in the dtype of its parameters. What the model sows as
    `losses` is added to the loss.

    Attributes:
      model: a denoiser with `null_class`, `learned_sigma` and `null(condition)`, the condition that says
        nothing, such as `effjax.models.dit.DiT`.
      process: what the noise is and what of it is predicted.
      label_dropout: probability that an example is shown without its label.
      content: the field of a batch that is noised, `[B, ..., C]`.
      condition: the field of a batch that the model is told: labels `[B]`, or an array `[B, ...]` of a model
        that takes one.
    """

    model: nn.Module
    process: Process = part(PROCESSES)
    label_dropout: float = 0.1
    content: str = "image"
    condition: str = "label"

    unit = "images"

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise UsageError(f"label_dropout={self.label_dropout:g} must be at least 0 and below 1.")
        if self.label_dropout and not self.model.null_class:
            raise UsageError(
                f"label_dropout={self.label_dropout:g} needs a null class: set null_class=True in the model, "
                f"or label_dropout=0."
            )
        if self.model.learned_sigma != self.process.learned_sigma:
            raise UsageError(
                f"the model has learned_sigma={self.model.learned_sigma} and its process "
                f"{self.process.learned_sigma}: set the model's to {self.process.learned_sigma}, or choose "
                f"another sigma in the process."
            )

    def null(self, condition: Shaped[Array, "b *rest"]) -> Shaped[Array, "b *rest"]:
        """What means "no label", for each example; trained only where labels are dropped."""
        empty: Array = self.model.null(condition)
        return empty

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        content = batch[self.content]
        t = jnp.zeros((content.shape[0],), jnp.float32)
        variables = self.model.init(key, content, t, batch[self.condition])
        return {name: value for name, value in variables.items() if name not in (LOSSES, PREDICTIONS)}

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws time, noise and dropped labels, independently for each example."""
        k_time, k_noise, k_label = jax.random.split(key, 3)
        content, condition = batch[self.content], batch[self.condition]
        count = content.shape[:1]
        if self.label_dropout:
            dropped = jax.random.bernoulli(k_label, self.label_dropout, count)
            condition = jnp.where(across(dropped, condition), self.null(condition), condition)
        return {
            self.content: content,
            self.condition: condition,
            "time": self.process.times(jax.random.uniform(k_time, count)),
            "noise": jax.random.normal(k_noise, content.shape),
        }

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The process's losses at the times and with the noise that `prepare` drew."""
        mutable = [LOSSES, PREDICTIONS, *(name for name in variables if name != "params")]
        content, noise, t = (
            batch[self.content].astype(jnp.float32),
            batch["noise"].astype(jnp.float32),
            batch["time"],
        )
        prediction, collections = self._predict(
            variables,
            self.process.noise(content, noise, t),
            t,
            batch[self.condition],
            train=True,
            rngs={"dropout": key},
            mutable=mutable,
        )
        losses = self.process.loss(prediction.astype(jnp.float32), content, noise, t)  # each [B]
        sown = jax.tree.leaves(collections.pop(PREDICTIONS, {}), is_leaf=_is_pair)
        if sown:
            each = [self._partial_loss(made, where, content, noise, t) for made, where in sown]
            losses["loss"] = sum(each[1:], start=each[0]) / len(each)
        return with_auxiliary({name: Mean.of(value) for name, value in losses.items()}, collections)

    def _partial_loss(
        self, prediction: Array, where: Array, content: Array, noise: Array, t: Array
    ) -> Float[Array, " b"]:
        """The loss of a prediction over the pixels that were computed."""
        target = self.process.target(content, noise, t)
        filled = jnp.where(where, prediction.astype(jnp.float32), target)  # no error elsewhere
        share = mean_of_each(where.astype(jnp.float32))  # [B]
        return self.process.loss(filled, content, noise, t)["loss"] / share

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """The same losses with labels kept, at times and noise fixed by the place in the batch."""
        content = batch[self.content].astype(jnp.float32)
        place = jnp.arange(content.shape[0])
        t = self.process.times(jnp.mod((place + 0.5) * _GOLDEN, 1.0))  # [B]
        noise = jax.random.normal(jax.random.key(0), content.shape)
        x_t = self.process.noise(content, noise, t)
        prediction = self._predict(variables, x_t, t, batch[self.condition]).astype(jnp.float32)
        losses = self.process.loss(prediction, content, noise, t)  # each [B]
        return {name: Mean.of(value, batch["mask"]) for name, value in losses.items()}

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values

    def denoiser(self, variables: Any) -> Denoiser:
        """The trained network, for samplers."""

        def predict(x_t: Array, t: Array, label: Condition) -> Array:
            return self._predict(variables, x_t, t, label).astype(jnp.float32)

        return memoryless(predict)

    def stages(self, variables: Any) -> Stages:
        """The trained network in pieces, for step caches.

        Raises:
          UsageError: for a network that does not come in pieces.
        """
        if not hasattr(self.model, "begin"):
            raise UsageError(
                f"{type(self.model).__name__} does not come in pieces, which a step cache needs: sample "
                f"without one."
            )

        def begin(x_t: Array, t: Array, condition: Condition) -> Any:
            x_t = x_t.astype(dtype_of(variables))
            return self.model.apply(variables, x_t, self.process.network_time(t), condition, method="begin")

        def layers(stream: Any, part: tuple[int, int] | None) -> Any:
            return self.model.apply(variables, stream, part, method="layers")

        def recall(stream: Any, fresh: Array, kept: Array) -> Any:
            return self.model.apply(variables, stream, fresh, kept, method="recall")

        def finish(stream: Any) -> Array:
            prediction: Any = self.model.apply(variables, stream, method="finish")
            return jnp.asarray(prediction, jnp.float32)

        return Stages(begin, layers, recall, finish, self.model.depth, self.model.branches)

    def _predict(self, variables: Any, x_t: Array, t: Array, label: Array, **options: Any) -> Any:
        """Runs the network in the dtype of its parameters."""
        x_t = x_t.astype(dtype_of(variables))
        return self.model.apply(variables, x_t, self.process.network_time(t), label, **options)


def _is_pair(node: Any) -> bool:
    """Whether a node of what was sown is a prediction and its pixels; sowing makes tuples of such pairs."""
    return isinstance(node, tuple) and len(node) == 2 and not isinstance(node[0], tuple)


def dtype_of(variables: Any) -> Any:
    """What the network computes in: the dtype of its parameters."""
    return jax.tree.leaves(variables["params"])[0].dtype
