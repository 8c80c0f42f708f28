"""Finds in kernels what neither compilers nor interpreters report: edges, overlaps, gaps and overflows.

    lint(fn, *arguments) -> ["name: what is wrong", ...]

walks the traced program to every `pl.pallas_call` and evaluates its index maps at every program of the grid,
and follows every Mosaic GPU kernel (`plgpu.kernel`) by `pallas_kernels.emulate`. What is found:

    ragged edge     a block stands over the end of its array, and the kernel does not say that it masks
    leaves          an index map, or a copy, names something outside its array
    2^31            an array so large that offsets within it overflow 32 bits
    gap             a part of an output that no program writes
    overlap         a part of an output that programs write which may run at once; on a TPU also a block that
                    is left and comes again: what it held is not read back
    threads         more than 1024 a block, or warps that are no power of two
    compiler        `pl.pallas_call` without explicit compiler parameters: jax then chooses whose kernel it is

The sides of a TPU's grid that are "arbitrary", and those of which nothing is said, run one after the other: a
block may stay there over neighbouring programs and be added to. Programs of a "parallel" side may not share a
block, and programs of a GPU never.

A kernel that masks its ragged edges says so, operand by operand: `pl.pallas_call(..., metadata=masks("in[1]",
"out[0]"))`. Believed, not proved: the numeric tests do that, whose interpreter fills the rest with NaN.

Not followed: references to whole arrays in HBM from which a TPU kernel copies by hand.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels import emulate
from pallas_kernels.grids import atoms, by_hand, handed, indices_of, known_of, programs_of, sides_of
from pallas_kernels.launches import Launch, launch_of

MOST_PROGRAMS = 2**20
# Programs of a Mosaic GPU kernel are followed one by one, each for up to a second. Of more of them those at
# the corners of the grid are: gaps and overlaps are then left to the numeric tests, which run small grids.
MOST_FOLLOWED = 64
MOST_THREADS = 1024
_MASKS = "masks"


def masks(*operands: str) -> dict[str, str]:
    """The `metadata` of a kernel that masks the ragged edges of operands: `in[0]`, `out[1]`."""
    return {_MASKS: " ".join(operands)}


def lint(fn: Callable[..., Any], *arguments: Any) -> list[str]:
    """Finds faults in the kernels that a function calls.

    Args:
      fn: what calls them; name the implementation, else it is the reference that is traced.
      arguments: of the function. Shapes do (`jax.ShapeDtypeStruct`), except for scalars that index maps read
        or kernels branch on: of these, arrays.

    Returns:
      A line for each fault; none for a clean program.
    """
    jaxpr = jax.make_jaxpr(fn)(*arguments).jaxpr
    known = known_of(jaxpr, arguments)
    return list(dict.fromkeys(_walk(jaxpr, known)))


def _walk(jaxpr: Any, known: dict[Any, np.ndarray], outputs: int = 0) -> Iterator[str]:
    """Lines for the kernels in a jaxpr, of whose variables some are known."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            yield from _pallas_call(equation, [known.get(atom) for atom in atoms(equation)])
            continue
        launch = launch_of(equation, jaxpr, outputs)
        if launch is not None:
            given = [None if hasattr(atom, "val") else known.get(atom) for atom in launch.operands]
            yield from _mosaic_gpu(launch, given)
            continue
        inside = len(equation.outvars) if name == "custom_vmap_call" else outputs
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner, handed(equation, inner, known), inside)


def _mosaic_gpu(launch: Launch, inputs: list[np.ndarray | None]) -> Iterator[str]:
    threads = 128 * launch.threads
    if threads > MOST_THREADS:
        yield f"{launch.name}: {threads} threads a block, {MOST_THREADS} at most"
        return
    for aval in launch.avals:
        if math.prod(aval.shape) >= 2**31:
            yield f"{launch.name}: {aval.shape} has more than 2^31 elements: offsets overflow 32 bits"
            return
    for fault in emulate.check(launch, inputs, MOST_FOLLOWED):
        yield f"{launch.name}: {fault}"


