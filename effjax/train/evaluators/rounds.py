"""Questions that a language model thinks about in rounds: how many it answers rightly.

The model writes as `effjax.decoding.inftythink` has it, as the source says; with an `eta` of the whole
reasoning that is ordinary generation in one context.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from effjax.data import Data, OpenData
from effjax.data.rounds import RunningSum
from effjax.decoding.inftythink import reason
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.measure.analytic.inftythink import attended
from effjax.train.evaluators.evaluation import Evaluation, ReadWeights


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The share of right answers, greedily written.

    Attributes:
      data: questions, of a `running_sum`.
      every: how often, a duration such as `"1 epochs"`.
      ema: whether to use the averaged weights.
    """

    data: Data
    every: str
    ema: bool = False

    def open(self, read: ReadWeights) -> Evaluation:
        """The evaluator with its questions; raises UsageError for data that ask none."""
        if not isinstance(self.data.source, RunningSum):
            raise UsageError("the evaluator 'rounds' needs questions: data.source of the kind running_sum.")
        return _Open(self.data.open(), self.data.source)


@dataclasses.dataclass(frozen=True)
class _Open:
    data: OpenData
    source: RunningSum

    def __call__(self, program: Any, variables: Any, check_stop: Callable[[], None]) -> dict[str, float]:
        # Past its length it may write worse, which is what is asked.
        model, think = program.task.model.clone(max_length=None), self.source.think
        key, greedy = jax.random.key(0), Sampling(temperature=0.0)
        right, finished, read = [], [], []
        asked = [self.source.ask(index) for index in range(len(self.source))]
        for first in range(0, len(asked), self.data.definition.batch_size):
            check_stop()
            some = asked[first : first + self.data.definition.batch_size]
            questions = [question for question, _ in some]
            thoughts = reason(model, variables, questions, think, key, greedy)
            for (_, answer), thought in zip(some, thoughts, strict=True):
                said = thought.answer
                right.append(said is not None and said[-len(answer) :] == tuple(answer))
                finished.append(thought.finished)
                read.append([each.read for each in thought.rounds])
        return {
            "accuracy": float(np.mean(right)),
            "finished": float(np.mean(finished)),
            "rounds": float(np.mean([len(sizes) for sizes in read])),
            "peak_tokens": float(max(map(max, read))),
            "keys_attended": float(np.mean([attended(sizes) for sizes in read])),
        }
