"""A language model that answers from its context, to judge by what caches and approximations lose.

    python -m experiments.train --config=configs/language/probes.py:VARIANT --workdir=runs/probes
    python -m experiments.evaluate --workdir=runs/probes --probes=recall,needle --lengths=64,128,256

Trained on recall and needle (`effjax.data.probes`) at once, from 16 tokens to 256: at 256 alone the heads
that look back do not form in this time, with short sequences among them they do, and serve the long ones.
RMS norm, rotary positions, grouped queries, SwiGLU as in `configs/language/lm.py`, with one difference that
the heads need to form soon: embeddings enter with the size of what the first layer adds to them, not a tenth.

`smoke`
    20 steps of a toy: seconds.
`probes`
    0.60M parameters.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model and of its batches: `length` tokens in each of `rows`."""

    depth: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    length: int
    rows: int
    steps: int


SIZES = {
    "smoke": Size(2, 32, 4, 2, 64, 32, 16, 20),
    "probes": Size(4, 128, 4, 2, 256, 256, 12, 1600),
}

VARIANTS = tuple(SIZES)
VOCAB = 64


def get_config(variant: str = "probes") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, smoke = SIZES[variant], variant == "smoke"
    every = "10 steps" if smoke else "10%"
    return ConfigDict(
        dict(
            model=dict(
                kind="lm",
                block=dict(
                    mixer=dict(
                        kind="attention",
                        heads=size.heads,
                        kv_heads=size.kv_heads,
                        qkv_bias=False,
                        out_bias=False,
                        rotary_base=1e4,
                        causal=True,
                    ),
                    ffn=dict(kind="gated", hidden=size.hidden),
                ),
                vocab=VOCAB,
                dim=size.dim,
                depth=size.depth,
                embedding_scale=12.0,
                max_length=4 * size.length,
                unroll=size.depth,
            ),
            task=dict(kind="language"),
            data=dict(
                source=dict(kind="probe_mixture", length=size.length, parts=parts(size.length), vocab=VOCAB),
                batch_size=size.rows,
                threads=1,
            ),
            optimizer=dict(
                kind="muon",
                lr=1e-2,
                weight_decay=0.01,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%", end=0.05),
            ),
            train=dict(
                steps=f"{size.steps} steps",
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every=every,
            ),
            evaluators={
                kind: dict(kind="metrics", data=unseen(kind, size), every=every)
                for kind in ("recall", "needle")
            },
        )
    )


def parts(longest: int) -> tuple[dict[str, Any], ...]:
    """What is asked at 16 tokens, 32, 64 and so on to the longest.

    The longest needles have four answers a row, where recall has a hundred, and are drawn more often for it.
    """
    lengths = [2**power for power in range(5, longest.bit_length())]
    shortest = dict(task=dict(kind="recall", pairs=3), length=16)
    recall = [dict(task=dict(kind="recall"), length=n, share=1.5 if n == 64 else 1.0) for n in lengths]
    needle = [dict(task=dict(kind="needle"), length=n, share=1.5 if n == longest else 1.0) for n in lengths]
    return (shortest, *recall, *needle)


def unseen(kind: str, size: Size) -> dict[str, Any]:
    """Sequences of the longest length that no training has seen."""
    source = dict(kind="probe", task=dict(kind=kind), length=size.length, vocab=VOCAB, examples=128, seed=1)
    return dict(source=source, batch_size=size.rows, threads=0)
