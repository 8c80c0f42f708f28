"""What is done: amounts of work, and a tally of them by module and kind."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

KINDS = ("attention", "dense", "convolution", "kernel", "elementwise", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
    """An amount of work; amounts add up, and repeat `times` over."""

    macs: int = 0
    """Multiply-accumulates of dots, convolutions and kernels."""
    flops: int = 0
    """Arithmetic operations, two for each multiply-accumulate; without transcendentals."""
    transcendentals: int = 0
    """Exponentials, roots, logarithms and their like."""
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.macs + other.macs,
            self.flops + other.flops,
            self.transcendentals + other.transcendentals,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def bytes(self) -> int:
        """Bytes read and bytes written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Arithmetic operations a byte; infinite where nothing moves."""
        return self.flops / self.bytes if self.bytes else float("inf") if self.flops else 0.0


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    return sum(works, start=Work())


@dataclasses.dataclass
class Tally:
    """Work by `(scope, kind)`, multiply-accumulates by the parameter they use, and what is not counted."""

    work: dict[tuple[str, str], Work] = dataclasses.field(default_factory=dict)
    macs_of_leaf: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def put(self, scope: str, kind: str, work: Work) -> None:
        """Adds work of one kind in one module."""
        if work != Work():
            self.work[scope, kind] = self.work.get((scope, kind), Work()) + work

    def add(self, other: "Tally", times: int = 1, scope: str = "") -> None:
        """Adds another tally, its work done `times` over, its scopes inside `scope`."""
        if not times:
            return
        for (inner, kind), work in other.work.items():
            self.put(f"{scope}/{inner}" if scope and inner else scope or inner, kind, work * times)
        for leaf, macs in other.macs_of_leaf.items():
            self.macs_of_leaf[leaf] += macs * times
        self.unknown += [line for line in other.unknown if line not in self.unknown]

    def total(self) -> Work:
        """All work."""
        return total(self.work.values())


def nested(work: Mapping[tuple[str, str], Work]) -> dict[str, dict[str, Work]]:
    """Work by scope, then by kind."""
    scopes: dict[str, dict[str, Any]] = {}
    for (scope, kind), amount in work.items():
        scopes.setdefault(scope, {})[kind] = amount
    return scopes
