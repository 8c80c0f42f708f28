"""Switch-DiT (Park et al. 2024): a DiT whose blocks have experts, chosen by the time.

    python -m experiments.train --config=configs/diffusion/switch_dit.py:VARIANT --workdir=runs/switch_dit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    2.17M parameters, the DiT of `dit.py:digits` with three experts a block: 1500 steps in 6.7 minutes of
    processor time, a held-out loss of 0.228 where the DiT has 0.229.
`s2`, `b2`, `l2`, `xl2`
    The published models, three experts and two chosen, on latents of ImageNet as in `dit.py`: 400k steps of
    batch 256 at a constant 1e-4. Not run here; the published code's table has an FID of 33.99, 16.21, 8.78
    and 8.76 at a guidance scale of 1.5, where DiT trained alike has 44.28, 27.96, 12.59 and 9.40.
"""

from ml_collections import ConfigDict

from configs.diffusion import dit

VARIANTS = ("smoke", "digits", "s2", "b2", "l2", "xl2")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the experiment of one variant: DiT's, with another block."""
    config = dit.get_config(variant)
    if variant == "smoke":
        del config.evaluators["samples"]
    config.model.block.kind = "switch_dit"
    config.model.block.experts = 3
    config.model.block.chosen = 2
    config.model.block.prior = 1.0
    return config
