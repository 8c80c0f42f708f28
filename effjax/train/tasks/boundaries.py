"""A predictor learns from a frozen language model where the chunks of a text begin.

    target: attention from beyond looks at one side of the gap twice as much as at the other, or more
    loss = mean over layers and gaps of (1 - p_t)^2 cross-entropy(predictor(keys), target)

One predictor serves all layers. Xiong et al., arXiv:2510.24606, section 3.2; the authors' first code has
these constants, Adam with a rate of 1e-4, two epochs, and texts of up to 8192 tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from effjax import models
from effjax.config import part
from effjax.decoding.policies.attention_shift import AttentionShift
from effjax.layers.stored import dtype_of
from effjax.mixers.boundaries import focal_loss
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Says of the gaps between tokens which are boundaries.

    A batch holds integers `tokens`, `[B, N]`: rows of one text each, without padding.

    Attributes:
      model: the predictor, an `effjax.mixers.boundaries.BoundaryPredictor`.
      teacher: the language model whose keys it reads.
      weights: folder of the teacher's.
      ratio: of attention, at least, that makes a boundary.
    """

    model: nn.Module
    teacher: nn.Module = part(models.KINDS)
    weights: str | None = None
    ratio: float = 2.0

    unit = "tokens"
    training_only = ("teacher",)

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {"teacher": self.weights}

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of predictor and teacher."""
        own, other = jax.random.split(key)
        teacher = dict(self.teacher.init(other, batch["tokens"]))
        keys, _ = self.shown(teacher, batch["tokens"])
        return {**self.model.init(own, keys), "teacher": teacher}

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Leaves everything but the tokens, and the mask of rows that count, behind."""
        return {name: batch[name] for name in ("tokens", "mask") if name in batch}

    def shown(
        self, teacher: Any, tokens: Array
    ) -> tuple[Float[Array, "texts n groups d"], Float[Array, "texts n"]]:
        """Keys of every layer, one text after the other, and how attention shifts in them."""
        model = self.teacher.clone(cache=AttentionShift(self.model.window))
        held = jax.tree.map(jax.lax.stop_gradient, teacher)
        dtype = dtype_of(held["params"])
        caches = model.init_cache(*tokens.shape, dtype)
        told: Any = model.apply(held, tokens, caches, method="step")
        caches = told[1]  # [L, B, N, ..]
        keys, ratios = caches.keys, caches.state
        return keys.reshape(-1, *keys.shape[2:]), ratios.reshape(-1, ratios.shape[2])

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """Focal cross-entropy, and how many gaps are told rightly."""
        means = self._means(variables, batch)
        return means, {"teacher": variables["teacher"]}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """The same in evaluation."""
        return self._means(variables, batch)

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """How many boundaries were found, and how many of those found are some."""
        found = values["boundaries_found"]
        return values | {
            "recall": found / max(values["boundaries"], 1e-9),
            "precision": found / max(values["predicted"], 1e-9),
        }

    def _means(self, variables: Any, batch: Batch) -> Means:
        keys, ratios = self.shown(variables["teacher"], batch["tokens"])
        logits: Array = self.model.apply({"params": variables["params"]}, keys)  # type: ignore[assignment]
        logits = logits.astype(jnp.float32)  # [L B, N]
        targets: Bool[Array, "texts n"] = ratios >= self.ratio
        told = (ratios > 0).astype(jnp.float32)  # within the text
        if "mask" in batch:
            told = (
                told * jnp.tile(batch["mask"].astype(jnp.float32), len(told) // len(batch["mask"]))[:, None]
            )
        predicted = logits > 0
        return {
            "loss": Mean.of(focal_loss(logits, targets), told),
            "accuracy": Mean.of(predicted == targets, told),
            "boundaries": Mean.of(targets, told),
            "predicted": Mean.of(predicted, told),
            "boundaries_found": Mean.of(predicted & targets, told),
        }
