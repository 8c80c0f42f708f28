"""Runs Mosaic GPU kernels of one warpgroup in NumPy, a program at a time; what is asynchronous stays so.

jax's own interpreter of such kernels knows no `wgmma` in 0.10 and none with an operand in registers in 0.12,
so the kernels here bring theirs. It follows the kernel's jaxpr, and is strict where hardware is merely wrong:

    copies to shared memory     arrive when their barrier is waited for; before that the memory is NaN
    copies from shared memory   read it when they are waited for, not when they are issued
    wgmma                       holds its operands in shared memory until it is waited for
    writes                      are noted with the program that wrote

so a wait that is missing shows as NaN or as a fault, and so do reads and writes outside an array, elements
that nobody writes or two programs write, a barrier on which nothing arrives, and a kernel that ends before
its writes do. Not modelled: time, the order of programs, several warpgroups, clusters, layouts in registers.

Without values (`check`) only scalars are followed: indices, loops, conditions. That is what the linter needs,
at the shapes of a benchmark.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.arithmetic import NUMPY
from pallas_kernels.launches import Launch, launches

# Each fault is told once, for the first program that has it.
MOST_FAULTS = 20


class Fault(RuntimeError):
    """A kernel did what a GPU answers with garbage, a hang or an error."""


def emulated(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What `plgpu.kernel` returned, to be run in NumPy; composes with `jit`.

    A result is an error where the kernel has faults.
    """

    def run(*arrays: Any) -> Any:
        outputs = jax.eval_shape(kernel, *arrays)
        launch = next(launches(jax.make_jaxpr(kernel)(*arrays).jaxpr))
        leaves, tree = jax.tree.flatten(outputs)

        def host(*given: Any) -> list[np.ndarray]:
            program = _Emulator(launch, [np.asarray(array) for array in given], values=True)
            program.run()
            if program.faults:
                raise Fault("; ".join(program.faults))
            return [buffer.data for buffer in program.memory[launch.inputs :]]

        found = jax.pure_callback(host, leaves, *jax.tree.leaves(arrays), vmap_method="sequential")
        return jax.tree.unflatten(tree, found)

    return run


def check(launch: Launch, inputs: list[Any], most_programs: int) -> list[str]:
    """Faults of a kernel at some shapes, found without computing anything but indices.

    Args:
      launch: the kernel.
      inputs: arrays, where what they hold decides about indices, or shapes.
      most_programs: with more of them only those at the corners of the grid are followed, and nothing is said
        about what nobody writes.
    """
    program = _Emulator(launch, inputs, values=False)
    program.run(most_programs)
    return program.faults


@dataclasses.dataclass(eq=False)
class _Buffer:
    """Memory, and whether what it holds is computed."""

    data: np.ndarray
    space: str
    name: str
    known: bool


@dataclasses.dataclass(eq=False)
class _Barrier:
    """Copies that are under way to each slot of a barrier, oldest first."""

    arrivals: int
    pending: dict[int, list[Callable[[], None]]] = dataclasses.field(default_factory=dict)


class _Unknown:
    """A value that was not computed."""


UNKNOWN = _Unknown()


