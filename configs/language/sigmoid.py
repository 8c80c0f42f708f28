"""Llama-style language models with sigmoid attention (Ramapuram et al. 2024, arXiv:2409.04431).

    python -m experiments.train --config=configs/language/sigmoid.py:VARIANT --workdir=runs/sigmoid

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    The model of `configs/language/lm.py:pydocs` with normalised queries and keys, and sigmoids for the
    softmax. Not run here.
`1b`
    That of `configs/language/lm.py:1b`, in rows of 2048 tokens. Not run here.
"""

from ml_collections import ConfigDict

from configs.language import lm

VARIANTS = ("smoke", "pydocs", "1b")
# Tokens of a row, of which the bias is the negative logarithm.
LENGTHS = {"smoke": 64, "pydocs": 256, "1b": 2048}


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, length = lm.SIZES[variant], LENGTHS[variant]
    config = lm.experiment(size, smoke=variant == "smoke")
    config.model.block.mixer.update(kind="sigmoid_attention", qk_norm=True, length=length)
    if length != size.max_length:
        config.update(lm.corpus(length))
        config.model.max_length = length
    return config
