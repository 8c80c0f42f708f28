"""`--method=pitome:keep=0.925,layers=(2,5,8)`: a method that makes a trained model cheaper, as typed."""

import ast
import dataclasses
from typing import Any

from effjax import tokens
from effjax.config import build_kind
from effjax.diffusion import caches
from effjax.errors import UsageError

# What reduces tokens, and what skips work between the steps of a sampler.
KINDS = {**tokens.KINDS, **caches.KINDS}


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
    """Reads `KIND` or `KIND:FIELD=VALUE,FIELD=VALUE`; values are Python literals or bare words.

    `macs=0.5` stands for the strength that leaves half of the network's MACs.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a value that the method refuses.
    """
    kind, _, given = spec.partition(":")
    fields = _fields(spec, given)
    macs = fields.pop("macs", None)
    if macs is not None:
        if not isinstance(macs, int | float):
            raise UsageError(f"--method={spec}: macs={macs!r} is no share: 0.5 leaves half of the work.")
        fields["keep"] = 0.5
    method = build_kind(KINDS, {"kind": kind, **fields}, f"--method={spec}")
    return Asked(spec, method, None if macs is None else float(macs))


def _fields(spec: str, given: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({given})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise UsageError(f"--method={spec} cannot be read. Example: --method=pitome:keep=0.925.")
    return {str(word.arg): _value(spec, word.value) for word in call.keywords}


def _value(spec: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UsageError(f"--method={spec}: '{ast.unparse(node)}' is no value.") from None
