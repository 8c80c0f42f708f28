"""`KIND:FIELD=VALUE,FIELD=VALUE` as typed in a flag, such as `pitome:keep=0.925,layers=(2,5,8)`."""

import ast
from typing import Any

from effjax.errors import UsageError


def read(flag: str, spec: str, example: str) -> tuple[str, dict[str, Any]]:
    """The kind and its fields; values are Python literals, bare words, or kinds themselves: `plain()`.

    Args:
      flag: that it was typed behind, for messages.
      spec: what was typed.
      example: of what can be, for messages.

    Raises:
      UsageError: for what cannot be read.
    """
    kind, _, given = spec.partition(":")
    try:
        call = ast.parse(f"f({given})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise UsageError(f"--{flag}={spec} cannot be read. Example: --{flag}={example}.")
    return kind, {str(word.arg): _value(f"--{flag}={spec}", word.value) for word in call.keywords}


def _value(where: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        fields = {str(word.arg): _value(where, word.value) for word in node.keywords if word.arg}
        return {"kind": node.func.id, **fields}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UsageError(f"{where}: '{ast.unparse(node)}' is no value.") from None
