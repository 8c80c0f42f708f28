"""Step caches: what a denoiser remembers of earlier steps, and does not compute again.

A cache is a frozen dataclass whose `wrap(stages, calls)` gives a denoiser with a memory; with a threshold of
zero it computes everything, bit for bit.
"""

from effjax.diffusion.caches.blockwise import BlockwiseCache
from effjax.diffusion.caches.stages import Stages
from effjax.diffusion.caches.taylor import ConfidenceTaylor

StepCache = ConfidenceTaylor | BlockwiseCache

KINDS = {"bac": BlockwiseCache, "cg_taylor": ConfidenceTaylor}

__all__ = ["KINDS", "BlockwiseCache", "ConfidenceTaylor", "Stages", "StepCache"]
