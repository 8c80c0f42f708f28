"""What a family of models says about itself, so that its weights can be read and written."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from effjax.interop.names import Row


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of another library.

    Attributes:
      build: makes our model from that library's own configuration, `defaults` filled in.
      names: the name map of a model; rows may depend on its fields.
      inputs: what the model is called with, as `jax.ShapeDtypeStruct`s; it decides shapes of parameters.
      defaults: what the architecture's name alone says: the keyword arguments behind a name of timm.
      renames: `(regexp, replacement)` pairs that bring other spellings of a checkpoint's names (older ones, a
        prefix more or less) to those of the name map; `re.sub`, all of them in order, on reading only.
      others: further name maps, for checkpoints that cut their tensors otherwise; the map that knows the most
        of the names there is the one that is read by, and `names` is the one that is written by.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    names: Callable[[Any], tuple[Row, ...]]
    inputs: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    others: Callable[[Any], tuple[tuple[Row, ...], ...]] = lambda model: ()
