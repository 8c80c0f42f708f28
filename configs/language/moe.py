"""Mixture-of-experts language models: those of `lm.py` with experts in the place of the FFN.

    python -m experiments.train --config=configs/language/moe.py:VARIANT --workdir=runs/moe

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    8 experts of which a token takes 2, each with half the channels of the FFN of `lm.py:pydocs`: 5.17M
    parameters, of which a token meets 1.63M. 1000 steps, ten minutes of CPU time: 1.916 bits a byte on the
    held-out documents.
`pydocs-dense`
    Its dense twin, `lm.py:pydocs`: as many multiply-accumulates a token, but for the routers' 0.3%. 2.016
    bits a byte.
`mixtral-8x7b`
    Jiang et al. 2024, table 1: 46.7B parameters, 12.9B active. Not run here.
`olmoe-1b-7b`
    Muennighoff et al. 2024: 6.9B parameters, 1.3B active, of 64 small experts 8. Not run here.

No token is dropped. The large ones are trained on documents in `data/train.jsonl` with the tokenizer of
`data/tokenizer.json`, in batches and for a time that are our own.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.language.lm import SIZES as DENSE
from configs.language.lm import Size, experiment


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of a model: of `experts` a token takes `chosen`, each with `hidden` channels."""

    experts: int
    chosen: int
    hidden: int
    normalised: bool = True
    balance: float = 0.01
    z_loss: float = 0.0


# Shapes: transformers' configurations of these names. Mixtral's losses are not published; its balance is the
# default there.
SIZES = {
    "smoke": (DENSE["smoke"], Experts(4, 2, 48)),
    "pydocs": (DENSE["pydocs"], Experts(8, 2, 256)),
    "pydocs-dense": (DENSE["pydocs"], None),
    "mixtral-8x7b": (
        Size(32, 4096, 32, 8, 14_336, 32_000, tied=False, rotary_base=1e6, max_length=32_768),
        Experts(8, 2, 14_336, balance=0.001),
    ),
    "olmoe-1b-7b": (
        Size(16, 2048, 16, 16, 1024, 50_304, tied=False, rotary_base=1e4, max_length=4096),
        Experts(64, 8, 1024, normalised=False, z_loss=0.001),
    ),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, experts = SIZES[variant]
    config = experiment(size, smoke=variant == "smoke")
    if experts is not None:
        config.model.block.ffn = ConfigDict(dict(kind="mixture", **dataclasses.asdict(experts)))
    if variant == "olmoe-1b-7b":
        config.model.block.mixer.update(qk_norm=True, qk_norm_over="width", qk_norm_epsilon=1e-5)
    return config
