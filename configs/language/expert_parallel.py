"""Mixtures whose tokens travel to their experts, whole or as means of similar ones: those of `moe.py`.

    python -m experiments.train --config=configs/language/expert_parallel.py:VARIANT --workdir=runs/experts
    python -m experiments.plan --config=configs/language/expert_parallel.py:VARIANT --topology=v5p:4x4x8

`smoke`
    20 steps of a toy on any number of devices: seconds.
`pydocs`
    8 experts of which a token takes 2, every token sent: `moe.py:pydocs`, on any number of devices. Not run
    here to its end.
`pydocs-lsh`
    Of the tokens for an expert a fifth travels, means of those that look alike (LSH-MoE). 1000 steps, 25
    minutes on two busy CPU cores: 2.305 bits a byte, where `moe.py:pydocs` has 1.916.
`mixtral-8x7b`, `mixtral-8x7b-unfolded`
    On 128 chips or more. Attention is cut over 2 devices by heads and 4 by sequence; experts over the same 8,
    one on each (folded), or over an axis of their own, for which attention is cut by heads alone. Not run
    here; `experiments.plan` says what either sends.

Not of the papers: batch, data and schedule, as in `moe.py`.
"""

from ml_collections import ConfigDict

from configs.language import moe

# The sizes are those of `moe.py`; what is changed of the mixture, of the mesh, and of the rules.
LAYOUTS: dict[str, tuple[str, dict, dict, dict]] = {
    "smoke": ("smoke", {"kind": "exchanged_mixture"}, {}, {}),
    "pydocs": ("pydocs", {"kind": "exchanged_mixture"}, {}, {}),
    "pydocs-lsh": ("pydocs", {"kind": "lsh_mixture", "rate": 0.2, "group": 1024}, {}, {}),
    "mixtral-8x7b": (
        "mixtral-8x7b",
        {"kind": "exchanged_mixture", "room": 1.25},
        {"data": 1, "fsdp": -1, "tensor": 2, "sequence": 4},
        {"expert": ("tensor", "sequence"), "expert_mlp": None},
    ),
    "mixtral-8x7b-unfolded": (
        "mixtral-8x7b",
        {"kind": "exchanged_mixture", "room": 1.25},
        {"data": 1, "fsdp": -1, "tensor": 2, "expert": 8},
        {},
    ),
}
VARIANTS = tuple(LAYOUTS)


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, mixture, mesh, rules = LAYOUTS[variant]
    config = moe.get_config(size)
    config.model.block.ffn.update(mixture)
    config.mesh = ConfigDict(mesh)
    config.sharding = ConfigDict(rules)
    return config
