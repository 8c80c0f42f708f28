"""Parameters of ours as the tensors of another library."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import meta

from effjax.interop.load import family_of
from effjax.interop.names import resolve
from effjax.matching import named_leaves


def export(model: nn.Module, params: Any, target: str) -> dict[str, np.ndarray]:
    """Names and lays out parameters as another library has them.

    Args:
      model: the definition that the parameters belong to.
      params: its parameters, numpy or jax arrays, boxed or not.
      target: `timm:<architecture>`, `transformers:<model_type>` or `diffusers:<class name>`.

    Returns:
      `{their name: contiguous array}`, in the dtype of the parameters. What was loaded and not changed comes
      back bit by bit. Tensors that loading leaves out (buffers, tied copies) are not made again.

    Raises:
      UsageError: for an unknown target, or a model that it has no names for.
    """
    return dict(exported(model, params, target))


def exported(model: nn.Module, params: Any, target: str) -> Iterator[tuple[str, np.ndarray]]:
    """Like `export`, one tensor at a time, so that a large model need not stand in memory twice."""
    leaves = named_leaves(meta.unbox(params))
    entries, _ = resolve(family_of(target).names(model), leaves)
    for entry in entries:
        ours = [np.asarray(leaves[path]) for path in entry.row.our_paths]
        for index in entry.indices():
            theirs = entry.to_theirs([leaf[(*index, ...)] for leaf in ours])
            for name, array in zip(entry.names(index), theirs, strict=True):
                yield name, np.ascontiguousarray(array)
