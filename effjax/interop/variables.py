"""All variables of a model as one flat mapping: parameters by path, others behind their collection's name.

    head/classifier/kernel              a parameter
    batch_stats:head/norm/mean          a running average of a batch norm

Name maps, files and messages use these paths. Who calls may give parameters alone where a model has nothing
else: `{"params": params}` and `params` are the same to every function that takes variables.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util
from flax.core import meta

from effjax.errors import UsageError
from effjax.matching import named_leaves

PARAMS = "params"
BATCH_STATS = "batch_stats:"


def flatten(variables: Any) -> dict[str, Any]:
    """Leaves by path, unboxed; `variables` may be the parameters alone."""
    variables = meta.unbox(variables)
    if PARAMS not in variables:
        variables = {PARAMS: variables}
    return {
        path if collection == PARAMS else f"{collection}:{path}": leaf
        for collection, tree in variables.items()
        for path, leaf in named_leaves(tree).items()
    }


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Variables from leaves by path: the inverse of `flatten`, with `params` in any case."""
    flat: dict[str, dict[str, Any]] = {PARAMS: {}}
    for path, leaf in leaves.items():
        flat.setdefault(collection_of(path), {})[path.rpartition(":")[2]] = leaf
    return {collection: traverse_util.unflatten_dict(tree, sep="/") for collection, tree in flat.items()}


def collection_of(path: str) -> str:
    """The collection that a path lies in."""
    return path.rpartition(":")[0] or PARAMS


def parameters_alone(variables: Mapping[str, Any], what: str, instead: str) -> Any:
    """The parameters, where there are no other variables.

    Args:
      variables: by collection.
      what: the model, for the message.
      instead: the function that returns all of them.

    Raises:
      UsageError: where there are, naming `instead`.
    """
    others = _named(name for name, tree in variables.items() if name != PARAMS and tree)
    if others:
        raise UsageError(
            f"{what} has {others} besides its parameters: call {instead}, which returns all variables."
        )
    return variables[PARAMS]


def _named(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