def _pallas_call(equation: Any, operands: list[np.ndarray | None]) -> Iterator[str]:
    parameters = equation.params
    mapping, compiler = parameters["grid_mapping"], parameters.get("compiler_params")
    name = _name(parameters)
    masked = dict(parameters.get("metadata") or {}).get(_MASKS, "").split()
    aliased = {f"out[{output}]" for _, output in parameters.get("input_output_aliases", ())}
    on_tpu = "pallas.mosaic." in type(compiler).__module__
    if compiler is None:
        yield f"{name}: no compiler_params: whether Mosaic or Triton compiles it depends on jax's version"
    warps = getattr(compiler, "num_warps", None) or 4
    if not on_tpu and (warps * 32 > MOST_THREADS or warps & (warps - 1)):
        threads = f"{32 * warps} threads a block, of {MOST_THREADS} at most, in warps that are a power of two"
        yield f"{name}: num_warps={warps}: {threads}"
    grid = tuple(int(side) for side in mapping.grid)
    programs = math.prod(grid)
    if programs > MOST_PROGRAMS:
        yield f"{name}: {programs} programs are too many to be checked: lint a smaller shape"
        return
    places = programs_of(grid)
    parallel = _parallel(compiler, len(grid)) if on_tpu else [True] * len(grid)
    scalars = operands[: mapping.num_index_operands]
    for number, block in enumerate(mapping.block_mappings):
        of_output = number >= mapping.num_inputs
        tag = f"out[{number - mapping.num_inputs}]" if of_output else f"in[{number}]"
        shape = (getattr(block, "array_aval", None) or block.array_shape_dtype).shape
        say = f"{name}: {tag} {tuple(shape)}".format
        if math.prod(shape) >= 2**31:
            yield say() + " has more than 2^31 elements: offsets overflow 32 bits"
        if by_hand(block):
            continue
        sides, by_element = sides_of(block)
        ragged = any(side % part for side, part in zip(shape, sides, strict=True)) and not any(by_element)
        if ragged and tag not in masked:
            yield say() + f" is not divided by its block {sides}: a ragged edge that nobody says is masked"
        indices = indices_of(block, places, scalars)
        if indices is None:
            yield say() + ": its index map depends on values: lint with arrays in place of their shapes"
            continue
        steps = np.array([1 if element else side for side, element in zip(sides, by_element, strict=True)])
        starts = indices * steps[:, None]
        lengths = np.array([side if e else 1 for side, e in zip(sides, by_element, strict=True)])
        outside = (starts < 0) | (starts + lengths[:, None] > np.array(shape, np.int64)[:, None])
        if outside.any():
            first = places[:, outside.any(0)][:, 0].tolist()
            yield say() + f": its index map leaves the array at program {tuple(first)}"
        elif of_output:
            counts = [-(-side // step) for side, step in zip(shape, steps, strict=True)]
            yield from (
                say() + ": " + line
                for line in _writes(
                    indices, counts, places, parallel, on_tpu, tag in aliased or any(by_element)
                )
            )


def _writes(
    indices: np.ndarray,
    counts: list[int],
    places: np.ndarray,
    parallel: list[bool],
    on_tpu: bool,
    partly: bool,
) -> Iterator[str]:
    """Gaps and overlaps among the output blocks `[axes, programs]` that the programs have."""
    numbers = np.ravel_multi_index(tuple(indices), counts) if counts else np.zeros(places.shape[1], np.int64)
    distinct = len(np.unique(numbers))
    if distinct < math.prod(counts) and not partly:
        yield f"only {distinct} of {math.prod(counts)} blocks are written"
    # The programs that run at once have the same numbers on the other sides and differ in these.
    at_once = places[[axis for axis, one in enumerate(parallel) if one]]
    owners = len(np.unique(np.concatenate([numbers[None], at_once]), axis=1).T)
    if owners > distinct:
        yield f"{owners - distinct} times programs that run at once write the same block: a race"
    if on_tpu and owners == distinct:
        stays = 1 + int((numbers[1:] != numbers[:-1]).sum())
        if stays > distinct:
            yield f"{stays - distinct} times a block is left and comes again: what it held is lost"


def _name(parameters: dict[str, Any]) -> str:
    given = parameters.get("name") or parameters.get("name_and_src_info")
    if given is None:
        given = (parameters.get("debug_info") or parameters["jaxpr"].debug_info).func_name
    return str(given).split(" ")[0]


def _parallel(compiler: Any, sides: int) -> list[bool]:
    said = getattr(compiler, "dimension_semantics", None) or [None] * sides
    return ["parallel" in str(getattr(one, "value", one)).lower() for one in said]
