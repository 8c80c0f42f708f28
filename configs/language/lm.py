"""Llama-style language models: RMS norm, rotary positions, grouped queries, SwiGLU; packed documents.

    python -m experiments.train --config=configs/language/lm.py:VARIANT --workdir=runs/lm
    python -m experiments.generate --workdir=runs/lm --prompt="Return the "

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    1.62M parameters on 1.9 MB of bytes, 1000 steps of 4,096 tokens: 2.02 bits a byte on the held-out
    documents, after seven minutes on 2 CPU cores. Of the same text `gzip -9` makes 2.93 bits a byte; with the
    training text before it 2.81 (it looks back 32 kB), and `xz -9`, which looks back over all of that, 1.66.
`125m`, `1b`, `8b`
    Published shapes, on documents in `data/train.jsonl` with the tokenizer of `data/tokenizer.json`. Not run
    here.
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
    "pydocs": Size(4, 192, 3, 1, 512, 256, tied=True, rotary_base=1e4, max_length=256),
    "125m": Size(30, 576, 9, 3, 1536, 32_000, tied=True, rotary_base=1e4, max_length=2048),
    "1b": Size(16, 2048, 32, 8, 8192, 128_256, tied=True, rotary_base=5e5, max_length=8192),
    "8b": Size(32, 4096, 32, 8, 14_336, 128_256, tied=False, rotary_base=5e5, max_length=8192),
}


VARIANTS = tuple(SIZES)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    return experiment(SIZES[variant], smoke=variant == "smoke")


def experiment(size: Size, smoke: bool) -> ConfigDict:
    """A model of this shape, on documents of one's own where it has more tokens than there are bytes."""
    config = corpus(size.max_length) if size.vocab > 256 else pydocs(size.max_length, smoke=smoke)
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
        # A short stack gains a seventh from being unrolled on a CPU; a deep one would compile for minutes.
        unroll=1 if size.depth > 12 else size.depth,
    )
    return config


def pydocs(length: int, smoke: bool) -> ConfigDict:
    """The embedded documentation, byte by byte."""
    source = dict(kind="tfds", name="pydocs")
    packing = dict(length=length, tokenizer=dict(kind="bytes"))
    every = "10 steps" if smoke else "25%"
    return ConfigDict(
        dict(
            task=dict(kind="language", z_loss=0.0),
            data=dict(
                source=source | dict(split="train"),
                packing=packing,
                batch_size=8 if smoke else 16,
                cache=True,
            ),
            optimizer=dict(
                kind="adamw",
                lr=3e-3,
                b2=0.95,
                weight_decay=0.1,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%", end=0.1),
            ),
            train=dict(
                steps="20 steps" if smoke else "1000 steps",
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every=every,
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="test[:25%]" if smoke else "test"),
                        packing=packing,
                        batch_size=16,
                        cache=True,
                    ),
                    every=every,
                )
            ),
        )
    )


def corpus(
    length: int,
    lr: float = 3e-4,
    warmup: str = "2000 steps",
    steps: str = "200k steps",
    batch_size: int | None = None,
) -> ConfigDict:
    """Documents of one's own; by default about 0.5M tokens a step, 100 billion in all."""
    tokenizer = dict(kind="tokenizer_file", path="data/tokenizer.json")
    packing = dict(length=length, tokenizer=tokenizer)
    rows = 2**19 // length
    return ConfigDict(
        dict(
            task=dict(kind="language", z_loss=0.0),
            data=dict(
                source=dict(kind="jsonl", path="data/train.jsonl"),
                packing=packing,
                batch_size=rows if batch_size is None else batch_size,
                threads=8,
            ),
            optimizer=dict(
                kind="adamw",
                lr=lr,
                b2=0.95,
                weight_decay=0.1,
                clip=1.0,
                schedule=dict(kind="cosine", warmup=warmup, end=0.1),
            ),
            train=dict(
                steps=steps,
                precision=dict(compute="bfloat16"),
                log_every="100 steps",
                checkpoint_every="2000 steps",
            ),
            evaluators=dict(
                validation=dict(
                    kind="metrics",
                    data=dict(
                        source=dict(kind="jsonl", path="data/validation.jsonl"),
                        packing=packing,
                        batch_size=rows,
                        threads=8,
                    ),
                    every="2000 steps",
                )
            ),
        )
    )
