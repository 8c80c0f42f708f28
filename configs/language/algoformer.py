"""AlgoFormer: a looped transformer with a part before and one behind the loop, on in-context regression.

    python -m experiments.train --config=configs/language/algoformer.py:VARIANT --workdir=runs/algoformer
    python -m experiments.train --config=configs/language/algoformer.py:regression \
        --config.model.pre=0 --config.model.loop=3 --config.model.post=0 --workdir=runs/looped
    python -m experiments.train --config=configs/language/algoformer.py:regression \
        --config.model.pre=3 --config.model.loop=0 --config.model.post=0 --workdir=runs/standard

`smoke`
    20 steps of a toy: seconds.
`regression`
    0.16M parameters on 4 dimensions behind a representation of two layers. Not trained to its end here.
`regression-d20`, `autoregression-d20`
    256 channels, 8 heads and 20 dimensions, as the published code of the looped transformer; T = 20 and a
    window of 15 were not checked against the paper. Not run here. A curriculum on dimensions and prompt
    lengths, which that code has, is left out.
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model, and of the prompts it is trained on."""

    dim: int
    heads: int
    iterations: int
    window: int
    dims: int
    examples_per_prompt: int
    layers: int
    batch_size: int
    steps: str
    lr: float
    order: int | None = None


SIZES = {
    "smoke": Size(16, 2, 3, 2, 2, 8, 1, 128, "20 steps", 1e-2),
    "regression": Size(64, 4, 8, 5, 4, 16, 2, 64, "2000 steps", 2e-3),
    "regression-d20": Size(256, 8, 20, 15, 20, 41, 4, 64, "500k steps", 1e-4),
    "autoregression-d20": Size(256, 8, 20, 15, 20, 41, 3, 64, "500k steps", 1e-4, order=3),
}

VARIANTS = tuple(SIZES)


def get_config(variant: str = "regression") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, smoke = SIZES[variant], variant == "smoke"
    prompts = dict(
        kind="in_context_regression" if size.order is None else "in_context_autoregression",
        dims=size.dims,
        examples_per_prompt=size.examples_per_prompt,
        layers=size.layers,
    )
    if size.order is not None:
        prompts["order"] = size.order
    every = "10 steps" if smoke else "25%"
    return ConfigDict(
        dict(
            model=dict(
                kind="algoformer",
                block=dict(
                    mixer=dict(kind="attention", heads=size.heads, causal=True),
                    ffn=dict(kind="mlp", activation="gelu_tanh"),
                    norm="layer",
                ),
                dim=size.dim,
                outputs=1 if size.order is None else size.dims,
                iterations=size.iterations,
                window=size.window,
                position_table=2 * size.examples_per_prompt,
            ),
            task=dict(kind="in_context"),
            data=dict(source=prompts, batch_size=size.batch_size),
            optimizer=dict(
                kind="adamw",
                lr=size.lr,
                weight_decay=0.0,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%", end=0.0),
            ),
            train=dict(
                steps=size.steps,
                log_every="5 steps" if smoke else "100 steps",
                checkpoint_every=every,
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=prompts | dict(examples=64 if smoke else 2048, seed=1),
                        batch_size=size.batch_size,
                    ),
                    every=every,
                )
            ),
        )
    )
