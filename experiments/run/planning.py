"""From a config and the name of some chips to a table, `plan.json` and an exit code."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from effjax.errors import EffjaxError, UsageError
from effjax.experiment import resolve
from effjax.measure.analytic.serving import serve
from effjax.measure.analytic.shape import DecoderShape
from effjax.measure.chips import CHIPS
from effjax.models.lm import LM
from effjax.plan import search as layouts
from effjax.plan.topology import CPU, Topology
from experiments.run import plan_views as views
from experiments.run.closing import closing_table
from experiments.run.config_file import LoadedConfig
from experiments.run.files import to_json, write_atomic
from experiments.run.plan_process import Request, run
from experiments.run.restore import load_config_of
from experiments.run.roofline_plot import roofline_plot

__all__ = ["Request", "Views", "concurrency", "of_run", "plan", "search"]

DOES_NOT_FIT = 3


@dataclasses.dataclass(frozen=True)
class Views:
    """What to show of a plan besides its rows.

    Attributes:
      products: whether the matrix products of one device are listed.
      watts: power of a device, for their energy.
      roofline: where a picture of the chip's roofline goes.
    """

    products: bool = False
    watts: float | None = None
    roofline: str | None = None


def of_run(workdir: str) -> LoadedConfig:
    """The config of a run, under the name of its folder."""
    return LoadedConfig(load_config_of(workdir), workdir, None, {})


def plan(request: Request, out: str, wanted: Views) -> int:
    """Plans one config on one topology; returns the exit code."""
    with waiting(f"compiling {request.loaded.name} for {request.topology}"):
        found = run(request)
    write_atomic(out, to_json(record(request, found), indent=2) + "\n")
    show(request, found, out, wanted)
    return 0 if found["fits"] else DOES_NOT_FIT


def search(request: Request, most: int, out: str) -> int:
    """Plans other layouts of a config and ranks them; returns the exit code."""
    if request.step != "train":
        raise UsageError(f"--search lays training steps out, not --step={request.step}.")
    topology = Topology.parse(request.topology)
    topology.check_installed()
    # Compilers for other chips run in processes of their own; here only shapes are counted.
    jax.config.update("jax_platforms", "cpu")
    config = request.loaded.config
    tried: dict[layouts.Candidate, Mapping[str, Any]] = {}
    refused: dict[str, str] = {}

    def attempt(candidates: Sequence[layouts.Candidate], limit: int) -> None:
        for candidate in candidates:
            if len(tried) >= limit:
                return
            if candidate in tried or str(candidate) in refused:
                continue
            if why := candidate.refused(config):
                refused[str(candidate)] = why
                continue
            with waiting(f"{len(tried) + 1} of {most}: {candidate}"):
                try:
                    tried[candidate] = run(request, candidate.config(config))
                except EffjaxError as error:
                    refused[str(candidate)] = str(error)

    # Half of the compilations go to meshes, the rest to policies and batches of the best two.
    attempt(layouts.first_round(config, topology), max(1, most // 2))
    attempt(layouts.second_round(layouts.best(tried, 2)), most)
    if not tried:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
        raise UsageError(f"no layout of {request.loaded.name} on {topology} is possible. {reasons}")
    ranked = layouts.rank(tried)
    listed = [{"layout": str(candidate), **tried[candidate]} for candidate in ranked]
    said = {"config": request.loaded.name, "topology": str(topology), "ranked": listed, "refused": refused}
    write_atomic(out, to_json(said, indent=2) + "\n")
    tables().print(views.ranking(ranked, tried))
    print(f"{len(refused)} cannot be, with reasons in {out}")
    return 0 if tried[ranked[0]]["fits"] else DOES_NOT_FIT


def concurrency(request: Request, out: str) -> int:
    """How many users a language model serves at peak rates, and what each of them waits for.

    One replica on all chips of the topology, weights and caches shared evenly: the closed forms of
    `effjax.measure.analytic.serving`. Nothing is compiled.
    """
    topology, experiment = Topology.parse(request.topology), resolve(request.loaded.config)
    if not isinstance(experiment.model, LM):
        raise UsageError("--concurrency counts users of a language model, and this config has none.")
    if topology.chip == CPU:
        raise UsageError("--concurrency takes the figures of a chip: --topology=h100:8, v5e:4x4.")
    packing = experiment.data.packing
    context = request.context or (packing.length if packing else 1)
    shape, chip = DecoderShape.of(experiment.model), CHIPS[topology.chip]
    dtype = experiment.train.precision.compute
    size = jnp.dtype(dtype).itemsize
    served = [
        serve(
            shape,
            chip,
            tokens,
            devices=topology.devices,
            dtype=dtype,
            bytes_per_weight=size,
            bytes_per_kv=size,
        )
        for tokens in (context, 4 * context, 16 * context)
    ]
    said = {"config": request.loaded.name, "topology": str(topology)}
    write_atomic(out, to_json({**said, "serving": [dataclasses.asdict(one) for one in served]}) + "\n")
    tables().print(views.users(served))
    return 0 if served[0].users else DOES_NOT_FIT


def record(request: Request, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `plan.json` holds: what was asked, and what was found."""
    overrides = {key: str(value) for key, value in request.loaded.overrides.items()}
    return {"config": request.loaded.name, "overrides": overrides, **found}


def show(request: Request, found: Mapping[str, Any], out: str, wanted: Views) -> None:
    """Prints the plan, and draws what is wanted."""
    title = f"{request.loaded.name} on {found['topology']}, step {found['step']}"
    closing_table(title, views.rows(found, out))
    console = tables()
    if found["collectives"]:
        console.print(views.sent(found["collectives"]))
    if wanted.products:
        console.print(views.products(found, wanted.watts))
    if wanted.roofline:
        roofline_plot(wanted.roofline, views.chip_of(found), found["dtype"], views.points(found))


def tables() -> Console:
    """The terminal, or where there is none a page wide enough for every table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on a terminal what takes so long."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
