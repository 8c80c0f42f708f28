"""Llama-style language models.

    python -m experiments.train --config=configs/language/lm.py:pydocs --workdir=runs/pydocs

Variants: `smoke` (seconds, for tests), `pydocs` (bytes of Python's documentation), `125m`, `1b` and `8b`
(published shapes).
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; `heads` are query heads, `hidden` the channels of the FFN."""

    depth: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    tied: bool
    rotary_base: float
    max_length: int


# 125m: MobileLLM-125M, Liu et al. 2024, 124.6M parameters.
# 1b: Llama 3.2 1B, 1.24B parameters. Its model card stretches the rotary frequencies for 128k tokens; here
#     they are those of Llama 3, for the length that the stretching starts from.
# 8b: Llama 3 8B, Grattafiori et al. 2024, table 3, 8.03B parameters.
SIZES = {
    "smoke": Size(2, 32, 4, 2, 96, 256, tied=True, rotary_base=1e4, max_length=64),
    "pydocs": Size(4, 192, 6, 2, 512, 256, tied=True, rotary_base=1e4, max_length=256),
    "125m": Size(30, 576, 9, 3, 1536, 32_000, tied=True, rotary_base=1e4, max_length=2048),
    "1b": Size(16, 2048, 32, 8, 8192, 128_256, tied=True, rotary_base=5e5, max_length=8192),
    "8b": Size(32, 4096, 32, 8, 14_336, 128_256, tied=False, rotary_base=5e5, max_length=8192),
}


def get_config(variant: str = "smoke") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    config = ConfigDict()
    config.model = dict(
        kind="lm",
        block=dict(
            mixer=dict(
                kind="attention",
                heads=size.heads,
                kv_heads=size.kv_heads,
                qkv_bias=False,
                out_bias=False,
                rotary_base=size.rotary_base,
                causal=True,
            ),
            ffn=dict(kind="gated", hidden=size.hidden),
            epsilon=1e-5,
        ),
        vocab=size.vocab,
        dim=size.dim,
        depth=size.depth,
        tied=size.tied,
        max_length=size.max_length,
        remat="full" if size.depth > 12 else "none",
    )
    config.task = dict(kind="language", z_loss=0.0)
    return config
