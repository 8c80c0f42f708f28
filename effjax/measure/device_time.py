"""Time spent on the accelerator itself, from the profiler's trace, without the host's share.

The host's clock sees dispatch and waiting besides the work, some ten microseconds or more, which hide what a
small function takes. A trace says when the device was busy.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileEvent, ProfilePlane


def on_accelerator(result: Any) -> bool:
    """Whether any array of a result lies on a device other than a CPU."""
    arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
    return any(device.platform != "cpu" for array in arrays for device in array.devices())


def device_seconds(
    function: Callable[..., Any], input_sets: Sequence[Sequence[Any]], repeats: int = 10
) -> float | None:
    """Seconds a call for which the busiest accelerator worked, from a trace of `repeats` calls.

    The profiler can only write files: they go to a temporary folder that is gone afterwards.

    Args:
      function: compiled already, for every input set.
      input_sets: each the tuple of arguments of one call, taken in turn.
      repeats: calls to trace.

    Returns:
      None where the trace shows no accelerator. A CPU has no such time: XLA runs there in the host's threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for turn in range(repeats):
                jax.block_until_ready(function(*input_sets[turn % len(input_sets)]))
        traces = [ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    busy = [seconds for trace in traces if (seconds := busy_seconds(trace)) is not None]
    return max(busy) / repeats if busy else None


def busy_seconds(trace: ProfileData) -> float | None:
    """How long the busiest accelerator of a trace was busy, work at the same time counted once.

    A TPU's plane has a line "XLA Modules" with one event a program; a GPU's has a line for every stream, with
    an event a kernel or copy. Other lines repeat the same time under other names.
    """
    busy = [
        _union(_work(plane))
        for plane in trace.planes
        if plane.name.startswith(("/device:TPU:", "/device:GPU:"))
    ]
    return max(busy, default=0.0) * 1e-9 or None


def _work(plane: ProfilePlane) -> list[ProfileEvent]:
    lines = {line.name: list(line.events) for line in plane.lines}
    if "XLA Modules" in lines:
        return lines["XLA Modules"]
    return [event for name, events in lines.items() if name.startswith("Stream #") for event in events]


def _union(events: Iterable[ProfileEvent]) -> float:
    """Nanoseconds that at least one event covers."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted((event.start_ns, event.end_ns) for event in events):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
