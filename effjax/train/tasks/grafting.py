"""The first stage of grafting: every new operator of a diffusion transformer learns what the old one gave.

    loss = mean over layers of |g(h) - f(h)| for mixers, and of (g(h) - f(h))^2 for FFNs

h is what enters the operator f of the teacher, at the times and with the noise of an ordinary diffusion
training. Everything else begins, and stays by `freeze` of the optimiser, as the teacher has it. The second
stage is the task `diffusion`, with `train.start` the folder of this run.

Source: Chandrasegaran et al., "Exploring Diffusion Transformer Designs via Grafting", NeurIPS 2025, section
3; see `effjax.compress.grafting`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax import models
from effjax.compress.grafting import Distance, Operator, inherited, regressions, replaced, watch
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.stored import dtype_of
from effjax.models.blocks.several import Parallel
from effjax.models.dit import DiT
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grafting(Diffusion):
    """Teaches the operators in which a DiT differs from its teacher.

    In evaluation it is `Diffusion`: the losses are those of the whole grafted network.

    Attributes:
      teacher: the DiT that was trained.
      weights: folder of the teacher's: of a training run, or of what `experiments.convert` wrote.
      anew: operators that are drawn anew although they are defined as the teacher's.
      mixer: distance for mixers.
      ffn: distance for FFNs.
      block: distance for blocks side by side.
    """

    teacher: nn.Module = part(models.KINDS)
    weights: str | None = None
    anew: tuple[Operator, ...] = ()
    mixer: Distance = "l1"
    ffn: Distance = "l2"
    block: Distance = "l1"

    training_only = ("teacher",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.model, DiT) and isinstance(self.teacher, DiT)):
            raise UsageError("operators are grafted from one DiT into another.")
        for field in ("patch", "dim", "classes", "null_class", "learned_sigma", "frequencies"):
            own, given = getattr(self.model, field), getattr(self.teacher, field)
            if own != given:
                raise UsageError(f"{field} is {own} in the grafted network and {given} in its teacher.")
        if not isinstance(self.model.block, Parallel) and not any(self._new):
            raise UsageError("the model is its teacher: replace an operator, or name one in anew.")

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {**super().frozen, "teacher": self.weights}

    def inherit(self, shapes: Any, given: Mapping[str, Any], batches: Any) -> dict[str, Any]:
        """All parameters but those of new operators."""
        return inherited(*self._networks, given["teacher"]["params"], self.anew)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of both networks."""
        of_student, of_teacher = jax.random.split(key)
        made = super().init(of_student, batch)
        content = batch[self.content]
        noised = jnp.zeros((1, *self.shape(content.shape[1:])), jnp.float32)
        told = self.told(batch)[:1]
        return {**made, "teacher": dict(self.teacher.init(of_teacher, noised, jnp.zeros(1), told))}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The distances to what the teacher's operators give, and the squared errors as shares."""
        content, noise = self._noised(variables, batch), batch["noise"].astype(jnp.float32)
        x_t = self.process.noise(content, noise, batch["time"])
        found = self._compared(variables, x_t, batch["time"], self.told(batch))
        means = {f"{name}_error": Mean.of(error) for name, (_, error) in found.items()}
        loss = functools.reduce(jnp.add, (distance for distance, _ in found.values()))  # [B]
        others = {name: value for name, value in variables.items() if name != "params"}
        return {"loss": Mean.of(loss), **means}, others

    def _compared(self, variables: Any, x_t: Array, t: Array, condition: Array) -> dict[str, Any]:
        """What `regressions` says, with the teacher in the dtype of the grafted network."""
        dtype = dtype_of(variables["params"])
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["teacher"]["params"])
        student, teacher = self._networks
        times = self.process.network_time(t)
        seen = watch(teacher, {"params": params}, x_t.astype(dtype), times, condition)
        seen = jax.lax.stop_gradient(seen)
        distances: dict[str, Distance] = dict(mixer=self.mixer, ffn=self.ffn, block=self.block)
        return regressions(student, variables["params"]["blocks"], self._new, seen, distances, train=True)

    @property
    def _new(self) -> tuple[frozenset[Operator], ...]:
        return replaced(*self._networks, self.anew)

    @property
    def _networks(self) -> tuple[DiT, DiT]:
        assert isinstance(self.model, DiT)
        assert isinstance(self.teacher, DiT)
        return self.model, self.teacher
