"""Drawn pictures beside real ones.

For every example of a data set one picture is drawn, of what that example's condition says. Reported are

    frechet             distance between the features of drawn and of real pictures
    frechet_halves      the same between the even and the odd real ones: what chance alone gives
    precision, recall   of the drawn features, see `effjax.measure.fidelity`
    agreement           share of drawn pictures that the extractor takes for the class that was asked for
    agreement_real      share of real ones that it does

With an Inception network as extractor the first is the FID.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from effjax.config import part
from effjax.data import Data, OpenData
from effjax.diffusion import samplers
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.errors import UsageError
from effjax.measure.fidelity import Moments, frechet_distance, precision_and_recall
from effjax.parallel.sharding import activate
from effjax.train import extractors
from effjax.train.evaluators.evaluation import Evaluation, ReadWeights, batches
from effjax.train.tasks.diffusion import Diffusion


@dataclasses.dataclass(frozen=True)
class Samples:
    """How good the pictures are that a diffusion model draws.

    Attributes:
      data: real examples: their conditions are drawn, and their pictures compared with.
      every: how often, a duration such as `"10%"`.
      extractor: what gives features.
      sampler: how to walk from noise to picture.
      guidance: scale of classifier-free guidance; 1 is none.
      interval: the share of the process that is guided, from 0, the picture, to 1, noise.
      neighbours: of the manifolds that precision and recall are measured with.
      seed: of all noise.
      ema: whether to use the averaged weights.
    """

    data: Data
    every: str
    extractor: extractors.Classifier = part(extractors.KINDS)
    sampler: samplers.Sampler = part(samplers.KINDS)
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    neighbours: int = 3
    seed: int = 0
    ema: bool = True

    def open(self, read: ReadWeights) -> Evaluation:
        """The evaluator with its data open.

        Raises:
          UsageError: where the extractor's weights are not there.
        """
        self.extractor.check()
        return _Open(self, read)

    @property
    def sampling(self) -> Sampling:
        """How pictures are drawn."""
        return Sampling(self.sampler, self.guidance, self.interval)


class _Open:
    """Keeps the extractor's weights and the features of the real pictures."""

    def __init__(self, definition: Samples, read: ReadWeights) -> None:
        self.definition, self.read = definition, read
        self.data: OpenData = definition.data.open()
        self._weights: Any = None
        self._real: _Seen | None = None
        self._compiled: tuple[Any, Any, Any, Any] | None = None

    def __call__(self, program: Any, variables: Any, check_stop: Callable[[], None]) -> dict[str, float]:
        """Draws, and compares.

        Raises:
          UsageError: for a run that is no diffusion, or what cannot be sampled.
        """
        task, definition = program.task, self.definition
        if not isinstance(task, Diffusion):
            kind = type(task).__name__.lower()
            raise UsageError(f"an evaluator of kind 'samples' needs a diffusion run, and this one is {kind}.")
        definition.sampling.check(task, ())
        variables = program.experiment.train.precision.cast(variables)
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        look, draw, show = self._functions(program)
        with activate(program.mesh, program.rules):
            if self._weights is None:
                shown = functools.partial(show, variables)
                self._weights = definition.extractor.variables(program, shown, self.read, check_stop)
            if self._real is None:
                self._real = _Seen.of(
                    _seen(look(self._weights, show(variables, batch)), batch, everywhere)
                    for batch in batches(self.data, program, check_stop)
                )
            drawn = []
            for number, batch in enumerate(batches(self.data, program, check_stop)):
                first = jnp.asarray(number * len(batch["mask"]))
                pictures = draw(variables, task.told(batch), first)
                drawn.append(_seen(look(self._weights, pictures), batch, everywhere))
        return _compared(_Seen.of(drawn), self._real, definition.neighbours)

    def _functions(self, program: Any) -> tuple[Any, Any, Any]:
        """What looks at pictures, draws them, and shows real ones, compiled once for a program."""
        if self._compiled is None or self._compiled[0] is not program:
            task, definition = program.task, self.definition
            shape = task.shape(self.data.example_batch(1)[task.content].shape[1:])

            def draw(variables: Any, condition: Array, first: Array) -> Array:
                keys = example_keys(jax.random.key(definition.seed), first + jnp.arange(len(condition)))
                drawn = sample_classes(task, variables, condition, shape, definition.sampling, keys)
                return task.pictures(variables, drawn)

            def show(variables: Any, batch: Any) -> Array:
                return task.shown(variables, batch[task.content].astype(jnp.float32))

            everywhere = NamedSharding(program.mesh, PartitionSpec())
            look = jax.jit(definition.extractor.__call__, out_shardings=everywhere)
            self._compiled = program, look, jax.jit(draw), jax.jit(show)
        return self._compiled[1:]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Features of pictures, and which of them were taken for their class; None without labels."""

    features: Float[np.ndarray, "n c"]
    right: Bool[np.ndarray, " n"] | None

    @classmethod
    def of(cls, parts: Iterable["_Seen"]) -> "_Seen":
        """All batches of an evaluation in one."""
        parts = list(parts)
        right = [part.right for part in parts if part.right is not None]
        features = np.concatenate([part.features for part in parts])
        return cls(features, np.concatenate(right) if right else None)


def _seen(look: tuple[Array, Array], batch: Mapping[str, Array], everywhere: NamedSharding) -> _Seen:
    """What an extractor said of an evaluation batch, `(features, logits)`, without the padding."""
    kept = {name: batch[name] for name in ("mask", "label") if name in batch}
    kept = jax.tree.map(np.asarray, jax.device_put(kept, everywhere))
    real = kept["mask"] > 0
    vectors, logits = (np.asarray(part) for part in look)
    right = (logits.argmax(-1) == kept["label"])[real] if "label" in kept else None
    return _Seen(vectors[real], right)


def _compared(drawn: _Seen, real: _Seen, neighbours: int) -> dict[str, float]:
    """Everything that is reported of drawn and real pictures."""
    values = {
        "frechet": _distance(drawn.features, real.features),
        "frechet_halves": _distance(real.features[::2], real.features[1::2]),
    }
    values["precision"], values["recall"] = precision_and_recall(
        jnp.asarray(drawn.features), jnp.asarray(real.features), neighbours
    )
    if drawn.right is not None and real.right is not None:
        values |= {"agreement": drawn.right.mean(), "agreement_real": real.right.mean()}
    return {name: float(value) for name, value in values.items()}


@jax.jit
def _distance(one: Float[Array, "n c"], other: Float[Array, "m c"]) -> Float[Array, ""]:
    """How far apart two sets of features are."""
    return frechet_distance(Moments.of(one), Moments.of(other))
