"""What an entry of the catalogue says: one published system, and how it is known to work here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.errors import UsageError, did_you_mean

NOT_MEASURED = "not measured yet"

STATUSES = ("works", "unmeasured", "planned")

# What a system does to make a model cheaper. The first six are the families of Chitty-Venkata et al., "A
# Survey of Techniques for Optimizing Transformer Inference", 2023, arXiv:2307.07982; the rest is our own.
FAMILIES = {
    "distillation": "a small model learns from a large one",
    "pruning": "weights, heads, layers or tokens are left out",
    "quantisation": "fewer bits",
    "architecture search": "the shape is searched for",
    "lightweight design": "a cheaper mixer, feed-forward layer or backbone",
    "hardware": "kernels, accelerators, and models of what they cost",
    "baseline": "the model that others are compared with",
    "caching": "what was computed is kept and used again",
    "sampling": "the network runs less often for each result",
    "training": "the same model in less training",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of a paper's own table; the tests count it again, to 1% of parameters and 2% of MACs.

    Attributes:
      config: the variant that builds it: `configs/vision/vit.py:b16`.
      parameters: as published.
      macs: multiply-accumulates of one example, as published; None where the paper gives none.
      top1: top-1 accuracy on ImageNet's validation set in percent, as published; None where there is none.
    """

    config: str
    parameters: int | float
    macs: int | float | None = None
    top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One paper, or one method of the field's common stock, and where everything about it lies.

    Raises:
      UsageError: for an unknown family or status, or a status that the other fields do not bear out.
    """

    slug: str
    """Its name on the command line: `uba_schedule`."""
    title: str
    year: int
    paper: str
    """Authors, venue and arXiv id."""
    room: str
    """The room its mechanism stands in: `models`, `diffusion`, ..."""
    family: str
    """What it does to make a model cheaper, a key of `FAMILIES`."""
    files: tuple[str, ...]
    """The mechanism, by path from the root of the repository."""
    configs: tuple[str, ...] = ()
    """`configs/vision/vit.py:b16`: a file, and the variant that builds the published model."""
    sizes: tuple[Size, ...] = ()
    """The published sizes, each with the figures of the paper."""
    tests: tuple[str, ...] = ()
    """`tests/models/test_vit.py` or `tests/models/test_vit.py::test_name`: the proof of the mechanism."""
    claim: str = ""
    """What the paper says becomes better, with its figures."""
    measured: str = NOT_MEASURED
    """What was measured here of that, also where it falls short."""
    differences: str = ""
    """Where this implementation departs from the paper, and why."""
    status: str = "unmeasured"
    """`works`: built, proved, its claim tried. `unmeasured`: built, claim not tried. `planned`: not built."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UsageError(f"{self.slug}.family is {self.family!r}. {did_you_mean(self.family, FAMILIES)}")
        if self.status not in STATUSES:
            raise UsageError(f"{self.slug}.status is {self.status!r}. {did_you_mean(self.status, STATUSES)}")
        if self.status == "works" and (self.measured == NOT_MEASURED or not self.tests):
            raise UsageError(f"{self.slug} cannot be 'works' without tests and without a measured result.")

    @property
    def text(self) -> str:
        """Everything it says in one string, for searching."""
        return "\n".join(
            " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for value in dataclasses.asdict(self).values()
        )


def parse(slug: str, room: str, fields: Mapping[str, Any]) -> Entry:
    """Makes an entry from a table of a room's file.

    Raises:
      UsageError: for a key that is no field, a missing one, or a value of the wrong type.
    """
    where = f"{room}.toml [{slug}]"
    known = {field.name: field for field in dataclasses.fields(Entry) if field.name not in ("slug", "room")}
    for key in fields:
        if key not in known:
            raise UsageError(f"{where}: {key} is read by nobody. {did_you_mean(key, known)}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in fields:
            values[name] = _value(name, fields[name], where)
        elif field.default is dataclasses.MISSING:
            raise UsageError(f"{where}: {name} is missing.")
    return Entry(slug=slug, room=room, **values)


def _value(name: str, value: Any, where: str) -> Any:
    """Checks one value; where a line of text breaks in the file means nothing."""
    if name in ("files", "configs", "tests"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where}: {name} must be a list of strings, not {value!r}.")
        return tuple(value)
    if name == "sizes":
        return tuple(_size(one, where) for one in value)
    expected = int if name == "year" else str
    if not isinstance(value, expected):
        raise UsageError(f"{where}: {name} must be of type {expected.__name__}, not {value!r}.")
    return " ".join(value.split()) if isinstance(value, str) else value


def _size(fields: Mapping[str, Any], where: str) -> Size:
    known = {field.name for field in dataclasses.fields(Size)}
    for key in fields:
        if key not in known:
            raise UsageError(f"{where}.sizes: {key} is read by nobody. {did_you_mean(key, known)}")
    if not {"config", "parameters"} <= set(fields):
        raise UsageError(f"{where}.sizes: every size needs its config and its parameters.")
    return Size(**fields)
