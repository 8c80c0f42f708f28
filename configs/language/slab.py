"""SLAB (Guo et al. 2024, arXiv:2405.11582) in language models: RMS norms that fold away after training.

    python -m experiments.train --config=configs/language/slab.py:VARIANT --workdir=runs/slab

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`350m`
    The authors' LLaMA-350M, on documents in `data/train.jsonl` with the tokenizer of `data/tokenizer.json`.
    Not run here; they report a mean accuracy of 49.78% in nine tasks, where the RMS norm has 49.32%, and 50.4
    tokens a second instead of 44.0. Data, batch and learning rate are not published: these are our own.

While training, a norm's mean and variance are those of all tokens of the batch, later ones too: only in
evaluation does no token see the future. `effjax.compress.slab.fold_norms` folds what was trained.
"""

from ml_collections import ConfigDict

from configs.language.lm import Size, experiment

SIZES = {
    "smoke": Size(2, 32, 4, 4, 96, 256, tied=True, rotary_base=1e4, max_length=64),
    "350m": Size(18, 1024, 8, 8, 4096, 32_000, tied=False, rotary_base=1e4, max_length=2048),
}
# Passes with the RMS norm alone, and from there on until it is gone. The published code counts one pass in
# 16; here there is one a step.
PASSES = {"smoke": (5, 30), "350m": (10_000, 18_000)}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "smoke") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = experiment(SIZES[variant], smoke=variant == "smoke")
    warmup, steps = PASSES[variant]
    config.model.block.epsilon = 1e-6
    config.model.block.norm = ConfigDict(progressive(steps, warmup))
    return config


def progressive(steps: int, warmup: int) -> dict:
    """PRepBN as language models have it: from an RMS norm to a batch norm that starts from zero."""
    return dict(kind="progressive", before="rms", steps=steps, warmup=warmup, initial=0.0, batch_epsilon=1e-6)
