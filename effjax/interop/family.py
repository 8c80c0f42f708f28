"""What a family of models says about itself, so that its weights can be read and written."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn

from effjax.interop.names import Entry, Name, Row, resolve


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
      spellings: further name maps, where a library spells the same parameters in several ways that renaming
        does not bring together: in files and in modules, joined and apart.
      complete: adds to a configuration what it does not say and the names of the tensors do: which of several
        classes they belong to.
      describe: the configuration that `build` makes a model from; None where it makes no such model.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    names: Callable[[Any], tuple[Row, ...]]
    inputs: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    spellings: tuple[Callable[[Any], tuple[Row, ...]], ...] = ()
    complete: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] | None = None
    describe: Callable[[Any], dict[str, Any] | None] | None = None

    def resolved(
        self, model: nn.Module, leaves: Mapping[str, Any], given: Collection[str] = ()
    ) -> tuple[tuple[Row, ...], list[Entry], list[Name]]:
        """The name map that has most of the given names, and what `resolve` makes of it.

        Args:
          model: whose parameters are named.
          leaves: its parameters by path, or anything with their shapes.
          given: names of tensors; without any, it is `names`.
        """
        best: tuple[int, tuple[tuple[Row, ...], list[Entry], list[Name]]] | None = None
        for spell in (self.names, *self.spellings):
            rows = spell(model)
            entries, absent = resolve(rows, leaves)
            names = {name for entry in entries for index in entry.indices() for name in entry.names(index)}
            found = len(names.intersection(given))
            if best is None or found > best[0]:
                best = found, (rows, entries, absent)
        assert best is not None
        return best[1]
