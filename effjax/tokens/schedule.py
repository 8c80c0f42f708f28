"""Which method works at which layer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from effjax.config import part
from effjax.errors import UsageError
from effjax.tokens.amounts import check_layers
from effjax.tokens.methods import BETWEEN, METHODS
from effjax.tokens.point import Method, Point, Where
from effjax.tokens.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Methods by layer: `Schedule({3: ToMe(remove=16), 6: ToMe(keep=0.5), 12: Restore()})`.

    Attributes:
      entries: what happens at each layer. A method reduces where it stands in its block; `Restore`, and
        methods that are Linen modules, work before the layer; the number of layers stands for the end.
    """

    entries: Mapping[Any, Any] = part(METHODS | BETWEEN)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that layers are also compiled for, see `effjax.tokens.compact`: those of all."""
        return tuple(
            sorted({bucket for entry in self.entries.values() for bucket in getattr(entry, "buckets", ())})
        )

    @property
    def adaptive(self) -> bool:
        """Whether the number of tokens of any entry depends on the picture."""
        return any(getattr(entry, "adaptive", False) for entry in self.entries.values())

    def points(self, depth: int) -> dict[int, Any]:
        """The entries by layer.

        Raises:
          UsageError: for a layer that the network does not have.
        """
        found = {}
        for key, entry in self.entries.items():
            if not str(key).isdigit():
                raise UsageError(f"{key!r} names no layer: a schedule is {{layer: method}}.")
            layer = int(key)
            check_layers((layer,), depth + 1 if callable(entry) else depth)
            found[layer] = entry
        return dict(sorted(found.items()))


def cut(
    reduce: Method | Schedule, depth: int, owner: nn.Module
) -> tuple[dict[int, Point], dict[int, Callable[[Tokens, bool], Tokens]]]:
    """What a network of this depth does: inside which blocks, and before which.

    What is a Linen module has its parameters in `owner`, as `reduce_LAYER`.
    """
    entries = reduce.points(depth)
    between = {layer: _owned(entry, layer, owner) for layer, entry in entries.items() if callable(entry)}
    return inside_blocks(reduce, depth), between


def inside_blocks(reduce: Method | Schedule, depth: int) -> dict[int, Point]:
    """The layers whose blocks reduce, each with its method."""
    entries = reduce.points(depth)
    return {
        layer: Point(entry, Where(layer, depth)) for layer, entry in entries.items() if not callable(entry)
    }


def _owned(entry: Any, layer: int, owner: nn.Module) -> Callable[[Tokens, bool], Tokens]:
    return entry.clone(parent=owner, name=f"reduce_{layer}") if isinstance(entry, nn.Module) else entry