class _Emulator:
    def __init__(self, launch: Launch, inputs: list[Any], values: bool):
        if launch.threads != 1:
            raise NotImplementedError(f"{launch.name}: kernels of several warpgroups are not emulated.")
        self.launch, self.values = launch, values
        self.faults: list[str] = []
        self.memory: list[_Buffer] = []
        self.writers: dict[_Buffer, np.ndarray] = {}
        for position, aval in enumerate(launch.avals):
            shape, dtype = aval.shape, aval.dtype
            if position < launch.inputs:
                given = inputs[position]
                known = isinstance(given, np.ndarray)
                data = given if known else np.broadcast_to(np.zeros((), np.int8), shape)
                buffer = _Buffer(data, "gmem", f"in[{position}]", known)
            else:
                data = np.full(shape, _garbage(dtype)) if values else np.broadcast_to(np.int8(0), shape)
                buffer = _Buffer(data, "gmem", f"out[{position - launch.inputs}]", values)
                self.writers[buffer] = np.full(shape, -1, np.int32)
            self.memory.append(buffer)

    def fault(self, message: str) -> None:
        if message not in self.faults and len(self.faults) < MOST_FAULTS:
            self.faults.append(message)

    def run(self, most_programs: int | None = None) -> None:
        """Runs the programs of the grid."""
        grid, total = self.launch.grid, math.prod(self.launch.grid)
        all_of_them = most_programs is None or total <= most_programs
        sides = [range(side) if all_of_them else sorted({0, side - 1}) for side in grid]
        for place in itertools.product(*sides):
            self.place = dict(zip(self.launch.axes, place, strict=True))
            self.program = int(np.ravel_multi_index(place, grid)) if grid else 0
            self.stores: list[list[Callable[[], None]]] = [[]]
            self.reading: list[list[np.ndarray]] = []
            self.uncommitted = False
            pairs = zip(self.launch.references, self.memory, strict=True)
            known = {variable: buffer for variable, buffer in pairs if variable is not None}
            self.jaxpr(self.launch.jaxpr, known)
            if any(self.stores):
                self.fault(
                    "a program ends before its copies to global memory do: wait_smem_to_gmem(0) is missing"
                )
            for group in self.stores:
                for store in group:
                    store()
        if all_of_them:
            for buffer, writers in self.writers.items():
                left = int(np.sum(writers < 0))
                if left:
                    self.fault(f"{buffer.name}: {left} of {writers.size} elements are never written")

    def jaxpr(self, jaxpr: Any, known: dict[Any, Any]) -> list[Any]:
        """Runs equations, given what the variables stand for."""

        def read(atom: Any) -> Any:
            return np.asarray(atom.val) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def closed(self, closed: Any, operands: list[Any]) -> list[Any]:
        jaxpr = getattr(closed, "jaxpr", closed)
        constants = zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True)
        known = {variable: np.asarray(constant) for variable, constant in constants}
        return self.jaxpr(jaxpr, known | dict(zip(jaxpr.invars, operands, strict=True)))

    def equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        name = equation.primitive.name
        method = getattr(self, "_" + name.removesuffix("_p"), None)
        if method is not None:
            return method(equation, operands)
        if name in _IGNORED:
            return operands[: len(equation.outvars)]
        if name in _CALLS:
            return self.closed(equation.params.get("jaxpr", equation.params.get("call_jaxpr")), operands)
        aval = equation.outvars[0].aval
        if any(operand is UNKNOWN for operand in operands):
            if name == "select_n" and operands[0] is not UNKNOWN and operands[0].ndim == 0:
                return [operands[1 + int(operands[0])]]
            return [UNKNOWN] * len(equation.outvars)
        if not self.values and math.prod(aval.shape) > 1:
            return [UNKNOWN] * len(equation.outvars)
        if name not in NUMPY:
            raise NotImplementedError(f"{self.launch.name}: the emulator does not know {name}.")
        with np.errstate(all="ignore"):
            result = NUMPY[name](*operands, **equation.params)
        return [np.asarray(result).astype(aval.dtype).reshape(aval.shape)]

    # Control.

    def _axis_index(self, equation: Any, _: list[Any]) -> list[Any]:
        return [np.asarray(self.place[equation.params["axis_name"]], np.int32)]

    def _cond(self, equation: Any, operands: list[Any]) -> list[Any]:
        chosen, *others = operands
        branches = equation.params["branches"]
        if chosen is UNKNOWN:
            if self.values or equation.outvars:
                raise NotImplementedError(
                    f"{self.launch.name}: a branch depends on values: give the linter arrays that hold them."
                )
            # Each is complete in itself, and what it leaves is in memory.
            for branch in branches:
                self.closed(branch, others)
            return []
        return self.closed(branches[min(max(int(chosen), 0), len(branches) - 1)], others)

    def _while(self, equation: Any, operands: list[Any]) -> list[Any]:
        parameters = equation.params
        skip, constants = parameters["cond_nconsts"], parameters["body_nconsts"]
        of_test, of_body = operands[:skip], operands[skip : skip + constants]
        carry = operands[skip + constants :]
        while True:
            goes_on = self.closed(parameters["cond_jaxpr"], [*of_test, *carry])[0]
            if goes_on is UNKNOWN:
                raise NotImplementedError(
                    f"{self.launch.name}: a loop depends on values: give the linter arrays that hold them."
                )
            if not goes_on:
                return carry
            carry = self.closed(parameters["body_jaxpr"], [*of_body, *carry])

    def _scan(self, equation: Any, operands: list[Any]) -> list[Any]:
        parameters = equation.params
        carries = len(equation.outvars)
        constants = len(operands) - carries
        given = [(atom.aval.shape, atom.aval.dtype) for atom in equation.invars[constants:]]
        if given != [(out.aval.shape, out.aval.dtype) for out in equation.outvars]:
            raise NotImplementedError(f"{self.launch.name}: the emulator knows loops with carries alone.")
        carry = operands[constants:]
        for _ in range(parameters["length"]):
            carry = self.closed(parameters["jaxpr"], [*operands[:constants], *carry])
        return carry

    def _run_scoped(self, equation: Any, operands: list[Any]) -> list[Any]:
        jaxpr = equation.params["jaxpr"]
        made = [self._allocate(variable) for variable in jaxpr.invars]
        return self.jaxpr(
            jaxpr, dict(zip([*jaxpr.constvars, *jaxpr.invars], [*operands, *made], strict=True))
        )

    def _allocate(self, variable: Any) -> Any:
        aval = variable.aval
        inner = getattr(aval, "inner_aval", aval)
        if hasattr(inner.dtype, "num_arrivals"):
            return _Barrier(inner.dtype.num_arrivals)
        space = "acc" if "regs" in str(getattr(aval, "memory_space", "")).lower() else "smem"
        start = 0 if space == "acc" else _garbage(inner.dtype)
        return _Buffer(np.full(inner.shape, start).astype(inner.dtype), space, space, self.values)

    # Memory.

    def view(self, buffer: _Buffer, transforms: Any, data: np.ndarray | None = None) -> np.ndarray | None:
        """A part of a buffer, through which it can be written; None where it is not inside."""
        view = buffer.data if data is None else data
        for transform in transforms:
            if hasattr(transform, "indices"):
                places: list[Any] = []
                for index, side in zip(transform.indices, view.shape, strict=True):
                    start, size, stride = index, 1, 1
                    if hasattr(index, "size") and hasattr(index, "start"):
                        start, size, stride = index.start, index.size, index.stride or 1
                    if start is UNKNOWN:
                        raise NotImplementedError(
                            f"{self.launch.name}: an index depends on values: give the linter arrays."
                        )
                    start, last = int(start), int(start) + (size - 1) * stride
                    if start < 0 or last >= side:
                        outside = f"indices {start} to {last} leave an axis of {side}"
                        self.fault(f"{buffer.name}: {outside} (program {self.place})")
                        return None
                    whole = hasattr(index, "size") and hasattr(index, "start")
                    places.append(slice(start, last + 1, stride) if whole else start)
                view = view[tuple(places)]
            elif hasattr(transform, "permutation"):
                view = view.transpose(transform.permutation)
            else:
                raise NotImplementedError(
                    f"{self.launch.name}: the emulator does not know {type(transform).__name__}; kernels"
                    " leave layouts to the compiler."
                )
        return view

    def _get(self, equation: Any, operands: list[Any]) -> list[Any]:
        buffer, *leaves = operands
        transforms = jax.tree.unflatten(equation.params["tree"], leaves)
        view = self.view(buffer, transforms)
        known = buffer.known and view is not None
        return [np.array(view) if known else UNKNOWN]

    _load = _get

    def _swap(self, equation: Any, operands: list[Any]) -> list[Any]:
        buffer, value, *leaves = operands
        transforms = jax.tree.unflatten(equation.params["tree"], leaves)
        view = self.view(buffer, transforms)
        old: Any = UNKNOWN
        if view is not None and self.values:
            old = np.array(view)
            view[...] = value
        self._mark(buffer, transforms)
        self.uncommitted |= buffer.space == "smem"
        return [old] if equation.outvars else []

    def _mark(self, buffer: _Buffer, transforms: Any) -> None:
        """Notes who wrote a part of global memory."""
        if buffer.space != "gmem":
            return
        if buffer not in self.writers:
            self.fault(f"{buffer.name} is written, and it is an input")
            return
        writer = self.view(buffer, transforms, self.writers[buffer])
        if writer is None:
            return
        if ((writer >= 0) & (writer != self.program)).any():
            self.fault(f"{buffer.name}: two programs write the same elements (program {self.place})")
        writer[...] = self.program

    def _copy_gmem_to_smem(self, equation: Any, operands: list[Any]) -> list[Any]:
        parameters = equation.params
        if parameters.get("collective_axes") or parameters.get("has_user_predicate"):
            raise NotImplementedError(f"{self.launch.name}: copies of clusters or warps are not emulated.")
        source, target, barrier, *leaves = operands
        trees = [parameters[f"{which}_transforms_treedef"] for which in ("src", "dst", "barrier")]
        of_source, of_target, of_barrier = _unflatten(trees, leaves)
        read, written = self.view(source, of_source), self.view(target, of_target)
        slot = _slot(of_barrier)
        used = [view for group in self.reading for view in group]
        if written is not None and any(np.shares_memory(written, view) for view in used):
            self.fault("a copy overwrites shared memory that a wgmma still reads: wgmma_wait is missing")

        def land() -> None:
            if read is not None and written is not None and self.values:
                written[...] = read

        barrier.pending.setdefault(slot, []).append(land)
        return []

    def _barrier_wait(self, equation: Any, operands: list[Any]) -> list[Any]:
        barrier, *leaves = operands
        slot = _slot(jax.tree.unflatten(equation.params["transforms_treedef"], leaves))
        pending = barrier.pending.setdefault(slot, [])
        if len(pending) < barrier.arrivals:
            self.fault(
                f"a barrier waits for {barrier.arrivals} copies and {len(pending)} are under way: a hang"
            )
        for land in pending[: barrier.arrivals]:
            land()
        del pending[: barrier.arrivals]
        return []

    def _copy_smem_to_gmem(self, equation: Any, operands: list[Any]) -> list[Any]:
        parameters = equation.params
        if parameters.get("reduction_op"):
            raise NotImplementedError(f"{self.launch.name}: copies that add are not emulated.")
        if parameters.get("has_user_predicate"):
            *operands, wanted = operands
            if wanted is UNKNOWN:
                raise NotImplementedError(
                    f"{self.launch.name}: a copy depends on values: give the linter arrays that hold them."
                )
            if not wanted:
                return []
        source, target, *leaves = operands
        trees = [parameters[f"{which}_transforms_treedef"] for which in ("src", "dst")]
        of_source, of_target = _unflatten(trees, leaves)
        if self.uncommitted:
            self.fault("a copy to global memory follows a write to shared memory without commit_smem")
        read, written = self.view(source, of_source), self.view(target, of_target)
        self._mark(target, of_target)

        def land() -> None:
            if written is not None and self.values:
                written[...] = read

        self.stores[-1].append(land)
        if parameters.get("commit_group", True):
            self.stores.append([])
        return []

    def _commit_group(self, *_: Any) -> list[Any]:
        self.stores.append([])
        return []

    def _commit_smem(self, *_: Any) -> list[Any]:
        self.uncommitted = False
        return []

    def _wait_smem_to_gmem(self, equation: Any, operands: list[Any]) -> list[Any]:
        left = int(operands[0]) if operands else equation.params["n"]
        groups = [group for group in self.stores if group]
        for group in groups[: len(groups) - left]:
            for store in group:
                store()
        self.stores = [*groups[len(groups) - left :], []]
        return []

    # Products of matrices.

    def _wgmma_ref(self, equation: Any, operands: list[Any]) -> list[Any]:
        accumulator, a, b, *leaves = operands
        trees = [equation.params[f"{which}_transforms_tree"] for which in ("acc", "a", "b")]
        into, *of = _unflatten(trees, leaves)
        used, factors = [], []
        for factor, transforms in zip((a, b), of, strict=True):
            if isinstance(factor, _Buffer):
                view = self.view(factor, transforms)
                used += [] if view is None else [view]
                factors.append(view)
            else:
                factors.append(factor)
        self.reading.append(used)
        if self.values:
            left, right = (np.asarray(factor, np.float32) for factor in factors)
            total: Any = self.view(accumulator, into)
            with np.errstate(all="ignore"):
                total += left @ right
        return []

    def _wgmma_wait(self, equation: Any, operands: list[Any]) -> list[Any]:
        left = int(operands[0]) if operands else equation.params["n"]
        self.reading = self.reading[len(self.reading) - left :] if left else []
        return []

    def _wgmma_accumulator_deref(self, equation: Any, operands: list[Any]) -> list[Any]:
        left = equation.params.get("wait_n") or 0
        self.reading = self.reading[len(self.reading) - left :] if left else []
        return [np.array(operands[0].data) if self.values else UNKNOWN]


def _unflatten(trees: list[Any], leaves: list[Any]) -> list[Any]:
    """Transforms of several references, whose leaves follow each other."""
    found = []
    for tree in trees:
        count = 0 if tree is None else tree.num_leaves
        found.append(() if tree is None else jax.tree.unflatten(tree, leaves[:count]))
        leaves = leaves[count:]
    return found


def _slot(transforms: Any) -> int:
    for transform in transforms:
        if hasattr(transform, "indices"):
            return int(transform.indices[0])
    return 0


def _garbage(dtype: Any) -> Any:
    """What memory holds that nobody wrote."""
    return np.asarray(np.nan if jax.numpy.issubdtype(dtype, jax.numpy.floating) else -1).astype(dtype)


# What only concerns layouts, registers and order.
_IGNORED = {
    "layout_cast",
    "optimization_barrier",
    "set_max_registers",
    "async_prefetch",
    "stop_gradient",
}
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "core_call"}
