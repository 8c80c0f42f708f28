"""What turns pictures into the features that they are compared in.

An extractor gives for pictures in [-1, 1] the vector that a classifier's last layer reads, and its logits.
Any image classifier of `effjax.models` will do: one trained here, or imported weights. Figures of different
extractors cannot be compared.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float

from effjax import models
from effjax.config import part
from effjax.data import Data, OpenData
from effjax.errors import UsageError
from effjax.parallel.pace import Pace
from effjax.parallel.sharding import activate, readers, to_global
from effjax.train import optimizers
from effjax.train.durations import Budget
from effjax.train.evaluators.evaluation import ReadWeights
from effjax.train.schedules import Cosine
from effjax.train.state import TrainState
from effjax.train.step import Precision, make_step
from effjax.train.tasks.classification import Classification


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An image classifier.

    Attributes:
      model: maps pictures to logits.
      weights: folder of its weights: of a training run, or of what `experiments.convert` wrote.
      fit: where there are no weights, how long it is trained before it is first asked, which takes pictures
        small enough for that; None where there are.
      data: what it is trained on then, pictures in [-1, 1] and labels; None takes the run's own data.
      optimizer: for that.
      size: side to which pictures are resized; None leaves them.
      resize: how: `bicubic` with antialiasing, or `bilinear` without, as FID has it.
      mean, std: of the pixels it was trained on, in [0, 1], a number a channel or one for all.
    """

    model: nn.Module = part(models.KINDS)
    weights: str | None = None
    fit: str | None = None
    data: Data | None = None
    optimizer: Any = part(
        optimizers.KINDS, default=optimizers.Muon(lr=3e-3, schedule=Cosine(warmup="10%"), weight_decay=0.05)
    )
    size: int | None = None
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.fit is None):
            raise UsageError(
                "a classifier needs either weights='FOLDER', of a run or of what experiments.convert wrote, "
                "or fit='30 epochs', for which it is trained on the run's own data."
            )

    def check(self) -> None:
        """Refuses what would only be found at the first evaluation.

        Raises:
          UsageError: where there is no such folder.
        """
        if self.weights is not None and not Path(self.weights).expanduser().is_dir():
            raise UsageError(
                f"the extractor's weights='{self.weights}' is no folder: train a classifier, bring one in "
                f"with python -m experiments.convert, or take fit='30 epochs' instead."
            )

    def variables(
        self,
        program: Any,
        show: Callable[[Mapping[str, Array]], Array],
        read: ReadWeights,
        check_stop: Callable[[], None],
    ) -> Any:
        """Its variables, read or trained.

        Args:
          program: of the run.
          show: the pictures of a batch, in [-1, 1].
          read: gives the weights in a folder.
          check_stop: called between batches of its training; raises where the run was told to stop.
        """
        if self.data is not None:
            show = _pictures
        data = program.data if self.data is None else self.data.open()
        example = jax.tree.map(jnp.asarray, dict(data.example_batch(1)))
        pictures = jnp.zeros(jax.eval_shape(show, example).shape, jnp.float32)
        if self.weights is not None:
            shapes = jax.eval_shape(lambda: meta.unbox(self._init(pictures)))
            return jax.tree.map(jnp.asarray, read(self.weights, shapes, "the extractor's model"))
        assert self.fit is not None
        return self._fitted(program, data, show, pictures, self.fit, check_stop)

    def __call__(
        self, variables: Any, pictures: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b features"], Float[Array, "b classes"]]:
        """Features and logits of pictures in [-1, 1]."""
        seen = self._seen(pictures)
        features: Array = self.model.clone(classes=0).apply(variables, seen)  # type: ignore[assignment]
        logits: Array = self.model.apply(variables, seen)  # type: ignore[assignment]
        return features.astype(jnp.float32), logits.astype(jnp.float32)

    def _init(self, pictures: Array) -> Any:
        return self.model.init(jax.random.key(0), self._seen(pictures))

    def _seen(self, pictures: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The pictures as it was trained to see them."""
        if self.size is not None:
            shape = pictures.shape[0], self.size, self.size, pictures.shape[3]
            smooth = self.resize == "bicubic"
            pictures = jax.image.resize(pictures, shape, self.resize, antialias=smooth)
        mean, std = (jnp.asarray(value, pictures.dtype)[None, None, None] for value in (self.mean, self.std))
        return ((pictures + 1) / 2 - mean) / std

    def _fitted(
        self, program: Any, data: OpenData, show: Any, pictures: Array, length: str, check_stop: Any
    ) -> Any:
        """Trained from its first weights, on every device alike."""
        task = Classification(self.model, smoothing=0.1)
        budget = Budget.of(length, data.definition.batch_size, data.num_examples)
        shapes = jax.eval_shape(lambda: meta.unbox(self._init(pictures)))
        optimizer = self.optimizer.transformation(shapes["params"], budget)
        step = make_step(task, optimizer, precision=Precision(), accumulate=1, ema=None)

        @jax.jit
        def first() -> TrainState:
            variables = meta.unbox(self._init(pictures))
            return TrainState.create(
                params=variables["params"],
                opt_state=optimizer.init(variables["params"]),
                key=jax.random.key(1),
                collections={name: value for name, value in variables.items() if name != "params"},
            )

        @jax.jit
        def improve(state: TrainState, batch: Any) -> TrainState:
            return step(state, {"image": self._seen(show(batch)), "label": batch["label"]})[0]

        rows = data.train(**readers(program.batch_sharding))
        state, pace = first(), Pace()
        with activate(program.mesh, program.rules):
            for batch in itertools.islice(rows, budget.total_steps):
                check_stop()
                state = improve(state, to_global(batch, program.batch_sharding))
                pace(state.step)
        if bool(state.halted):
            raise UsageError(
                "the extractor's training met a number that is not finite: take a smaller learning rate in "
                "its optimizer."
            )
        return {"params": state.params, **state.collections}


def _pictures(batch: Mapping[str, Array]) -> Array:
    """Those of data that hold nothing else."""
    return batch["image"].astype(jnp.float32)


KINDS = {"classifier": Classifier}
