"""What may make writing cheaper: a draft, fewer tokens of a prompt, smaller caches, a softmax in parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from effjax.config import build_kind
from effjax.decoding.gemfilter import GemFilter
from effjax.decoding.policies.kinds import POLICIES
from effjax.decoding.policies.policy import Policy
from effjax.errors import UsageError
from effjax.mixers.unified_softmax import UnifiedSoftmax
from experiments.run import kind_spec
from experiments.run.drafting import Drafting

METHODS: dict[str, Any] = {"gemfilter": GemFilter, "unified_softmax": UnifiedSoftmax, **POLICIES}


@dataclasses.dataclass(frozen=True)
class Shortcuts:
    """Each may be left out.

    Attributes:
      drafting: who proposes tokens.
      gems: which tokens of a prompt are read.
      cache: which tokens the caches keep.
      softmax: how the keys that are kept are summed over.
    """

    drafting: Drafting | None = None
    gems: GemFilter | None = None
    cache: Policy | None = None
    softmax: UnifiedSoftmax | None = None

    @staticmethod
    def of(specs: Sequence[str], drafting: Drafting | None = None) -> "Shortcuts":
        """Reads every `--method=gemfilter:layer=2,keep=64` or `--method=window:budget=64`.

        Raises:
          UsageError: for what cannot be read, an unknown kind or field, a value that the method refuses, or
            two methods for the same thing.
        """
        made: dict[str, Any] = {}
        for spec in specs:
            kind, fields = kind_spec.read("method", spec, "window:budget=64")
            method = build_kind(METHODS, {"kind": kind, **fields}, f"--method={spec}")
            place = {GemFilter: "gems", UnifiedSoftmax: "softmax"}.get(type(method), "cache")
            if place in made:
                raise UsageError(f"--method={spec}: another method says that already. Leave one of them out.")
            made[place] = method
        return Shortcuts(drafting, **made)

    def model(self, model: Any) -> Any:
        """The model with its caches and its softmax.

        Raises:
          UsageError: for one that has no such caches, or no softmax.
        """
        model = model if self.softmax is None else self.softmax.applied(model)
        if self.cache is None:
            return model
        if not hasattr(model, "cache"):
            raise UsageError(f"{type(model).__name__} has no caches that a policy could be told to keep.")
        return model.clone(cache=self.cache)
