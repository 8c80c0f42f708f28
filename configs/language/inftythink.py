"""InftyThink on a running sum of 10 times the context: long reasoning in rounds, and in one context.

    python -m experiments.train --config=configs/language/inftythink.py:VARIANT --workdir=runs/rounds

`smoke`
    20 steps of a toy: seconds.
`sum`
    0.09M parameters, rows of 30 tokens, sums of up to 160 steps, whose reasoning has 322: in rounds of 20.
    All of 128 questions are answered rightly, with at most 30 tokens in a cache.
`sum-whole`
    The same model on the beginnings of the same reasoning, as many tokens of it as its context holds; asked,
    it writes all of it in one context, past the length it was trained on. None of 128 comes to an end.

The evaluator `rounds` gives the share of right answers to questions of 144 to 160 steps, and the most tokens
that a cache held. With documents of one's own: `source=dict(kind="traces", path="data/traces.jsonl", ...)`.
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model, and of the questions."""

    depth: int
    dim: int
    heads: int
    eta: int
    steps: int
    questions: int
    train: str
    whole: bool = False


SIZES = {
    "smoke": Size(1, 16, 2, 4, 6, 4, "20 steps"),
    "sum": Size(2, 64, 2, 20, 160, 128, "1000 steps"),
    "sum-whole": Size(2, 64, 2, 20, 160, 128, "1000 steps", whole=True),
}

VARIANTS = tuple(SIZES)


def get_config(variant: str = "sum") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, smoke = SIZES[variant], variant == "smoke"
    # A question has 4 tokens, a summary 2, and each is behind a mark.
    length = 4 + 3 + size.eta + 3
    think = dict(eta=size.eta, summary=2, rounds=20)
    if size.whole:  # and the answer has 2
        think = dict(eta=2 * size.steps + 2, summary=2, rounds=1)
    source = dict(kind="running_sum", length=length, think=think, steps=size.steps, cut=size.whole)
    asked = dict(least=size.steps * 9 // 10, examples=size.questions, seed=1)
    every = "10 steps" if smoke else "50%"
    return ConfigDict(
        dict(
            model=dict(
                kind="lm",
                block=dict(
                    mixer=dict(
                        kind="attention",
                        heads=size.heads,
                        qkv_bias=False,
                        out_bias=False,
                        rotary_base=1e4,
                        causal=True,
                    ),
                    ffn=dict(kind="gated", hidden=2 * size.dim),
                ),
                vocab=4 + size.steps + 1 + 10,
                dim=size.dim,
                depth=size.depth,
                tied=True,
                max_length=length,
                unroll=size.depth,
            ),
            task=dict(kind="language"),
            data=dict(source=source | dict(least=size.steps // 2), batch_size=16 if smoke else 64, threads=1),
            optimizer=dict(
                kind="adamw",
                lr=3e-3,
                b2=0.95,
                weight_decay=0.0,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%", end=0.0),
            ),
            train=dict(
                steps=size.train,
                log_every="5 steps" if smoke else "100 steps",
                checkpoint_every=every,
            ),
            evaluators=dict(
                test=dict(kind="metrics", data=dict(source=source | asked, batch_size=32), every=every),
                rounds=dict(kind="rounds", data=dict(source=source | asked, batch_size=64), every=every),
            ),
        )
    )
