"""TokenFormer (Wang et al. 2024, arXiv:2410.23168): projections are attentions to parameter tokens.

    python -m experiments.train --config=configs/language/tokenformer.py:VARIANT --workdir=runs/tokenformer

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    1.62M parameters, as many as `configs/language/lm.py:pydocs`, and its 1000 steps. Not run here to the end.
`124m`, `354m`, `757m`, `1.4b`
    The models that grow into one another, 12 layers of 768 channels, on documents in `data/train.jsonl` with
    the tokenizer of `data/tokenizer.json`: 600k steps of 0.5M tokens for the first, a fifth of that for each
    that grew out of the one before. `effjax.compress.tokenformer` makes one out of the other.
`owt2-354m`, `owt2-757m`
    The published settings of the same experiment on OpenWebText2, with 24 layers of 1024 channels.
`150m`, `450m`, `900m`, `1.5b`
    The models trained by themselves on the Pile, 143k steps of 2M tokens.

The large ones were not run here. All orders, sizes and rates are those of the published code; only the
parameter tokens of `757m` and `1.4b` are not in it.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.language.lm import corpus, pydocs


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model: `slots` parameter tokens for a projection, four times as many for the FFN."""

    depth: int
    dim: int
    heads: int
    slots: int
    vocab: int = 50_304
    length: int = 1024
    steps: str = "600k steps"
    rotary: bool = True


SIZES = {
    "smoke": Size(2, 32, 4, 24, 256, 64),
    "pydocs": Size(4, 192, 3, 128, 256, 256),
    "124m": Size(12, 768, 12, 576, rotary=False),
    "354m": Size(12, 768, 12, 2140, steps="120k steps", rotary=False),
    "757m": Size(12, 768, 12, 4850, steps="120k steps", rotary=False),
    "1.4b": Size(12, 768, 12, 8620, steps="120k steps", rotary=False),
    "owt2-354m": Size(24, 1024, 16, 768),
    "owt2-757m": Size(24, 1024, 16, 1792, steps="60k steps"),
    "150m": Size(12, 768, 12, 768, length=2048, steps="143k steps"),
    "450m": Size(24, 1024, 16, 1024, length=2048, steps="143k steps"),
    "900m": Size(32, 1280, 16, 1280, length=2048, steps="143k steps"),
    "1.5b": Size(40, 1536, 16, 1536, length=2048, steps="143k steps"),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    if size.vocab == 256:
        config = pydocs(size.length, smoke=variant == "smoke")
    else:
        rows = 1024 if size.length == 2048 else None
        config = corpus(size.length, lr=6e-4, warmup="1%", steps=size.steps, batch_size=rows)
    config.model = model(size)
    return config


def model(size: Size) -> dict:
    """The model's section."""
    # Value tokens start smaller in a deep model: Wang and Komatsuzaki's rule, as the published settings say.
    value_stddev = 2 / size.depth / size.dim**0.5
    mixer = dict(
        kind="token_parameter_attention",
        heads=size.heads,
        slots=size.slots,
        value_stddev=value_stddev,
        causal=True,
    )
    if size.rotary:
        mixer |= dict(rotary_base=1e4, rotary_dims=size.dim // size.heads // 4)
    return dict(
        kind="lm",
        block=dict(
            mixer=mixer,
            ffn=dict(kind="pattention", slots=4 * size.slots, value_stddev=value_stddev),
            norm="layer_plain",
            epsilon=1e-5,
        ),
        vocab=size.vocab,
        dim=size.dim,
        depth=size.depth,
        tied=True,
        max_length=size.length,
        last_norm="layer",
        remat="full" if size.depth > 4 else "none",
        unroll=1 if size.depth > 4 else size.depth,
    )
