"""What is measured while training, each kind a frozen dataclass of the config.

An evaluator has `data`, `every` (a duration) and `ema` (whether it takes the averaged weights), and

    open(read) -> evaluation
        opens its data, before the run compiles
    evaluation(program, variables, check_stop) -> {name: number}
        what it measures; keeps what it needs again

`read(folder, shapes, of)` gives the weights in a folder, `check_stop()` is called between batches and raises
where the run was told to stop.
"""

from effjax.train.evaluators.metrics import Metrics
from effjax.train.evaluators.rounds import Rounds
from effjax.train.evaluators.samples import Samples

KINDS = {"metrics": Metrics, "rounds": Rounds, "samples": Samples}
