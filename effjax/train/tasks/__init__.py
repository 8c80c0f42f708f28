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

`means` are `Mean(total, count)` pairs, so that accumulated micro-batches and evaluation batches add up to
the figures of one large batch.
"""

from effjax.train.tasks.classification import Classification
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.language import Language
from effjax.train.tasks.pose import Pose

KINDS = {"classification": Classification, "diffusion": Diffusion, "language": Language, "pose": Pose}
