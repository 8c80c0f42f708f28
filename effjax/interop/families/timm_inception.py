"""Inception-v3 of timm and torchvision, and of the weights that FID is measured with.

The latter are `timm:inception_v3` with the argument `fid=True`, which timm does not have: their names are the
same, and they have 1,008 outputs.

Sources of names, defaults and shapes: timm 1.0.31, `timm/models/inception_v3.py`; mseitzer/pytorch-fid,
`src/pytorch_fid/inception.py`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.config import build as build_section
from effjax.interop import names as n
from effjax.interop.families.stages import COUNTERS, batch_norm, layer
from effjax.interop.family import Family
from effjax.models.inception import STEM, Cell, Inception, Step, cells


@dataclasses.dataclass(frozen=True)
class TimmInception:
    """The keyword arguments that are understood here, with timm's defaults; no auxiliary head is built."""

    in_chans: int = 3
    num_classes: int = 1000
    fid: bool = False


def build(config: Mapping[str, Any]) -> Inception:
    """Makes the model from the keyword arguments of `timm.create_model`.

    Raises:
      UsageError: for an argument that is not understood.
    """
    c = build_section(TimmInception, config, "config")
    return Inception(classes=c.num_classes, fid=c.fid)


def names(model: Inception) -> tuple[n.Row, ...]:
    """The name map."""
    rows: list[n.Row] = [COUNTERS, n.Ignored(r"AuxLogits\..*", "a head that serves training alone")]
    for stem in STEM:
        if stem is not None:
            rows += _unit(stem[0], stem[0])
    for name, cell in cells(model.fid).items():
        for step in _steps(cell):
            rows += _unit(f"{name}.{step}", f"{name}_{step}")
    rows += layer("fc", "fc", n.LINEAR, classifier=True)
    return tuple(rows)


def _unit(theirs: str, ours: str) -> Iterator[n.Name]:
    yield from layer(f"{theirs}.conv", f"{ours}_conv", n.CONV, bias=False)
    yield from batch_norm(f"{theirs}.bn", f"{ours}_norm")


def _steps(cell: Cell) -> Iterator[str]:
    """Names of a cell's convolutions."""
    for branch in cell.branches:
        for step in branch:
            yield from [step.name] if isinstance(step, Step) else [one.name for one in step]
    if cell.features is not None:
        yield "branch_pool"


def inputs(model: Inception, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """A picture; no parameter depends on its size."""
    return (jax.ShapeDtypeStruct((1, 299, 299, config.get("in_chans", 3)), jnp.float32),)


TIMM = {"inception_v3": Family(build, names, inputs)}
