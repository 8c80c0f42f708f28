"""Tuning of a trained language model by low-rank adapters, also of one that leaves neurons out.

    W' = W + (alpha / r) A B                               see `effjax.compress.lora`

The parameters are those of the model, from the folder `train.start`, and `adapters` beside them; `freeze` of
the optimiser leaves the adapters alone to be trained. What is evaluated and what the run is used with are the
parameters W', those of the model as it is.

With a `sparsity` the thresholds of CATS are measured on training batches before the first step, on the
weights that the run starts from: see `effjax.compress.cats`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax.core import meta
from jaxtyping import Array, PRNGKeyArray

from effjax.compress.cats import calibrate, thresholded
from effjax.compress.lora import KERNELS, drawn, merged
from effjax.errors import UsageError
from effjax.ffn.cats import CATS
from effjax.models.lm import LM
from effjax.train.tasks.language import Language
from effjax.train.tasks.mean import Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class LowRank(Language):
    """Predicts each next token, with adapters beside the parameters of the model.

    Attributes:
      rank: r above.
      alpha: factor of the product, over the rank.
      rules: regexps of kernels that have an adapter, each with how its axes are meant.
      sparsity: share of neurons that CATS leaves out; None measures nothing.
      batches: how many batches of training text thresholds are measured on.
    """

    rank: int = 8
    alpha: float = 16.0
    rules: tuple[tuple[str, str], ...] = tuple(KERNELS)
    sparsity: float | None = None
    batches: int = 8

    training_only = ("adapters",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank={self.rank}: an adapter has at least one.")
        ffn = getattr(getattr(self.model, "block", None), "ffn", None)
        if self.sparsity is not None and not isinstance(ffn, CATS):
            raise UsageError("sparsity is of perceptrons that leave neurons out: set ffn.kind='cats'.")

    @property
    def measured(self) -> tuple[str, ...]:
        """Collections that are measured and not read from a folder."""
        return () if self.sparsity is None else ("thresholds",)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """The variables of the model, and adapters that change nothing yet."""
        made = super().init(key, batch)
        adapters = drawn(meta.unbox(made["params"]), self.rules, self.rank, key)
        return {**made, "params": {**made["params"], "adapters": adapters}}

    def measure(self, given: Mapping[str, Any], batches: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        """The thresholds of weights that were read.

        Raises:
          UsageError: where none were.
        """
        if self.sparsity is None:
            return {}
        if "params" not in given:
            raise UsageError("thresholds are of trained weights: name their folder with config.train.start.")
        assert isinstance(self.model, LM)
        variables, some = {"params": given["params"]}, itertools.islice(batches(), self.batches)
        thresholds = calibrate(self.model, variables, some, self.sparsity)
        return {"thresholds": thresholded(self.model, variables, thresholds)[1]["thresholds"]}

    def tuned(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables with W' in the place of W."""
        params = merged(
            {name: value for name, value in variables["params"].items() if name != "adapters"},
            variables["params"]["adapters"],
            self.alpha / self.rank,
        )
        return {**variables, "params": params}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """As `Language`, of W'."""
        return super().loss(self.tuned(variables), batch, key)
