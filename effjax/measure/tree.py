"""A cost as a tree of modules, and the tree as a table for the terminal."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table

from effjax.measure.cost import Cost
from effjax.measure.graph import join_scopes
from effjax.measure.work import KINDS, Work, total


@dataclasses.dataclass(frozen=True)
class Module:
    """One module and everything beneath it."""

    path: str
    """`blocks/attention`, as in the parameters; empty for the whole function."""
    parameters: int
    work: Mapping[str, Work]
    """Work by kind, all trips of the loops around it included."""
    children: tuple["Module", ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by kind, kinds that have none left out."""
        return {kind: work.macs for kind, work in self.work.items() if work.macs}

    @property
    def flops(self) -> dict[str, int]:
        """Arithmetic operations by kind, kinds that have none left out."""
        return {kind: work.flops for kind, work in self.work.items() if work.flops}

    @property
    def whole(self) -> Work:
        """Work of all kinds."""
        return total(self.work.values())

    def total(self) -> int:
        """Multiply-accumulates of all kinds."""
        return self.whole.macs


def tree(cost: Cost) -> Module:
    """Arranges a cost by module: work by its named scopes, parameters by their paths.

    Work and parameters of a module that its children do not account for stand in the module's own row.
    """
    parameters: collections.Counter[str] = collections.Counter()
    for path, size in cost.parameters_by_path.items():
        parameters[path.rpartition("/")[0]] += size
    nameless = _nameless(cost.work_by_scope, parameters)
    work: dict[str, dict[str, Work]] = {}
    for scope, kinds in cost.work_by_scope.items():
        named = [inner.rpartition("/")[2] for inner in _prefixes(scope) if inner not in nameless]
        _add(work.setdefault("/".join(named), {}), kinds)
    return dataclasses.replace(_module("", parameters, work), unknown=cost.unknown)


def table(module: Module, depth: int = 2) -> Table:
    """Draws the tree down to `depth` levels.

    Columns: parameters, MACs and their share in the whole, bytes moved, intensity (FLOPs a byte), and the
    MACs of each kind that occurs.
    """
    kinds = [kind for kind in KINDS if module.macs.get(kind)]
    drawn = Table("module")
    for heading in ("parameters", "MACs", "share", "bytes", "FLOPs/byte", *kinds):
        drawn.add_column(heading, justify="right")
    whole = module.total()
    for level, row in _rows(module, depth):
        work = row.whole
        drawn.add_row(
            "  " * level + (row.name or "total"),
            f"{row.parameters:,}",
            short(work.macs),
            f"{work.macs / whole:.1%}" if whole else "",
            short(work.bytes),
            f"{work.intensity:.1f}",
            *(short(row.macs.get(kind, 0)) for kind in kinds),
        )
    if module.unknown:
        drawn.caption = "not counted: " + "; ".join(module.unknown)
    return drawn


def short(number: int | float) -> str:
    """Three digits and a letter: `17.6G`.

    >>> short(17_582_740_224)
    '17.6G'
    >>> short(999_999)
    '1.00M'
    """
    for letter in ("", "k", "M", "G", "T", "P"):
        digits = 0 if not letter else max(0, 3 - len(str(int(number + 0.5))))
        if round(number, digits) < 1000:
            return f"{number:.{digits}f}{letter}"
        number /= 1000
    return f"{number:.3g}E"


def _nameless(scopes: Iterable[str], parameters: Iterable[str]) -> set[str]:
    """The scopes that parameter paths leave out: the model's own class, a block inside its stack.

    Such a scope holds none of the parameters itself, while one further in does.
    """
    modules = {inner for path in parameters for inner in _prefixes(path)}
    nameless = set()
    for scope in scopes:
        path, parts = "", scope.split("/")
        for depth, part in enumerate(parts):
            further = [join_scopes(path, later) for later in parts[depth + 1 :]]
            if join_scopes(path, part) not in modules and not modules.isdisjoint(further):
                nameless.add("/".join(parts[: depth + 1]))
            else:
                path = join_scopes(path, part)
    return nameless


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a/b` and `a/b/c` of `a/b/c`; nothing of the empty path."""
    parts = path.split("/") if path else []
    return ("/".join(parts[: depth + 1]) for depth in range(len(parts)))


def _module(path: str, parameters: Mapping[str, int], work: Mapping[str, Mapping[str, Work]]) -> Module:
    prefix = path + "/" if path else ""
    beneath = [p for p in dict.fromkeys([*work, *parameters]) if p.startswith(prefix) and p != path]
    names = dict.fromkeys(p.removeprefix(prefix).partition("/")[0] for p in beneath)
    children = tuple(_module(join_scopes(path, name), parameters, work) for name in names if name)
    kinds = dict(work.get(path, {}))
    for child in children:
        _add(kinds, child.work)
    size = parameters.get(path, 0) + sum(child.parameters for child in children)
    return Module(path, size, kinds, children)


def _add(kinds: dict[str, Work], more: Mapping[str, Work]) -> None:
    for kind, work in more.items():
        kinds[kind] = kinds.get(kind, Work()) + work


def _rows(module: Module, depth: int, level: int = 0) -> Iterator[tuple[int, Module]]:
    yield level, module
    if level < depth:
        for child in module.children:
            yield from _rows(child, depth, level + 1)
