"""Distillation of a diffusion transformer into one that is made of its own parts: Dense2MoE.

    loss = output |f(x_t) - g(x_t)|^2 + features mean_k |h_k - h'_k|^2 / |h'_k|^2 + what the routers sow

g is the teacher, f the network that is trained, h_k and h'_k what leaves the k-th block of f (or group of
blocks) and as many blocks of g, at the times and with the noise of an ordinary diffusion training. f starts
with the parts of the teacher: experts of its neurons, groups of its blocks, or, to compare with, FFNs of its
best neurons alone, whichever its definition asks for.

Source: Zheng et al., ICCV 2025; see `effjax.compress.dense2moe`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from effjax import models
from effjax.compress.dense2moe import importance, magnitude, mixture_of, pruned, to_experts, to_groups
from effjax.config import part
from effjax.errors import UsageError
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.layers.stack import streams
from effjax.layers.stored import dtype_of
from effjax.models.blocks.mixture import MixtureOfBlocks
from effjax.models.dit import DiT
from effjax.train.tasks.auxiliary import LOSSES, with_auxiliary
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense2MoE(Diffusion):
    """Teaches a DiT with experts, with groups of blocks or with narrower FFNs what a denser one does.

    In evaluation it is `Diffusion`: the losses are those of the sparse network.

    Attributes:
      teacher: the DiT that was trained.
      weights: folder of the teacher's: of a training run, or of what `experiments.convert` wrote.
      output: weight of the distance of predictions.
      features: weight of the distance of what leaves the blocks.
      scores: how neurons are ranked before they become experts, or are left out.
      batches: of training data, that the first-order scores are measured on.
    """

    teacher: nn.Module = part(models.KINDS)
    weights: str | None = None
    output: float = 1.0
    features: float = 1.0
    scores: Literal["taylor", "magnitude"] = "taylor"
    batches: int = 8

    training_only = ("teacher",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.model, DiT) and isinstance(self.teacher, DiT)):
            raise UsageError("dense2moe makes one DiT of another: give it two.")
        if self.batches < 1:
            raise UsageError(f"batches={self.batches}: measure scores on at least one.")
        block = self.model.block
        if isinstance(block, MixtureOfBlocks):
            if self.model.depth * len(block.members) != self.teacher.depth:
                raise UsageError(
                    f"{self.model.depth} groups of {len(block.members)} blocks are not the teacher's "
                    f"{self.teacher.depth} blocks."
                )
        elif self._pruned:
            pass
        elif not isinstance(getattr(block, "ffn", None), Mixture):
            raise UsageError(
                "the model is made of experts, of groups of blocks or of fewer neurons: it has none of them."
            )
        elif self._experts != block.ffn.clone(balance=0.0):  # type: ignore[attr-defined]
            raise UsageError(
                f"experts made of the teacher's neurons are {self._experts}: the model has others."
            )

    @property
    def _experts(self) -> Mixture:
        """The definition of experts that hold the teacher's neurons, as many as the model asks for."""
        own, dense = self.model.block.ffn, self.teacher.block.ffn
        shared = own.shared / _hidden(self.teacher)
        return mixture_of(dense, self.teacher.dim, own.experts, own.chosen, shared).clone(balance=0.0)

    @property
    def _pruned(self) -> bool:
        """Whether the model is the teacher with fewer neurons in its FFNs."""
        own, block = getattr(self.model.block, "ffn", None), self.teacher.block
        if not isinstance(own, MLP) or _hidden(self.model) >= _hidden(self.teacher):
            return False
        ffn = block.ffn.clone(hidden=own.hidden, ratio=own.ratio)
        return self.model == self.teacher.clone(block=block.clone(ffn=ffn))

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {**super().frozen, "teacher": self.weights}

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of both networks."""
        of_student, of_teacher = jax.random.split(key)
        made = super().init(of_student, batch)
        content = batch[self.content]
        noised = jnp.zeros((1, *self.shape(content.shape[1:])), jnp.float32)
        held = self.teacher.init(of_teacher, noised, jnp.zeros(1), self.told(batch)[:1])
        return {**made, "teacher": dict(held)}

    def inherit(
        self, shapes: Any, given: Mapping[str, Any], batches: Callable[[], Iterable[Batch]]
    ) -> dict[str, Any]:
        """The teacher's parts as experts, in groups or the best of them, and routers that prefer none."""
        del shapes
        params, key = given["teacher"]["params"], jax.random.key(0)
        assert isinstance(self.model, DiT)
        assert isinstance(self.teacher, DiT)
        block = self.model.block
        if isinstance(block, MixtureOfBlocks):
            return to_groups(self.teacher, params, len(block.members), block.chosen, key)[1]
        if self.scores == "magnitude":
            scores = magnitude(params)
        else:
            scores = importance(self._dense_loss(given), params, itertools.islice(batches(), self.batches))
        if self._pruned:
            return pruned(self.teacher, params, scores, _hidden(self.model))[1]
        own = block.ffn
        shared = own.shared / scores.shape[1]
        return to_experts(self.teacher, params, scores, key, own.experts, own.chosen, shared)[1]

    def _dense_loss(self, given: Mapping[str, Any]) -> Callable[[Any, Batch], Float[Array, ""]]:
        """The loss of the teacher on a batch."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Diffusion)}
        dense = Diffusion(**{**own, "model": self.teacher})
        held = {name: value for name, value in given.items() if name != "teacher"}

        def loss(params: Any, batch: Batch) -> Float[Array, ""]:
            key = jax.random.key(0)
            means, _ = dense.loss({**held, "params": params}, dense.prepare(batch, key), key)
            return means["loss"].value()

        return loss

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The distances to what the teacher predicts and passes on, and what routers sow."""
        content, noise = self._noised(variables, batch), batch["noise"].astype(jnp.float32)
        x_t = self.process.noise(content, noise, batch["time"]).astype(dtype_of(variables["params"]))
        told = x_t, self.process.network_time(batch["time"]), self.told(batch)
        dtype = dtype_of(variables["params"])
        held = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["teacher"]["params"])
        seen: Any
        wanted, seen = self.teacher.apply({"params": held}, *told, mutable=["intermediates"])
        wanted, passed = jax.lax.stop_gradient((wanted, streams(seen["intermediates"]["blocks"])))

        apart = {name: value for name, value in variables.items() if name not in self.frozen}
        state = [name for name in apart if name != "params"]
        changed: Any
        prediction, changed = self.model.apply(
            apart, *told, train=True, rngs={"dropout": key}, mutable=[LOSSES, "intermediates", *state]
        )
        step = self.teacher.depth // self.model.depth
        pairs = list(
            zip(streams(changed.pop("intermediates")["blocks"])[1:], passed[step::step], strict=True)
        )
        output = _mean_square(prediction.astype(jnp.float32) - wanted)  # [B]
        features = sum(
            (_mean_square(h.astype(jnp.float32) - g) / _mean_square(g) for h, g in pairs), jnp.zeros(())
        ) / len(pairs)  # [B]
        means: Means = {
            "loss": Mean.of(self.output * output + self.features * features),
            "output_error": Mean.of(output),
            "feature_error": Mean.of(features),
        }
        means, rest = with_auxiliary(means, changed)
        return means, rest | {name: variables[name] for name in self.frozen}


def _hidden(model: Any) -> int:
    """Neurons of each perceptron of a DiT."""
    ffn = model.block.ffn
    return int(ffn.hidden or round(model.dim * ffn.ratio))


def _mean_square(x: Float[Array, "b *rest"]) -> Float[Array, " b"]:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))
