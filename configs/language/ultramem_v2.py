"""UltraMemV2 (Huang et al. 2025, arXiv:2508.18756): a memory of product keys beside the FFN of every block.

    python -m experiments.train --config=configs/language/ultramem_v2.py:VARIANT --workdir=runs/memory
    python -m experiments.generate --workdir=runs/memory --prompt="Return the "

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    2.95M parameters, 1.08M of them in tables of which a token reads 0.8%, with the 1000 steps of
    `configs/language/lm.py:pydocs`.
`1.2b`
    The published settings with 227M activated of 1.2 billion parameters, on documents in `data/train.jsonl`
    with the tokenizer of `data/tokenizer.json`: 500 billion tokens. Not run here.

The slots of all layers are one pool, and each layer has keys for half of it, as in the published settings.
The tables learn four times as fast, as there; the factor falls to one by the end of the published run.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from configs.language.lm import corpus, pydocs


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model: `rows^2` slots for each layer, of which a token reads `chosen`."""

    depth: int
    dim: int
    heads: int
    hidden: int
    rows: int
    chosen: int
    key_dim: int
    value_dim: int
    vocab: int = 50_304
    length: int = 4096


SIZES = {
    "smoke": Size(2, 32, 2, 48, 8, 4, 16, 16, 256, 64),
    "pydocs": Size(4, 192, 3, 416, 46, 16, 64, 64, 256, 256),
    "1.2b": Size(20, 768, 12, 2496, 360, 32, 192, 192),
}
VARIANTS = tuple(SIZES)

# Of the slots of all layers together, which are one pool, those that a layer has keys for.
SHARE = 0.5


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    if size.vocab == 256:
        config = pydocs(size.length, smoke=variant == "smoke")
    else:
        config = corpus(size.length, lr=4e-4, warmup="3179 steps", steps="158_946 steps", batch_size=768)
    config.optimizer.learning_rate = ((".*/ffn/(inputs|values)", 4.0),)
    config.model = dict(
        kind="lm",
        block=dict(
            mixer=dict(
                kind="attention",
                heads=size.heads,
                qkv_bias=False,
                out_bias=False,
                qk_norm=True,
                qk_norm_over="width",
                qk_norm_epsilon=1e-5,
                rotary_base=1e4,
                causal=True,
            ),
            ffn=dict(
                kind="memory",
                rows=math.isqrt(round(SHARE * size.depth * size.rows**2)),
                pool=size.depth * size.rows**2,
                stride=size.rows**2,
                chosen=size.chosen,
                key_dim=size.key_dim,
                value_dim=size.value_dim,
                read_dim=size.value_dim,
                hidden=size.hidden,
                initial=0.1 / size.depth**0.5,
            ),
            epsilon=1e-5,
        ),
        vocab=size.vocab,
        dim=size.dim,
        depth=size.depth,
        tied=True,
        max_length=size.length,
        shared=("ffn/(inputs|values)",),
        remat="full" if size.depth > 12 else "none",
        unroll=1 if size.depth > 12 else size.depth,
    )
    return config
