"""A language model that answers from its context, to judge by what caches and approximations lose.

    python -m experiments.train --config=configs/language/probes.py:needles --workdir=runs/needles
    python -m experiments.train --config=configs/language/probes.py:pairs --workdir=runs/pairs \\
        --config.train.start=runs/needles
    python -m experiments.train --config=configs/language/probes.py:probes --workdir=runs/probes \\
        --config.train.start=runs/pairs
    python -m experiments.evaluate --workdir=runs/probes --probes=recall,needle --lengths=64,128,256

Trained on recall and needle (`effjax.data.probes`) at once, first in short sequences, where there are few
places to look back at, and with more and more of the easiest recall, of three pairs: with much of it from the
start 2500 steps find neither (0.54 and 0.17). RMS norm, rotary positions, grouped queries, SwiGLU as in
`configs/language/lm.py`, with one difference: embeddings enter with the size of what the first layer adds to
them, not a tenth.

`smoke`
    20 steps of a toy: seconds.
`needles`
    0.60M parameters on up to 64 tokens, 900 steps: 0.92 of the needles, no recall (0.15). 1:39 minutes on 2
    CPU cores, compiling and evaluating included.
`pairs`
    From there 400 steps: 0.998 of both. 51 seconds.
`probes`
    From there 200 steps on up to 256 tokens, 53 seconds. Right answers on 256 unseen sequences each:

        tokens    64     128    256    512 (longer than any trained on)
        recall    1.000  1.000  1.000  0.997      16 pairs at 64 tokens, 31 from 128 on
        needle    1.000  1.000  0.995  0.945
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model and of its batches.

    Attributes:
      rows: of a batch.
      length: tokens of a row, and of the longest sequence.
      shortest: tokens of the shortest sequence of needle and recall.
      easy: of the rows, how many times as many ask recall of three pairs in 16 tokens as any other.
    """

    depth: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    rows: int
    length: int
    shortest: int
    easy: float
    steps: int


SIZES = {
    "smoke": Size(2, 32, 4, 2, 64, rows=16, length=32, shortest=32, easy=1.0, steps=20),
    "needles": Size(4, 128, 4, 2, 256, rows=32, length=64, shortest=32, easy=2.0, steps=900),
    "pairs": Size(4, 128, 4, 2, 256, rows=32, length=64, shortest=32, easy=6.0, steps=400),
    "probes": Size(4, 128, 4, 2, 256, rows=12, length=256, shortest=64, easy=1.0, steps=200),
}

VARIANTS = tuple(SIZES)
VOCAB, MAX_LENGTH = 64, 1024


def get_config(variant: str = "probes") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, smoke = SIZES[variant], variant == "smoke"
    every = "10 steps" if smoke else "50%"
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
                max_length=MAX_LENGTH,
                unroll=size.depth,
            ),
            task=dict(kind="language"),
            data=dict(
                source=dict(kind="probe_mixture", length=size.length, parts=parts(size), vocab=VOCAB),
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


def parts(size: Size) -> tuple[dict[str, Any], ...]:
    """Recall of three pairs, and recall and needle at each doubling of the shortest length.

    The longest needles have four answers a row, where recall has a hundred, and are drawn more often for it.
    """
    doublings = (size.length // size.shortest).bit_length()
    lengths = [size.shortest * 2**doubling for doubling in range(doublings)]
    easy = dict(task=dict(kind="recall", pairs=3), length=16, share=size.easy)
    recall = [dict(task=dict(kind="recall"), length=n) for n in lengths]
    needle = [dict(task=dict(kind="needle"), length=n, share=1.0) for n in lengths]
    needle[-1]["share"] = 1.5
    return (easy, *recall, *needle)


def unseen(kind: str, size: Size) -> dict[str, Any]:
    """Sequences that no training has seen.

    Those of recall are half as long: every question states a pair again, so that of a long one the latest
    tokens answer most.
    """
    length = size.length // 2 if kind == "recall" else size.length
    source = dict(kind="probe", task=dict(kind=kind), length=length, vocab=VOCAB, examples=128, seed=1)
    return dict(source=source, batch_size=size.rows, threads=0)
