"""From a config and the name of some chips to a table, `plan.json` and an exit code."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from effjax.errors import EffjaxError, UsageError
from effjax.experiment import resolve
from effjax.measure.analytic.serving import Serving, serve
from effjax.measure.analytic.shape import DecoderShape
from effjax.measure.chips import CHIPS
from effjax.models.lm import LM
from effjax.plan import search as layouts
from effjax.plan.topology import CPU, Topology
from experiments.run.closing import closing_table
from experiments.run.files import to_json, write_atomic
from experiments.run.formatting import count, duration
from experiments.run.plan_process import Request, run

__all__ = ["Request", "concurrency", "plan", "search"]

DOES_NOT_FIT = 3
_GIB = 2**30


def plan(request: Request, out: str) -> int:
    """Plans one config on one topology; returns the exit code."""
    with waiting(f"compiling {request.loaded.name} for {request.topology}"):
        found = run(request)
    write_atomic(out, to_json(record(request, found), indent=2) + "\n")
    show(request, found, out)
    return 0 if found["fits"] else DOES_NOT_FIT


def search(request: Request, most: int, out: str) -> int:
    """Plans other layouts of a config and ranks them; returns the exit code."""
    if request.step != "train":
        raise UsageError(f"--search lays training steps out, not --step={request.step}.")
    topology = Topology.parse(request.topology)
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
    Console(highlight=False).print(ranking(ranked, tried))
    print(f"{len(refused)} cannot be, with reasons in {out}")
    return 0 if tried[ranked[0]]["fits"] else DOES_NOT_FIT


def ranking(ranked: Sequence[layouts.Candidate], found: Mapping[layouts.Candidate, Any]) -> Table:
    """Layouts, best first."""
    table = Table(" x ".join(layouts.AXES), "remat", box=box.SIMPLE_HEAD)
    for heading in ("batch", "GiB", "fits", "floor", "bound by", "in turn", "MFU"):
        table.add_column(heading, justify="right")
    for candidate in ranked:
        plan, floor = found[candidate], found[candidate]["floor"]
        table.add_row(
            " x ".join(str(size) for _, size in candidate.mesh),
            candidate.remat,
            str(candidate.batch_size),
            f"{plan['needed'] / _GIB:.2f}",
            "yes" if plan["fits"] else "no",
            duration(floor["seconds"]) if floor else "-",
            floor["bound"] if floor else "-",
            duration(floor["without_overlap"]) if floor else "-",
            f"{plan['mfu']:.1%}" if floor else "-",
        )
    table.caption = "in turn: compute, memory and network one after the other; MFU: at most, at the floor"
    return table


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
    served = [
        serve(shape, chip, tokens, devices=topology.devices, dtype=dtype, bytes_per_weight=2, bytes_per_kv=2)
        for tokens in (context, 4 * context, 16 * context)
    ]
    said = [jsonable(dataclasses.asdict(one)) for one in served]
    write_atomic(
        out, to_json({"config": request.loaded.name, "topology": str(topology), "serving": said}) + "\n"
    )
    Console(highlight=False).print(users(served))
    return 0 if served[0].users else DOES_NOT_FIT


def users(served: Sequence[Serving]) -> Table:
    """What a longer context costs."""
    table = Table("context", box=box.SIMPLE_HEAD)
    for heading in ("cache a user", "users", "prefill", "a token", "a switch", "critical batch"):
        table.add_column(heading, justify="right")
    for one in served:
        table.add_row(
            str(one.context),
            gib(one.kv_bytes_per_user),
            str(one.users),
            duration(one.prefill_seconds),
            duration(one.decode_seconds_per_token),
            duration(one.switch_seconds),
            f"{one.critical_batch:.0f}",
        )
    table.caption = "at peak rates, one replica on all chips; a token is that of one user alone"
    return table


def record(request: Request, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `plan.json` holds: what was asked, and what was found."""
    overrides = {key: str(value) for key, value in request.loaded.overrides.items()}
    return {"config": request.loaded.name, "overrides": overrides, **found}


def show(request: Request, found: Mapping[str, Any], out: str) -> None:
    """Prints the plan."""
    closing_table(f"{request.loaded.name} on {found['topology']}, step {found['step']}", rows(found, out))
    if found["collectives"]:
        Console(highlight=False).print(sent(found["collectives"]))


def rows(found: Mapping[str, Any], out: str) -> dict[str, str]:
    """Names and values of everything but the collectives."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    cut = found["macs_per_device"] * found["devices"] / found["macs"] if found["macs"] else 1.0
    shown = {
        "mesh": f"{found['devices']} devices: {mesh}",
        "compiled": f"in {duration(found['compile_seconds'])} with {gib(found['compile_bytes'])} here",
        "memory a device": f"{gib(found['needed'])} of {gib(found['capacity'])}: "
        + ("fits" if found["fits"] else "does not fit"),
    }
    if memory := found["memory"]:
        shown |= {
            "  arguments": gib(memory["arguments"]),
            "  temporaries": gib(memory["temporaries"]),
            "  outputs": f"{gib(memory['outputs'])}, {gib(memory['reused'])} of it in the arguments' place",
        }
    shown |= {
        "parameters": count(found["parameters"]),
        "MACs a step": count(found["macs"]),
        "MACs a device": count(found["macs_per_device"])
        + (f", {cut:.2f} times an even share" if abs(cut - 1) >= 0.005 else ""),
    }
    if floor := found["floor"]:
        shown |= {
            "floor": f"{duration(floor['seconds'])}, bound by {floor['bound']} (compute "
            f"{duration(floor['compute'])}, memory {duration(floor['memory'])}, network "
            f"{duration(floor['network'])})",
            "MFU at the floor": f"{found['mfu']:.1%} of {count(found['peak'])}FLOP/s in {found['dtype']}",
            "at most": f"{count(found['units_per_second'])} {found['unit']}/s, "
            f"{count(found['units_per_day'])} a day",
        }
        if found["steps"]:
            shown["whole run"] = (
                f"{found['steps']} steps, at least {duration(found['steps'] * floor['seconds'])}"
            )
    if found["notes"]:
        shown["not counted"] = "; ".join(found["notes"])
    return shown | {"plan": out}


def sent(collectives: Any) -> Table:
    """What a device of the mesh exchanges with others in one step."""
    table = Table("collective", "along", box=box.SIMPLE_HEAD)
    for heading in ("devices", "hosts", "times", "GiB"):
        table.add_column(heading, justify="right")
    for one in collectives:
        table.add_row(
            one["kind"],
            " ".join(one["axes"]),
            str(one["group"]),
            str(one["hosts"]),
            str(one["count"]),
            f"{one['bytes'] / _GIB:.3f}",
        )
    return table


def gib(amount: float) -> str:
    """Bytes in GiB, or MiB where that is small."""
    return f"{amount / _GIB:.2f} GiB" if amount >= _GIB / 10 else f"{amount / 2**20:.2f} MiB"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on a terminal what takes so long."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
