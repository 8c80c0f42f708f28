"""What a model is trained to do. The loop knows only these functions, no model and no family.

A task is a frozen dataclass that holds its model, with pure functions:

    init(key, batch) -> variables
        parameters and other collections, with their axis names
    prepare(batch, key) -> batch
        randomness across examples (mixing, noise, time steps), drawn once on the whole batch before it is cut
        for accumulation
    loss(variables, batch, key) -> (means, collections)
        in train mode; `means["loss"]` is what is minimised
    metrics(variables, batch) -> means
        in evaluation; rows whose `mask` is 0 do not count
    finish(values) -> values
        figures that follow from averages, such as a perplexity

and where not all variables are the model's own

    training_only
        names at the top of the parameters, and collections, that the trained model works without
    frozen
        collections that start from a folder and stay as they are: `{name: folder}`
    inherit(shapes, collections, batches) -> params
        parameters that start from what these collections hold, of those with such shapes; `batches()` are
        those of training
    measured, measure(variables, batches) -> collections
        names of collections that no folder holds, and how they are found on what it does hold
    tuned(variables) -> variables
        what the trained model works with, where other parameters are trained

`means` are `Mean(total, count)` pairs, so that accumulated micro-batches and evaluation batches add up to
the figures of one large batch.
"""

from collections.abc import Mapping
from typing import Any

from effjax.train.tasks.alignment import Alignment
from effjax.train.tasks.autoencoding import Autoencoding
from effjax.train.tasks.boundaries import Boundaries
from effjax.train.tasks.classification import Classification
from effjax.train.tasks.dense2moe import Dense2MoE
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.distillation import Distillation
from effjax.train.tasks.grafting import Grafting
from effjax.train.tasks.in_context import InContext
from effjax.train.tasks.language import Language
from effjax.train.tasks.layer_routing import LayerRouting
from effjax.train.tasks.low_rank import LowRank
from effjax.train.tasks.pose import Pose
from effjax.train.tasks.stitching import Stitching
from effjax.train.tasks.structured_sparse import StructuredSparse

KINDS = {
    "alignment": Alignment,
    "autoencoding": Autoencoding,
    "boundaries": Boundaries,
    "classification": Classification,
    "dense2moe": Dense2MoE,
    "diffusion": Diffusion,
    "distillation": Distillation,
    "grafting": Grafting,
    "in_context": InContext,
    "language": Language,
    "layer_routing": LayerRouting,
    "low_rank": LowRank,
    "pose": Pose,
    "stitching": Stitching,
    "structured_sparse": StructuredSparse,
}


def served(task: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that the trained model works with, by collection, of all those of a task."""
    names = getattr(task, "training_only", ())
    kept = {name: value for name, value in variables.items() if name not in names}
    params = variables["params"]
    return {**kept, "params": {name: params[name] for name in params if name not in names}} if names else kept
