"""Image classification with a teacher: its logits, and if asked for its tokens layer by layer.

    loss = CE(student, target) + w_l tau^2 KL(teacher / tau || student / tau)
         + w_t mean_l mean |R_l(x_l) - t_l|^2

x_l and t_l are the patch tokens behind layer l, of student and teacher (Hinton et al. 2015 for the logits).
R_l makes as many tokens of the student's as the teacher has, where it has fewer: feature recalibration
distillation, Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.3. Its parameters stand
among the student's as `recalibration`, and the student works without them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from effjax import models
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.tokens.slimming import Recalibration
from effjax.tokens.tokens import Tokens
from effjax.train.tasks.classification import Classification
from effjax.train.tasks.mean import Mean, Means
from effjax.train.tasks.mixing import Mixing

Batch = Mapping[str, Array]


class Recalibrations(nn.Module):
    """One module for each layer whose tokens are fewer than the teacher's."""

    @nn.compact
    def __call__(self, layers: list[Array], count: int) -> list[Array]:
        """Maps `[B, M_l, C]` of every layer to `[B, count, C]`."""
        return [
            x if x.shape[1] == count else Recalibration(name=f"layer_{layer}")(x, count)
            for layer, x in enumerate(layers)
        ]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Classifies as a frozen teacher does, and as the labels say.

    Attributes:
      model: the student.
      teacher: maps the same images to logits of the same classes.
      weights: folder of the teacher's: of a training run, or of what `experiments.convert` wrote.
      labels: factor of the cross-entropy with the labels.
      logits: factor of the divergence from the teacher's logits.
      temperature: tau.
      tokens: factor of the distance to the teacher's tokens; 0 leaves these out. For two ViTs of one depth
        and width.
      smoothing: share of the target spread evenly over all classes.
      mixing: mixup and CutMix; the teacher sees the mixed pictures.
    """

    model: nn.Module
    teacher: nn.Module = part(models.KINDS)
    weights: str | None = None
    labels: float = 1.0
    logits: float = 1.0
    temperature: float = 1.0
    tokens: float = 0.0
    smoothing: float = 0.0
    mixing: Mixing | None = None

    unit = "images"
    training_only = ("recalibration", "teacher")

    def __post_init__(self) -> None:
        if self.teacher.classes != self.model.classes:
            raise UsageError(
                f"the teacher knows {self.teacher.classes} classes and the student {self.model.classes}."
            )
        if self.tokens and not all(isinstance(m, models.ViT) for m in (self.model, self.teacher)):
            raise UsageError("tokens are matched between two ViTs: set tokens=0 for other networks.")
        if self.tokens and (self.teacher.depth, self.teacher.dim) != (self.model.depth, self.model.dim):
            raise UsageError(
                "tokens are matched layer by layer: teacher and student have one depth and width."
            )

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {"teacher": self.weights}

    @property
    def _classification(self) -> Classification:
        return Classification(self.model, self.smoothing, self.mixing)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of student, recalibration and teacher."""
        of_student, of_teacher, of_match = jax.random.split(key, 3)
        images = batch["image"]
        variables = dict(self.model.init(of_student, images))
        teacher = dict(self.teacher.init(of_teacher, images))
        if self.tokens:
            own = jax.eval_shape(lambda: self._run(self.model, meta.unbox(variables), images)[1])
            goals = jax.eval_shape(lambda: self._run(self.teacher, meta.unbox(teacher), images)[1])
            layers = [jnp.zeros(layer.shape, layer.dtype) for layer in own]
            made = Recalibrations().init(of_match, layers, goals[0].shape[1])
            if "params" in made:
                variables["params"] = {**variables["params"], "recalibration": made["params"]}
        return {**variables, "teacher": teacher}

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Makes soft targets and mixes the pictures."""
        return self._classification.prepare(batch, key)

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The loss, its parts, and agreement with the labels and with the teacher."""
        others = [name for name in variables if name not in ("params", "teacher")]
        student, layers, collections = self._run(
            self.model, variables, batch["image"], others, train=True, rngs={"dropout": key}
        )
        dtype = student.dtype
        held = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["teacher"]["params"])
        teacher, goals, _ = jax.lax.stop_gradient(
            self._run(self.teacher, {**variables["teacher"], "params": held}, batch["image"])
        )
        student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)  # [B, classes]
        parts = {
            "labels": self.labels * -jnp.sum(batch["target"] * jax.nn.log_softmax(student), axis=-1),  # [B]
            "logits": self.logits * divergence(teacher, student, self.temperature),  # [B]
        }
        if self.tokens:
            grown = self._recalibrated(variables, layers, goals[0].shape[1])
            parts["tokens"] = self.tokens * distance(grown, goals)  # [B]
        right = jnp.argmax(student, -1) == jnp.argmax(batch["target"], -1)  # [B]
        alike = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)  # [B]
        means = {f"{name}_loss": Mean.of(value) for name, value in parts.items()}
        means |= {"accuracy": Mean.of(right), "agreement": Mean.of(alike)}
        loss = functools.reduce(jnp.add, parts.values())  # [B]
        return {"loss": Mean.of(loss), **means}, {**collections, "teacher": variables["teacher"]}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """Of the student alone: cross-entropy with the labels and top-1 accuracy."""
        return self._classification.metrics(variables, batch)

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values

    def _run(
        self, model: nn.Module, variables: Any, images: Array, others: list[str] | None = None, **options: Any
    ) -> tuple[Array, list[Array], Any]:
        """Logits, the patch tokens behind every layer, and the other collections."""
        watch = ["intermediates"] if self.tokens else []
        logits, collections = model.apply(variables, images, mutable=[*(others or []), *watch], **options)
        changed: dict[str, Any] = dict(collections)
        sown = changed.pop("intermediates", None)
        layers = [] if sown is None else [_patches(s, model.prefix) for s in streams(sown["blocks"])[1:]]
        return logits, layers, changed

    @staticmethod
    def _recalibrated(variables: Any, layers: list[Array], count: int) -> list[Array]:
        params = variables["params"].get("recalibration", {})
        return Recalibrations().apply({"params": params}, layers, count)  # type: ignore[return-value]


def divergence(
    teacher: Float[Array, "b classes"], student: Float[Array, "b classes"], temperature: float
) -> Float[Array, " b"]:
    """tau^2 KL(teacher / tau || student / tau), whose gradient keeps its size at any temperature."""
    wanted, given = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1)


def distance(student: list[Array], teacher: list[Array]) -> Float[Array, " b"]:
    """The mean square between tokens, over all layers."""
    each = [
        jnp.mean((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2, axis=(1, 2))
        for a, b in zip(student, teacher, strict=True)
    ]
    return functools.reduce(jnp.add, each) / len(each)


def _patches(stream: Array | Tokens, prefix: int) -> Array:
    x = stream.x if isinstance(stream, Tokens) else stream
    return x[:, prefix:]
