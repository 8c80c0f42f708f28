"""A plan as rows, tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from effjax.measure.analytic import gemm
from effjax.measure.analytic.serving import Serving
from effjax.measure.chips import Chip
from effjax.plan import search as layouts
from effjax.plan.topology import GPUS, Topology
from experiments.run.formatting import count, duration
from experiments.run.roofline_plot import Points

_GIB = 2**30

# Tiles of the result that a GPU's kernels usually compute on one multiprocessor. A TPU has one matrix unit a
# core, which takes rows by eights and columns by its lanes.
_GPU_TILES = ((64, 64), (128, 64), (128, 128), (256, 128), (128, 256))
_TPU_TILES = ((8, 128),)


def rows(found: Mapping[str, Any], out: str) -> dict[str, str]:
    """Names and values of everything but the collectives."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    cut = found["macs_per_device"] * found["devices"] / found["macs"] if found["macs"] else 1.0
    shown = {
        "mesh": f"{found['devices']} devices: {mesh}",
        "compiled": f"in {duration(found['compile_seconds'])} with {gib(found['compile_bytes'])} here",
        # A compiler may give up without saying how much it needed.
        "memory a device": f"{gib(found['needed']) if found['needed'] else 'more than all'} of "
        f"{gib(found['capacity'])}: " + ("fits" if found["fits"] else "does not fit"),
    }
    if memory := found["memory"]:
        shown |= {
            "  arguments": gib(memory["arguments"]),
            "  temporaries": gib(memory["temporaries"]),
            "  outputs": f"{gib(memory['outputs'])}, {gib(memory['reused'])} of it in the arguments' place",
        }
    shown |= {
        "parameters": f"{count(found['parameters'])}, {count(found['weight_bytes'])}B",
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
            least = duration(found["steps"] * floor["seconds"])
            shown["whole run"] = f"{found['steps']} steps, at least {least}"
    if found["notes"]:
        shown["not counted"] = "; ".join(found["notes"])
    return shown | {"plan": out}


def sent(collectives: Sequence[Mapping[str, Any]]) -> Table:
    """What the devices of a mesh exchange in one step."""
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


def products(found: Mapping[str, Any], watts: float | None, most: int = 12) -> Table:
    """The matrix products of one device: time in the best tiling, what tiles and waves waste, energy.

    By the closed form of `effjax.measure.analytic.gemm`; a GPU by tiles on its multiprocessors, a TPU or CPU
    as one processor.
    """
    topology, chip = Topology.parse(found["topology"]), chip_of(found)
    gpu = GPUS.get(topology.chip)
    machine = gemm.Machine(chip.fastest(found["dtype"]), chip.bandwidth, gpu.cores if gpu else 1)
    tiles = _GPU_TILES if gpu else _TPU_TILES if topology.platform == "tpu" else ((1, 1),)
    element_bytes = 2 if found["dtype"] in ("bfloat16", "float16") else 4
    table = Table("batch: m x n x k", box=box.SIMPLE_HEAD)
    for heading in ("times", "share", "tile", "waves", "busy", "padding", "seconds", "joules"):
        table.add_column(heading, justify="right")
    for one in found["products"][:most]:
        m, n, k, batch, times = (one[name] for name in ("m", "n", "k", "batch", "times"))
        product = gemm.Gemm(m, n, k, element_bytes, batch)
        tile = gemm.advise(product, tiles, machine)
        shape = gemm.quantise(product, tile, machine.processors)
        seconds = times * gemm.seconds(product, tile, machine)
        table.add_row(
            f"{batch}: {m} x {n} x {k}",
            str(times),
            f"{times * batch * m * n * k / found['macs_per_device']:.1%}",
            "x".join(map(str, tile)),
            str(shape.waves),
            f"{shape.occupancy:.0%}",
            f"{shape.padding:.2f}",
            duration(seconds),
            f"{gemm.joules(watts, seconds):.3g}" if watts else "-",
        )
    listed = len(found["products"])
    table.caption = f"{min(most, listed)} of {listed} shapes, those with the most work"
    return table


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
            f"{plan['needed'] / _GIB:.2f}" if plan["needed"] else "-",
            "yes" if plan["fits"] else "no",
            duration(floor["seconds"]) if floor else "-",
            floor["bound"] if floor else "-",
            duration(floor["without_overlap"]) if floor else "-",
            f"{plan['mfu']:.1%}" if floor else "-",
        )
    table.caption = "in turn: compute, memory and network one after the other; MFU: at most, at the floor"
    return table


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


def points(found: Mapping[str, Any]) -> Points:
    """The step and its kinds of work by their arithmetic intensity; none of them was timed."""
    placed: dict[str, tuple[float, float | None]] = {}
    names = ("flops", "bytes_read", "bytes_written")
    whole = {name: sum(work[name] for work in found["work"].values()) for name in names}
    for kind, work in {"step": whole, **found["work"]}.items():
        moved = work["bytes_read"] + work["bytes_written"]
        if work["flops"] and moved:
            placed[kind] = (work["flops"] / moved, None)
    return placed


def chip_of(found: Mapping[str, Any]) -> Chip:
    """The chip that a plan was made for, as it was then."""
    return Chip(**found["chip"])


def gib(amount: float) -> str:
    """Bytes in GiB, or MiB where that is small."""
    return f"{amount / _GIB:.2f} GiB" if amount >= _GIB / 10 else f"{amount / 2**20:.2f} MiB"
