"""A student whose features become those of a teacher, without a label.

    loss = 1 - cos(z, z_t)              "cosine"
    loss = mean_c (z_c - z_tc)^2        "squared"

z is what the head of the student reads, z_t what that of the teacher does: in a network that begins with the
head, the norm and the last blocks of its teacher (`inherits`) these keep their meaning, and the accuracy of
the teacher comes over with its features. What is to stay as it was is named by `freeze` of the optimiser.

Source: Gao et al., "Bootstrapping SparseFormers from Vision Foundation Models", CVPR 2024. Its training code
is not published; which distance it takes could not be read, and the default is our choice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from effjax import models
from effjax.config import part
from effjax.errors import UsageError
from effjax.models.sparseformer import SparseFormer, inherited
from effjax.train.tasks.classification import Classification
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Makes the features of a frozen teacher.

    Attributes:
      model: the student.
      teacher: maps the same images to features of the same width.
      weights: folder of the teacher's: of a training run, or of what `experiments.convert` wrote.
      distance: between the features.
      inherits: whether the student, a SparseFormer, begins with what it shares with its teacher, a ViT.
      teacher_size: side to which pictures are resized for the teacher; None leaves them.
    """

    model: nn.Module
    teacher: nn.Module = part(models.KINDS)
    weights: str | None = None
    distance: Literal["cosine", "squared"] = "cosine"
    inherits: bool = True
    teacher_size: int | None = None

    unit = "images"
    training_only = ("teacher",)

    def __post_init__(self) -> None:
        if self.model.dim != self.teacher.dim:
            raise UsageError(
                f"features are compared channel by channel: the teacher has {self.teacher.dim} and the "
                f"student {self.model.dim}."
            )
        if self.inherits and not (
            isinstance(self.model, SparseFormer) and isinstance(self.teacher, models.ViT)
        ):
            raise UsageError("a SparseFormer inherits from a ViT: set inherits=False for other networks.")

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {"teacher": self.weights}

    def inherit(self, shapes: Any, given: Mapping[str, Any], batches: Any) -> dict[str, Any]:
        """Parameters that the student begins with, of the collections read from folders; others are drawn."""
        return inherited(shapes, given["teacher"]["params"]) if self.inherits else {}

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of student and teacher."""
        of_student, of_teacher = jax.random.split(key)
        variables = dict(self.model.init(of_student, batch["image"]))
        return {**variables, "teacher": dict(self.teacher.init(of_teacher, self._seen(batch["image"])))}

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Leaves everything but the pictures behind."""
        return {"image": batch["image"]}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The distance to the teacher's features, and the cosine of the angle between both."""
        images, others = batch["image"], [n for n in variables if n not in ("params", "teacher")]
        z, collections = self.model.clone(classes=0).apply(
            variables, images, train=True, rngs={"dropout": key}, mutable=others
        )
        held = jax.tree.map(lambda leaf: leaf.astype(z.dtype), variables["teacher"]["params"])
        goal: Array = self.teacher.clone(classes=0).apply(  # type: ignore[assignment]
            {**variables["teacher"], "params": held}, self._seen(images)
        )
        goal = jax.lax.stop_gradient(goal).astype(jnp.float32)  # [B, C]
        z = z.astype(jnp.float32)  # [B, C]
        alike = cosine(z, goal)  # [B]
        loss = 1 - alike if self.distance == "cosine" else jnp.mean((z - goal) ** 2, axis=-1)
        means = {"loss": Mean.of(loss), "cosine": Mean.of(alike)}
        return means, {**collections, "teacher": variables["teacher"]}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """Of the student alone, through its head: cross-entropy with the labels and top-1 accuracy."""
        return Classification(self.model).metrics(variables, batch)

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values

    def _seen(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The pictures as the teacher sees them."""
        if self.teacher_size is None:
            return images
        shape = images.shape[0], self.teacher_size, self.teacher_size, images.shape[3]
        return jax.image.resize(images, shape, "bicubic")


def cosine(a: Float[Array, "b c"], b: Float[Array, "b c"]) -> Float[Array, " b"]:
    """The cosine of the angle between two vectors; 0 where one of them is 0."""
    length = jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.maximum(length, 1e-12))
