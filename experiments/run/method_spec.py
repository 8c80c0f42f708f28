"""`--method=pitome:keep=0.925,layers=(2,5,8)`: a method that makes a trained model cheaper, as typed."""

import dataclasses
from typing import Any

from effjax import tokens
from effjax.compress import methods
from effjax.config import build_kind
from effjax.decoding.gemfilter import GemFilter
from effjax.decoding.layer_plan import PLANS
from effjax.decoding.policies.kinds import POLICIES
from effjax.diffusion import caches
from effjax.errors import UsageError
from effjax.mixers.unified_softmax import UnifiedSoftmax
from experiments.run import kind_spec

# What reduces tokens, what skips work between the steps of a sampler, what leaves neurons out, and of what
# writes: what it keeps in its caches, how it sums over them, what it reads of a prompt, which layers it runs.
WRITING = {**POLICIES, **PLANS, "gemfilter": GemFilter, "unified_softmax": UnifiedSoftmax}
KINDS = {**tokens.KINDS, **caches.KINDS, **methods.KINDS, **WRITING}


@dataclasses.dataclass(frozen=True)
class Asked:
    """One `--method`.

    Attributes:
      label: what was typed.
      method: it; where `macs` is given, at a strength that does not matter.
      macs: the share of the MACs that it shall leave, from which its strength is solved; or None.
    """

    label: str
    method: Any
    macs: float | None = None


def parse(spec: str) -> Asked:
    """Reads `KIND` or `KIND:FIELD=VALUE,FIELD=VALUE`, see `kind_spec`.

    `macs=0.5` stands for the strength that leaves half of the network's MACs.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a value that the method refuses.
    """
    kind, fields = kind_spec.read("method", spec, "pitome:keep=0.925")
    macs = fields.pop("macs", None)
    if macs is not None:
        if not isinstance(macs, int | float):
            raise UsageError(f"--method={spec}: macs={macs!r} is no share: 0.5 leaves half of the work.")
        fields["keep"] = 0.5
    method = build_kind(KINDS, {"kind": kind, **fields}, f"--method={spec}")
    return Asked(spec, method, None if macs is None else float(macs))
