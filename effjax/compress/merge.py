"""Re-parameterisation: the form in which a network was trained becomes the form in which it is used.

A module that has a cheaper form for evaluation says so in a method

    merge() -> (definition', fold)

where `fold` maps its variables to those of `definition'`, with the same outputs in evaluation. A module
without one keeps its own definition, with what stands in its fields merged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

# Collections of one module: `{"params": {...}, "batch_stats": {...}}`.
Variables = dict[str, Any]
Fold = Callable[[Variables], Variables]


def merge(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Variables]:
    """Returns the definition for use and its variables; outputs in evaluation stay the same.

    Args:
      model: as it was trained.
      variables: its parameters and batch statistics, with or without names on their axes.
    """
    definition, fold = plan(model)
    return definition, fold(jax.tree.map(jnp.asarray, meta.unbox(dict(variables))))


def plan(module: nn.Module) -> tuple[nn.Module, Fold]:
    """The merged definition, which needs no weights, and the function that makes its variables."""
    own = getattr(module, "merge", None)
    return own() if own is not None else parts(module)


def parts(module: nn.Module) -> tuple[nn.Module, Fold]:
    """Merges what stands in the fields of a module, and nothing of itself."""
    changed: dict[str, Any] = {}
    folds: dict[str, Fold] = {}
    for field in dataclasses.fields(module):  # type: ignore[arg-type]
        value = getattr(module, field.name, None)
        if field.name == "parent":
            continue
        if isinstance(value, nn.Module):
            changed[field.name], folds[field.name] = plan(value)
        elif isinstance(value, tuple) and value and all(isinstance(item, nn.Module) for item in value):
            planned = [plan(item) for item in value]
            changed[field.name] = tuple(definition for definition, _ in planned)
            folds |= {f"{field.name}_{i}": fold for i, (_, fold) in enumerate(planned)}
    return (module.clone(**changed) if changed else module), at(folds)


def unchanged(variables: Variables) -> Variables:
    """The fold of a module that is already in its form for use."""
    return variables


def at(folds: Mapping[str, Fold]) -> Fold:
    """The function that changes the variables of the children named, and leaves all others as they are."""

    def fold(variables: Variables) -> Variables:
        for name, change in folds.items():
            if any(name in tree for tree in variables.values()):
                variables = put(variables, name, change(take(variables, name)))
        return variables

    return fold


def take(variables: Variables, name: str) -> Variables:
    """The variables of a child."""
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


def put(variables: Variables, name: str, new: Variables) -> Variables:
    """The variables with those of a child replaced; a collection that it no longer has goes."""
    rest = {
        collection: {key: value for key, value in tree.items() if key != name}
        for collection, tree in variables.items()
    }
    for collection, values in new.items():
        rest[collection] = {**rest.get(collection, {}), name: values}
    return {collection: tree for collection, tree in rest.items() if tree}
