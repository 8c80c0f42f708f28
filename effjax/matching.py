"""One matcher for every rule that picks parameters by name.

A rule table is an ordered sequence of `(regexp, value)` pairs. A path such as `blocks/mixer/query/kernel`
takes the value of the first pair whose regexp matches the *whole* path. Weight decay, learning-rate
multipliers, freezing, sharding, quantising and pruning all read their rules through this file, so they
agree on what a name is.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from effjax.errors import UsageError

Rules = Sequence[tuple[str, Any]]


def path_of(key_path: tuple[Any, ...]) -> str:
    """Joins a JAX key path with slashes: `blocks/mixer/query/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns `{path: leaf}` in tree order."""
    return {path_of(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def compile_rules(rules: Rules, where: str) -> list[tuple[re.Pattern[str], Any]]:
    """Compiles the regexps; a bad one is named with its place in the config."""
    compiled = []
    for number, (pattern, value) in enumerate(rules):
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UsageError(
                f"{where}[{number}]: {pattern!r} is not a regular expression: {error}."
            ) from None
    return compiled


def match(rules: Rules, tree: Any, *, default: Any, where: str = "rules", unused: str = "raise") -> Any:
    """Gives every leaf of `tree` the value of the first rule that matches its whole path.

    Args:
      rules: ordered `(regexp, value)` pairs.
      tree: any pytree; only its paths are read.
      default: the value of leaves that no rule matches.
      where: the config path of the rules, for messages.
      unused: `"raise"` refuses a rule that matches no leaf (nearly always a misspelling), `"allow"` does not.

    Returns:
      A pytree of the structure of `tree`, holding values.

    Raises:
      UsageError: for a bad regexp, or a rule that matches nothing.
    """
    values = explain(rules, tree, default=default, where=where)
    if unused == "raise":
        for number, (pattern, _) in enumerate(compile_rules(rules, where)):
            # A rule is of use if it matches some path, even where an earlier rule took the value.
            if not any(pattern.fullmatch(path) for path in values):
                raise UsageError(
                    f"{where}[{number}]: {pattern.pattern!r} matches no parameter. A rule must match "
                    f"a whole path; the first paths are {', '.join(map(repr, list(values)[:6]))}."
                )
    return jax.tree.unflatten(jax.tree.structure(tree), values.values())


def explain(rules: Rules, tree: Any, *, default: Any, where: str = "rules") -> dict[str, Any]:
    """Returns `{path: value}`, what `match` decides for each leaf, for printing."""
    compiled = compile_rules(rules, where)
    return {
        path: next((value for pattern, value in compiled if pattern.fullmatch(path)), default)
        for path in named_leaves(tree)
    }
