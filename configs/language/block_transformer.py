"""Block Transformer (Ho et al. 2024, arXiv:2406.02657): attention over blocks below, within a block above.

    python -m experiments.train --config=configs/language/block_transformer.py:VARIANT --workdir=runs/blocks
    python -m experiments.generate --workdir=runs/blocks --prompt="Return the "

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    1.97M parameters in 2 + 2 layers, blocks of 4 bytes, and the 1000 steps of `lm.py:pydocs`.
`33m`, `77m`, `170m`, `420m`, `1b`, `1.4b`
    The main models of the paper in Pythia's blocks, half of the layers below and half above, on documents in
    `data/train.jsonl` with the tokenizer of `data/tokenizer.json`: 300 billion tokens. Not run here. The
    published code names them by their parameters without tables: 5, 19, 85, 300 and 800 million, 1.2 billion.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.language.lm import corpus, pydocs


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model: `depth` layers in each of the two stacks."""

    depth: int
    dim: int
    head_dim: int
    lr: float = 3e-3
    rows: int = 256
    vocab: int = 50_304
    length: int = 2048


SIZES = {
    "smoke": Size(1, 32, 8, vocab=256, length=64),
    "pydocs": Size(2, 192, 64, vocab=256, length=256),
    "33m": Size(3, 256, 32, 1e-3),
    "77m": Size(3, 512, 64, 1e-3),
    "170m": Size(6, 768, 64, 6e-4),
    "420m": Size(12, 1024, 64, 3e-4),
    "1b": Size(8, 2048, 128, 3e-4, 512),
    "1.4b": Size(12, 2048, 128, 2e-4, 512),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    if size.vocab == 256:
        config = pydocs(size.length, smoke=variant == "smoke")
    else:
        steps, warmup = (f"{rows // size.rows} steps" for rows in (572_000 * 256, 768_000))
        config = corpus(size.length, size.lr, warmup, steps, size.rows)
    decoder = dict(
        mixer=dict(
            kind="attention",
            heads=size.dim // size.head_dim,
            rotary_base=1e4,
            rotary_dims=size.head_dim // 4,
            causal=True,
        ),
        ffn=dict(kind="mlp", ratio=4.0),
        norm="layer",
        parallel="two_norms",
    )
    config.model = dict(
        kind="block_transformer",
        block_decoder=decoder,
        token_decoder=decoder,
        vocab=size.vocab,
        dim=size.dim,
        block_depth=size.depth,
        token_depth=size.depth,
        block_length=4,
        prefix=2,
        max_length=size.length,
        remat="full" if size.depth > 4 else "none",
        unroll=1 if size.depth > 4 else size.depth,
    )
    return config
