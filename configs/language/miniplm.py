"""MiniPLM (Gu et al., ICLR 2025): pre-training on the text that a large model knows and a small one does not.

    python -m experiments.train --config=configs/language/lm.py:pydocs --workdir=runs/large
    python -m experiments.train --config=configs/language/miniplm.py:pydocs-reference --workdir=runs/reference
    python -m experiments.score_text --config=configs/language/miniplm.py:pydocs --workdir=runs/large \\
        --reference=runs/reference --out=runs/scores.npz
    python -m experiments.train --config=configs/language/miniplm.py:pydocs --workdir=runs/student

`smoke`
    20 steps of the student on all of the text: seconds.
`pydocs-reference`
    The small model, 0.10M parameters in 2 layers of width 64.
`pydocs`
    The student, 0.32M parameters in 3 layers of width 96, on half of the text: 7 minutes, perplexity 4.365.
`pydocs-drawn`, `pydocs-all`
    The same on a half that is drawn, and on all of it: 4.431 and 4.500.

`--config.data.source.scores=FILE` names other scores, `--config.data.source.share=0.3` keeps less.
"""

from ml_collections import ConfigDict

from configs.language.lm import Size, experiment

REFERENCE = Size(2, 64, 2, 1, 176, 256, tied=True, rotary_base=1e4, max_length=256)
STUDENT = Size(3, 96, 3, 1, 256, 256, tied=True, rotary_base=1e4, max_length=256)
VARIANTS = ("smoke", "pydocs", "pydocs-drawn", "pydocs-all", "pydocs-reference")


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = experiment(REFERENCE if variant == "pydocs-reference" else STUDENT, smoke=variant == "smoke")
    if variant in ("pydocs", "pydocs-drawn"):
        source = config.data.source.to_dict()
        config.data.source = dict(kind="chosen", source=source, scores="runs/scores.npz", share=0.5)
    if variant == "pydocs-drawn":
        config.data.source.drawn = 0
    return config
