"""Mixture-of-Transformers (Liang et al. 2024, arXiv:2411.04996): weights for each modality, one attention.

    python -m experiments.train --config=configs/language/mixture_of_transformers.py:VARIANT \\
        --workdir=runs/mot

`smoke`
    20 steps of a toy on the digits that scikit-learn ships, each spelled out: its name in letters and its
    8 x 8 pixels as bytes from 128 on, in turn one and the other first. Seconds.
`digits`
    The same text, 1.35M parameters: 500 steps of 2,304 tokens.
`37m`, `94m`, `443m`, `880m`, `1.5b`, `7b`
    The sizes of the paper's Chameleon setting with weights for text and for images, on documents in
    `data/train.jsonl` with the tokenizer of `data/tokenizer.json`, whose last 8,192 tokens are images. Named
    by the dense model that does the same work. Not run here.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.language.lm import corpus, pydocs


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model."""

    depth: int
    dim: int
    heads: int
    hidden: int
    vocab: int = 65_536
    first_image: int = 57_344
    length: int = 4096


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The FFN is as wide as the published code makes it: 8/3 of the width, up to the next multiple of 256.
SIZES = {
    "smoke": Size(2, 32, 2, 96, 256, 128, 64),
    "digits": Size(3, 128, 4, 384, 256, 128, 144),
    "37m": Size(4, 256, 4, 768),
    "94m": Size(8, 512, 8, 1536),
    "443m": Size(24, 1024, 16, 2816),
    "880m": Size(24, 1536, 24, 4096),
    "1.5b": Size(24, 2048, 16, 5632),
    "7b": Size(32, 4096, 32, 11_008),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the experiment of one variant."""
    size = SIZES[variant]
    config = digits(size.length, variant) if size.vocab == 256 else corpus(size.length)
    config.model = model(size)
    return config


def digits(length: int, variant: str) -> ConfigDict:
    """Digits as text."""
    config = pydocs(length, smoke=variant == "smoke")
    source = dict(kind="spelled_pictures", name="digits", words=WORDS)
    config.data.source = ConfigDict(source | dict(split="train"))
    config.evaluators.test.data.source = ConfigDict(source | dict(split="test"))
    if variant == "digits":
        config.train.steps = "500 steps"
    return config


def model(size: Size) -> dict:
    """The model's section."""
    return dict(
        kind="mixture_of_transformers",
        block=dict(
            mixer=dict(
                kind="modal_attention",
                modalities=2,
                heads=size.heads,
                qk_norm=True,
                qk_norm_epsilon=1e-5,
                rotary_base=1e4,
                causal=True,
            ),
            ffn=dict(kind="modal_gated", modalities=2, hidden=size.hidden),
            norm_at="after",
            epsilon=1e-5,
        ),
        first=(size.first_image,),
        vocab=size.vocab,
        dim=size.dim,
        depth=size.depth,
        max_length=size.length,
        remat="full" if size.depth > 8 else "none",
        unroll=1 if size.depth > 4 else size.depth,
    )
