"""Mamba (Gu and Dao 2023, arXiv:2312.00752): selective state spaces alone, no attention and no FFN.

    python -m experiments.train --config=configs/language/mamba.py:VARIANT --workdir=runs/mamba
    python -m experiments.generate --workdir=runs/mamba --prompt="Return the "

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    1.56M parameters, about as many as `configs/language/lm.py:pydocs`, and its 1000 steps. Not trained here
    yet.
`130m`, `370m`, `790m`, `1.4b`, `2.8b`
    The published models, on documents in `data/train.jsonl` with the tokenizer of `data/tokenizer.json`: 300
    billion tokens in batches of 0.5M. Not run here; on the Pile the authors report perplexities of 10.56,
    8.28, 7.33, 6.80 and 6.22.

Published weights come in with `python -m experiments.convert`, see docs/interop.md.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.language.lm import corpus, pydocs


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model, and five times the learning rate that GPT-3 had at that size."""

    depth: int
    dim: int
    lr: float = 0.0


# The paper's table 12 and its appendix E.2: two Mamba layers where GPT-3 has an attention and an FFN.
SIZES = {
    "smoke": Size(2, 32),
    "pydocs": Size(6, 192),
    "130m": Size(24, 768, 3e-3),
    "370m": Size(48, 1024, 1.5e-3),
    "790m": Size(48, 1536, 1.25e-3),
    "1.4b": Size(48, 2048, 1e-3),
    "2.8b": Size(64, 2560, 8e-4),
}
VARIANTS = tuple(SIZES)
VOCAB = 50_280
# The rate that all decay to.
LEAST = 1e-5


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    if size.lr:
        config = corpus(2048, lr=size.lr, warmup="1%", steps="572k steps")
        config.optimizer.schedule.end = LEAST / size.lr
    else:
        smoke = variant == "smoke"
        config = pydocs(64 if smoke else 256, smoke=smoke)
    config.model = dict(
        kind="lm",
        block=dict(mixer=dict(kind="mamba"), ffn=None, epsilon=1e-5),
        vocab=VOCAB if size.lr else 256,
        dim=size.dim,
        depth=size.depth,
        tied=True,
        remat="full" if size.lr else "none",
    )
    return config
