"""Conditional diffusion: predict what a process mixed into a picture.

loss = E_{x_0, t, eps} L(model(x_t, t, label), x_0, eps, t),   x_t and L from the process;
label -> "no label" with probability `label_dropout`, for classifier-free guidance (Ho and Salimans 2022).

What is shown may be a picture, a latent or a video, and what it is told a label or the features of a text.
Of a video parts may be given, by masks: the model sees them clean, and the loss is on the others (Lu et al.
2024, VDT).

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
from effjax.diffusion.examples import across, example_keys, mean_of_each
from effjax.diffusion.known import Known
from effjax.diffusion.latents import Latents
from effjax.diffusion.masks import KINDS as MASKS
from effjax.diffusion.masks import check_weights, draw_known
from effjax.diffusion.process import KINDS as PROCESSES
from effjax.diffusion.process import Process
from effjax.errors import UsageError
from effjax.layers.stored import dtype_of
from effjax.train.tasks.auxiliary import LOSSES, with_auxiliary
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]

# The collection that holds the weights of an autoencoder, and that of what a model predicts on the way.
AUTOENCODER, PREDICTIONS = "autoencoder", "predictions"

# Steps of the golden ratio cover [0, 1) evenly, whatever their number.
_GOLDEN = 0.6180339887498949
# Root mean squares of pictures in [-1, 1] and of latents of unit spread lie well within; of bytes, and of the
# latents of an autoencoder whose scale was forgotten, beyond.
_SIZES = 0.2, 4.0


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
        that takes one. None tells it nothing: all examples are of class 0.
      coupling: the field of a batch that holds the noise which belongs to each example, as pairs of
        `effjax.diffusion.coupling` do; None draws noise of its own.
      latents: the autoencoder whose latents are noised; None noises the examples as they are.
      masks: what of a video is given in training, kinds in `effjax.diffusion.masks`, one of which is drawn
        for each example by its weight; without any, nothing is given.
    """

    model: nn.Module
    process: Process = part(PROCESSES)
    label_dropout: float = 0.1
    content: str = "image"
    condition: str | None = "label"
    coupling: str | None = None
    latents: Latents | None = None
    masks: tuple[Any, ...] = part(MASKS, default=())

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
        if self.label_dropout and self.condition is None:
            raise UsageError(f"label_dropout={self.label_dropout:g} and no condition to drop: set it to 0.")
        check_weights(self.masks)
        if self.masks and self.latents is not None and not self.latents.encoded:
            raise UsageError(
                "masks say which parts of what is noised are given, and latents are made of pictures here: "
                "encode the data first and set latents.encoded=True."
            )

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {} if self.latents is None else {AUTOENCODER: self.latents.weights}

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is noised, of an example of `shape` in the data."""
        return tuple(shape) if self.latents is None else self.latents.shape(tuple(shape))

    def pictures(self, variables: Any, drawn: Float[Array, "b *shape"]) -> Float[Array, "b *shape2"]:
        """What can be looked at, of what was drawn."""
        return drawn if self.latents is None else self.latents.decode(variables[AUTOENCODER], drawn)

    def shown(self, variables: Any, content: Float[Array, "b *shape"]) -> Float[Array, "b *shape2"]:
        """What can be looked at, of examples of the data."""
        encoded = self.latents is not None and self.latents.encoded
        return self.pictures(variables, content) if encoded else content

    def null(self, condition: Shaped[Array, "b *rest"]) -> Shaped[Array, "b *rest"]:
        """What means "no label", for each example; trained only where labels are dropped."""
        empty: Array = self.model.null(condition)
        return empty

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        content = batch[self.content]
        t = jnp.zeros((content.shape[0],), jnp.float32)
        noised = jnp.zeros((content.shape[0], *self.shape(content.shape[1:])), jnp.float32)
        variables = self.model.init(key, noised, t, self.told(batch))
        made = {name: value for name, value in variables.items() if name not in (LOSSES, PREDICTIONS)}
        if self.latents is None:
            return made
        model = self.latents.model  # whose parameters are the same for pictures of any size
        held = model.init(key, jnp.zeros((1, model.factor, model.factor, model.channels)))
        return {**made, AUTOENCODER: dict(held)}

    def check(self, variables: Any, batch: Batch) -> None:
        """Refuses data that are far larger or smaller than the noise that is mixed into them.

        Raises:
          UsageError: where the root mean square of what is noised is not near 1.
        """
        size = float(jnp.sqrt(jnp.mean(jax.jit(self._noised)(variables, batch) ** 2)))
        if not _SIZES[0] <= size <= _SIZES[1]:
            if self.latents is not None and not self.latents.encoded:
                scale = self.latents.model.scale / size
                remedy = f"set config.task.latents.model.scale to about {scale:.3g}"
            else:
                remedy = f"take pictures in [-1, 1] (the transform to_float), or latents times {1 / size:.3g}"
            raise UsageError(
                f"what is noised, {self.content!r}, has a root mean square of {size:.3g}, the noise of 1: "
                f"{remedy}."
            )

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws time, noise, dropped labels and masks, independently for each example."""
        k_time, k_noise, k_label = jax.random.split(key, 3)
        content = batch[self.content]
        count = content.shape[:1]
        shape = *count, *self.shape(content.shape[1:])
        drawn = {
            self.content: content,
            "time": self.process.times(jax.random.uniform(k_time, count)),
            "noise": jax.random.normal(k_noise, shape) if self.coupling is None else batch[self.coupling],
        }
        if self.latents is not None:
            drawn["code"] = jax.random.normal(jax.random.fold_in(key, 4), shape)
        if self.condition is not None:
            condition = batch[self.condition]
            if self.label_dropout:
                dropped = jax.random.bernoulli(k_label, self.label_dropout, count)
                condition = jnp.where(across(dropped, condition), self.null(condition), condition)
            drawn[self.condition] = condition
        if self.masks:
            drawn["known"] = self._known(content, jax.random.fold_in(key, 3))
        return drawn

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The process's losses at the times and with the noise that `prepare` drew."""
        held = "params", AUTOENCODER
        mutable = [LOSSES, PREDICTIONS, *(name for name in variables if name not in held)]
        content, noise, t = self._noised(variables, batch), batch["noise"].astype(jnp.float32), batch["time"]
        known = batch.get("known")
        prediction, collections = self._predict(
            variables,
            _with_known(self.process.noise(content, noise, t), content, known),
            t,
            self.told(batch),
            train=True,
            rngs={"dropout": key},
            mutable=mutable,
        )
        means = self._means(prediction, content, noise, t, known)
        sown = jax.tree.leaves(collections.pop(PREDICTIONS, {}), is_leaf=_is_pair)
        if sown:
            each = [
                self.process.loss(made.astype(jnp.float32), content, noise, t, where)["loss"]  # [B]
                for made, where in sown
            ]
            means = {**means, "loss": Mean.of(sum(each[1:], start=each[0]) / len(each))}
        means, rest = with_auxiliary(means, collections)
        return means, rest | {name: variables[name] for name in self.frozen}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """The same losses with labels kept, at times, noise and masks fixed by the place in the batch."""
        content = self._noised(variables, batch)
        place = jnp.arange(content.shape[0])
        t = self.process.times(jnp.mod((place + 0.5) * _GOLDEN, 1.0))  # [B]
        noise = jax.random.normal(jax.random.key(0), content.shape)
        if self.coupling is not None:
            noise = batch[self.coupling].astype(jnp.float32)
        known = self._known(content, jax.random.key(1)) if self.masks else None
        x_t = _with_known(self.process.noise(content, noise, t), content, known)
        prediction = self._predict(variables, x_t, t, self.told(batch))
        return self._means(prediction, content, noise, t, known, batch["mask"])

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
            x_t = x_t.astype(dtype_of(variables["params"]))
            return self.model.apply(variables, x_t, self.process.network_time(t), condition, method="begin")

        def layers(stream: Any, part: tuple[int, int] | None) -> Any:
            return self.model.apply(variables, stream, part, method="layers")

        def recall(stream: Any, fresh: Array, kept: Array) -> Any:
            return self.model.apply(variables, stream, fresh, kept, method="recall")

        def finish(stream: Any) -> Array:
            prediction: Any = self.model.apply(variables, stream, method="finish")
            return jnp.asarray(prediction, jnp.float32)

        return Stages(begin, layers, recall, finish, self.model.depth, self.model.branches)

    def _noised(self, variables: Any, batch: Batch) -> Array:
        """What is noised: the content of a batch, or its latents."""
        content = batch[self.content].astype(jnp.float32)
        if self.latents is None:
            return content
        latents = self.latents.encode(variables[AUTOENCODER], content, batch.get("code"))
        return jax.lax.stop_gradient(latents)

    def told(self, batch: Mapping[str, Any]) -> Any:
        """What the model is told of each example, of a batch on the host or on devices."""
        if self.condition is None:
            return jnp.zeros(batch[self.content].shape[:1], jnp.int32)
        return batch[self.condition]

    def _known(self, content: Array, key: PRNGKeyArray) -> Array:
        """Which parts of each example are given, `[B, F, H, W, 1]`."""
        keys = example_keys(key, jnp.arange(content.shape[0]))
        return draw_known(self.masks, keys, content.shape[1:])

    def _means(
        self,
        prediction: Array,
        content: Array,
        noise: Array,
        t: Array,
        known: Array | None,
        mask: Array | None = None,
    ) -> Means:
        """Averages of the process's losses over the rows of a mask, or over what is noised of these."""
        prediction = prediction.astype(jnp.float32)
        if known is None:
            losses = self.process.loss(prediction, content, noise, t)  # each [B]
            return {name: Mean.of(value, mask) for name, value in losses.items()}
        losses = self.process.loss(prediction, content, noise, t, ~known)  # each [B]
        share = mean_of_each(1.0 - known)  # [B], so that every noised value counts alike
        weights = share if mask is None else share * mask
        return {name: Mean.of(value, weights) for name, value in losses.items()}

    def _predict(self, variables: Any, x_t: Array, t: Array, label: Array, **options: Any) -> Any:
        """Runs the network in the dtype of its parameters."""
        x_t = x_t.astype(dtype_of(variables["params"]))
        return self.model.apply(variables, x_t, self.process.network_time(t), label, **options)


def _with_known(x_t: Array, content: Array, known: Array | None) -> Array:
    """What the network sees: what is given is clean."""
    return x_t if known is None else Known(content, known).into(x_t)


def _is_pair(node: Any) -> bool:
    """Whether a node of what was sown is a prediction and its pixels; sowing makes tuples of such pairs."""
    return isinstance(node, tuple) and len(node) == 2 and not isinstance(node[0], tuple)
