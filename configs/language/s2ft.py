"""S2FT (Yang et al. 2024, arXiv:2412.06289): a few heads and hidden channels of a trained model are tuned.

    python -m experiments.train --config=configs/language/lm.py:pydocs --workdir=runs/lm
    python -m experiments.train --config=configs/language/s2ft.py:pydocs --config.train.start=runs/lm \\
        --workdir=runs/s2ft

`smoke`
    20 steps of a toy, from nothing: seconds.
`pydocs`
    The model of `configs/language/lm.py:pydocs`: one of three heads and a tenth of the hidden channels of
    each layer, 88,320 numbers.
`pydocs-lora`
    Low-rank adapters of 88,064 numbers instead, to compare with.
`pydocs-full`
    All numbers, to compare with.

The authors' scripts tune 3 of 100 channels of Llama's perceptrons and no head, with rates of 2e-4 and 1e-3,
linearly to nothing after 100 steps of warm-up, and no decay. Rates and steps here are ours.
"""

from ml_collections import ConfigDict

from configs.language import lm

VARIANTS = ("smoke", "pydocs", "pydocs-lora", "pydocs-full")


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = lm.get_config(variant.split("-")[0])
    config.optimizer.weight_decay = 0.0
    if variant == "pydocs-lora":
        config.task = ConfigDict(dict(kind="low_rank", rank=8, alpha=16.0))
        config.optimizer.freeze = ("(?!adapters/).*",)
    elif variant != "pydocs-full":
        heads = 0.25 if variant == "smoke" else 0.33
        shares = ((".*/mixer/output/kernel", heads), (".*/ffn/contract/kernel", 0.1))
        config.task = ConfigDict(dict(kind="structured_sparse", shares=shares))
        config.optimizer.freeze = ("(?!changes/).*",)
    if variant != "smoke":
        config.optimizer.lr = 3e-4 if variant == "pydocs-full" else 1e-3
        config.train.steps = "200 steps"
    return config
