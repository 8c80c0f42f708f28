"""A family of networks between two trained ones, trained together: every step some of its paths.

    x = small_at( .. small_1(embed(picture))),   z = x M_i + b_i,   y = head(large_depth( .. large_{to+1}(z)))
    loss = mean over drawn paths of  labels CE(y, t) + logits KL(large || y)

The small network, the large one and all maps between them have one set of parameters each, which every path
that goes through them trains; the two networks themselves are members too. The large network as it was
teaches, where it was read from a folder. Metrics are those of every member, `accuracy_AT_TO`.

A path is a program of its own: a family of 34 between two DeiTs of 12 layers compiles for minutes.

Pan, Cai and Zhuang, "Stitchable Neural Networks", CVPR 2023, arXiv:2302.06586, algorithm 1: one path a step,
on all devices the same; the published code lets a RegNet teach by its first choice.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from effjax import models
from effjax.compress.stitching import Pair, as_stitch, fitted, map_of, paths, streams
from effjax.compress.subject import Subject
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import named, zeros
from effjax.models.vit import ViT
from effjax.train.tasks.classification import Classification
from effjax.train.tasks.distillation import divergence
from effjax.train.tasks.mean import Mean, Means, add
from effjax.train.tasks.mixing import Mixing

Batch = Mapping[str, Array]
# (at, to) of a path; (0, 0) is the large network and (its depth, None) the small one.
Path = tuple[int, int | None]


@dataclasses.dataclass(frozen=True)
class Stitching:
    """Classifies by every network of a family.

    Attributes:
      model: the large network, a ViT.
      small: the small one.
      weights: folder of the large one's; None draws both networks.
      small_weights: folder of the small one's.
      kernel: neighbours that a layer may be followed by.
      draws: paths that every step trains.
      batches: of training data that the maps are fitted on.
      ridge: what is added to the squares, times their mean.
      labels: factor of the cross-entropy with the labels.
      logits: factor of the divergence from the large network's logits.
      smoothing: share of the target spread evenly over all classes.
      mixing: mixup and CutMix.
    """

    model: nn.Module
    small: nn.Module = part(models.KINDS)
    weights: str | None = None
    small_weights: str | None = None
    kernel: int = 2
    draws: int = 1
    batches: int = 4
    ridge: float = 1e-6
    labels: float = 1.0
    logits: float = 1.0
    smoothing: float = 0.0
    mixing: Mixing | None = None

    unit = "images"
    training_only = ("teacher", "start")

    def __post_init__(self) -> None:
        for network in (self.model, self.small):
            if not isinstance(network, ViT):
                raise UsageError(f"{type(network).__name__} cannot be stitched: two ViTs can.")
        if (self.weights is None) != (self.small_weights is None):
            raise UsageError("weights and small_weights name the folders of both networks, or of none.")
        if self.kernel < 1 or not 1 <= self.draws <= len(self.members) or self.batches < 1:
            raise UsageError(
                f"kernel={self.kernel} and batches={self.batches} are at least 1, and draws={self.draws} at "
                f"least 1 and at most the {len(self.members)} members."
            )

    @property
    def members(self) -> tuple[Path, ...]:
        """The small network, the paths, and the large network."""
        small, large = self._depths
        return (small, None), *paths(small, large, self.kernel), (0, 0)

    @property
    def _depths(self) -> tuple[int, int]:
        return self.small.depth, self.model.depth  # type: ignore[attr-defined]

    @property
    def frozen(self) -> dict[str, str | None]:
        """Collections that are read from a folder and stay as they are."""
        return {"teacher": self.weights, "start": self.small_weights} if self.weights else {}

    def task_of(self, model: nn.Module) -> Classification:
        """What a member does."""
        return Classification(model, self.smoothing, self.mixing)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables of both networks and of the maps."""
        keys = jax.random.split(key, 3)
        back, front = (
            dict(model.init(own, batch["image"]))
            for model, own in zip((self.model, self.small), keys, strict=False)
        )
        if set(back) | set(front) != {"params"}:
            raise UsageError("networks that keep averages cannot be stitched.")
        shape = self.small.dim, self.model.dim  # type: ignore[attr-defined]
        kernel, bias = named(nn.initializers.lecun_normal(), ("embed", None)), named(zeros, (None,))
        maps = {
            f"map_{i}": {"kernel": kernel(own, shape, jnp.float32), "bias": bias(own, shape[1:], jnp.float32)}
            for i, own in enumerate(jax.random.split(keys[2], self._maps))
        }
        held = {"teacher": back, "start": front} if self.weights else {}
        return {"params": {"front": front["params"], "back": back["params"], "maps": maps}, **held}

    @property
    def _maps(self) -> int:
        small, large = self._depths
        return 1 + max(
            map_of(small, large, at, to, self.kernel) for at, to in paths(small, large, self.kernel)
        )

    def inherit(
        self, shapes: Any, given: Mapping[str, Any], batches: Callable[[], Iterable[Batch]]
    ) -> dict[str, Any]:
        """Both networks, and every map as the mean of those of its paths by least squares."""
        del shapes
        if not given:
            return {}
        rows = [batch for batch, _ in zip(batches(), range(self.batches), strict=False)]
        small = Subject(self.task_of(self.small), given["start"], rows[0])
        large = Subject(self.task_of(self.model), given["teacher"], rows[0])
        left, entering = streams(small, rows), streams(large, rows)
        found: dict[str, list[Any]] = {}
        for at, to in paths(*self._depths, self.kernel):
            name = f"map_{map_of(*self._depths, at, to, self.kernel)}"
            found.setdefault(name, []).append(fitted(left[at], entering[to], self.ridge))
        maps = {
            name: as_stitch(*(np.mean(parts, axis=0) for parts in zip(*each, strict=True)))
            for name, each in found.items()
        }
        return {"front": given["start"]["params"], "back": given["teacher"]["params"], "maps": maps}

    def member(self, variables: Any, batch: Batch, path: Path) -> Subject:
        """A network of the family, as an ordinary one.

        Args:
          variables: of the family, unboxed.
          batch: of examples, for shapes.
          path: which.

        Raises:
          UsageError: for a path that is not of the family.
        """
        if path not in self.members:
            raise UsageError(f"{path} is no path of this family: choose from {self.members}.")
        return self._on(self._pair(variables["params"], batch), variables["params"]["maps"], path)

    def _pair(self, params: Any, batch: Batch) -> Pair:
        """Both networks. Taken apart outside of what is traced for each member, they are so once."""
        small = Subject(self.task_of(self.small), {"params": params["front"]}, batch)
        return Pair.of(small, Subject(self.task_of(self.model), {"params": params["back"]}, batch))

    def _on(self, pair: Pair, maps: Any, path: Path) -> Subject:
        at, to = path
        if to is None:
            return pair.small
        if at == 0:
            return pair.large
        return pair.path(at, to, maps[f"map_{map_of(*self._depths, at, to, self.kernel)}"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Makes soft targets and mixes the pictures."""
        return self.task_of(self.model).prepare(batch, key)

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The means over the drawn members."""
        of_draw, of_loss = jax.random.split(key)
        drawn = jax.random.choice(of_draw, len(self.members), (self.draws,), replace=False)  # [K]
        goals = None
        if "teacher" in variables:
            dtype = jax.tree.leaves(variables["params"])[0].dtype
            held = jax.tree.map(lambda leaf: leaf.astype(dtype), variables["teacher"]["params"])
            told: Array = self.model.apply({"params": held}, batch["image"])  # type: ignore[assignment]
            goals = jax.lax.stop_gradient(told.astype(jnp.float32))  # [B, classes]

        params = variables["params"]
        pair = self._pair(params, batch)

        def of(path: Path) -> Callable[[PRNGKeyArray], Means]:
            def loss(key: PRNGKeyArray) -> Means:
                network = self._on(pair, params["maps"], path)
                logits: Array = network.model.apply(
                    network.variables, batch["image"], train=True, rngs={"dropout": key}
                )
                logits = logits.astype(jnp.float32)  # [B, classes]
                right = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)  # [B]
                loss = self.labels * -jnp.sum(batch["target"] * jax.nn.log_softmax(logits), axis=-1)  # [B]
                if goals is not None:
                    loss = loss + self.logits * divergence(goals, logits, 1.0)
                return {"loss": Mean.of(loss), "accuracy": Mean.of(right)}

            return loss

        ways = [of(path) for path in self.members]
        keys = jax.random.split(of_loss, self.draws)
        found = jax.lax.map(lambda one: jax.lax.switch(one[0], ways, one[1]), (drawn, keys))
        rest = {name: variables[name] for name in self.frozen}
        return jax.tree.map(lambda values: jnp.sum(values, axis=0), found), rest

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """Loss and accuracy of every member, and their means over all."""
        pair = self._pair(variables["params"], batch)
        every = [self._on(pair, variables["params"]["maps"], path) for path in self.members]
        found = [member.task.metrics(member.variables, batch) for member in every]
        total = found[0]
        for own in found[1:]:
            total = add(total, own)
        names = [f"{at}_{'end' if to is None else to}" for at, to in self.members]
        return total | {f"accuracy_{name}": own["accuracy"] for name, own in zip(names, found, strict=True)}

    def answers(self, variables: Any, batch: Batch) -> Array:
        """The class of each example by the large network, `[B]`."""
        large = self.member(variables, batch, (0, 0))
        return large.task.answers(large.variables, batch)  # type: ignore[no-any-return]

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """Nothing follows from these averages."""
        return values
