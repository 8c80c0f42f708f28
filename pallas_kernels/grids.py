"""Index maps of `pl.pallas_call`, evaluated at all programs of a grid at once."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.arithmetic import NUMPY

_COPIES = "copies"


def copies(count: int) -> dict[str, str]:
    """The `metadata` of a kernel that copies so many bytes by hand from operands that no index map cuts."""
    return {_COPIES: str(count)}


def programs_of(grid: tuple[int, ...]) -> np.ndarray:
    """`[axes, programs]` int32, in the order in which a TPU runs them."""
    return np.indices(grid, dtype=np.int32).reshape(len(grid), -1) if grid else np.zeros((0, 1), np.int32)


def pallas_calls(jaxpr: Any, arguments: Any) -> Iterator[tuple[Any, list[np.ndarray | None]]]:
    """The equations of a jaxpr, and of those in it, that call a kernel with index maps.

    Args:
      jaxpr: of a traced function.
      arguments: of that function, of which arrays are known and shapes are not.

    Yields:
      Each with what is known of its operands.
    """
    yield from _calls(jaxpr, known_of(jaxpr, arguments))


def _calls(jaxpr: Any, known: dict[Any, np.ndarray]) -> Iterator[tuple[Any, list[np.ndarray | None]]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, [known.get(atom) for atom in atoms(equation)]
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _calls(inner, handed(equation, inner, known))


def known_of(jaxpr: Any, arguments: Any) -> dict[Any, np.ndarray]:
    """Arrays among the arguments of a jaxpr, by its variables."""
    return {
        variable: np.asarray(leaf)
        for variable, leaf in zip(jaxpr.invars, jax.tree.leaves(arguments), strict=True)
        if not isinstance(leaf, jax.ShapeDtypeStruct)
    }


def atoms(equation: Any) -> list[Any]:
    """Operands, with None for constants, which are nobody's variables."""
    return [None if hasattr(atom, "val") else atom for atom in equation.invars]


def handed(equation: Any, inner: Any, known: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """What is known of the variables of an inner jaxpr, where operands stand for them one to one."""
    given = atoms(equation)
    if len(given) != len(inner.invars):
        return {}
    pairs = zip(inner.invars, given, strict=True)
    return {variable: known[atom] for variable, atom in pairs if atom in known}


def traffic(equation: Any, operands: list[np.ndarray | None]) -> int:
    """Bytes that the pipeline of a kernel moves: a block comes, or goes, when its index changes.

    What a kernel copies by hand is believed, not followed: `copies`; where it says nothing, all of it counts.

    Args:
      equation: that calls the kernel.
      operands: what is known of them; index maps may read the first ones.

    Raises:
      ValueError: where an index map depends on values that are not known.
    """
    mapping = equation.params["grid_mapping"]
    said = dict(equation.params.get("metadata") or {}).get(_COPIES)
    total = 0 if said is None else int(said)
    places = programs_of(tuple(int(side) for side in mapping.grid))
    for block in mapping.block_mappings:
        if said is not None and by_hand(block):
            continue
        array = getattr(block, "array_aval", None) or block.array_shape_dtype
        indices = indices_of(block, places, operands[: mapping.num_index_operands])
        if indices is None:
            raise ValueError("an index map depends on values")
        moves = 1 + int((np.diff(indices, axis=1) != 0).any(0).sum()) if indices.size else 1
        total += moves * math.prod(sides_of(block)[0]) * array.dtype.itemsize
    return total


def by_hand(block: Any) -> bool:
    """Whether the kernel is given a reference to memory that it copies from itself."""
    aval = getattr(block, "transformed_block_aval", None) or getattr(block, "block_aval", None)
    return any(word in str(getattr(aval, "memory_space", "")).lower() for word in ("any", "hbm"))


def sides_of(block: Any) -> tuple[tuple[int, ...], list[bool]]:
    """The shape of a block, and along which axes its index counts elements and not blocks."""
    sides, by_element = [], []
    for part in block.block_shape:
        size = getattr(part, "block_size", part)
        sides.append(1 if size is None or not isinstance(size, int) else size)
        by_element.append(type(part).__name__ in ("Element", "BoundedSlice"))
    return tuple(sides), by_element


def indices_of(block: Any, places: np.ndarray, scalars: list[np.ndarray | None]) -> np.ndarray | None:
    """The index map at all programs at once, `[axes, programs]`; None where it asks for unknown values."""
    closed = block.index_map_jaxpr
    results = evaluate(closed.jaxpr, closed.consts, [*places, *scalars])
    if any(result is None for result in results):
        return None
    return np.stack([np.broadcast_to(result, places.shape[1]).astype(np.int64) for result in results])


def evaluate(jaxpr: Any, constants: Any, operands: list[Any]) -> list[Any]:
    """Runs a jaxpr of scalars on arrays that hold them for every program; None is unknown."""
    known = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    known |= dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        values, parameters = [read(atom) for atom in equation.invars], equation.params
        name = equation.primitive.name
        inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
        if inner is not None:
            results = evaluate(inner.jaxpr, inner.consts, values)
        elif any(value is None for value in values):
            results = [None] * len(equation.outvars)
        elif name == "get":
            (transforms,) = [jax.tree.unflatten(parameters["tree"], values[1:])]
            at = tuple(
                np.clip(i, 0, s - 1) for i, s in zip(transforms[0].indices, values[0].shape, strict=True)
            )
            results = [values[0][at]]
        elif name in NUMPY:
            with np.errstate(all="ignore"):
                dtype = equation.outvars[0].aval.dtype
                results = [np.asarray(NUMPY[name](*values, **parameters)).astype(dtype)]
        else:
            raise NotImplementedError(f"the linter does not know {name} in an index map.")
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
