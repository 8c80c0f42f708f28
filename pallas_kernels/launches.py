"""Mosaic GPU kernels in traced programs, which jax 0.10 writes as `core_map` and later ones as `mpmd_map`."""

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Launch:
    """A Mosaic GPU kernel in a traced program.

    Attributes:
      name: of the kernel.
      jaxpr: its body.
      references: variables of the body that stand for the inputs and then the outputs, None for one that it
        does not use.
      avals: shapes and types of those.
      inputs: how many of them are inputs.
      operands: what the inputs are, where the kernel is launched.
      grid: programs along each axis.
      axes: names of the axes.
      threads: warpgroups of a block.
    """

    name: str
    jaxpr: Any
    references: tuple[Any, ...]
    avals: tuple[Any, ...]
    inputs: int
    operands: tuple[Any, ...]
    grid: tuple[int, ...]
    axes: tuple[str, ...]
    threads: int


def launch_of(equation: Any, around: Any, outputs: int) -> Launch | None:
    """The kernel that an equation launches, where it launches one on a GPU.

    Args:
      equation: of any kind.
      around: the jaxpr it stands in.
      outputs: results of the call that it stands in.
    """
    parameters = equation.params
    if equation.primitive.name == "mpmd_map":
        mesh, jaxpr = parameters["meshes"][0], parameters["jaxprs"][0]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        inputs = len(jaxpr.invars) - len(parameters["out_avals"])
        references, given, operands = jaxpr.invars, jaxpr.invars, equation.invars[:inputs]
    elif equation.primitive.name == "core_map":
        # It closes over its references in the order of their first use.
        mesh, jaxpr, given = parameters["mesh"], parameters["jaxpr"], around.invars
        stands = dict(zip(equation.invars, jaxpr.constvars, strict=True))
        inputs = len(given) - outputs
        references, operands = [stands.get(variable) for variable in given], given[:inputs]
    else:
        return None
    if not hasattr(mesh, "grid_names") or not hasattr(mesh, "cluster"):
        return None
    return Launch(
        name=mesh.kernel_name or parameters.get("name") or "kernel",
        jaxpr=jaxpr,
        references=tuple(references),
        avals=tuple(variable.aval for variable in given),
        inputs=inputs,
        operands=tuple(operands),
        grid=tuple(mesh.grid),
        axes=tuple(mesh.grid_names),
        threads=mesh.num_threads or 1,
    )


def launches(jaxpr: Any, outputs: int = 0) -> Iterator[Launch]:
    """The Mosaic GPU kernels of a traced program, in order; each stands in a call with its results alone."""
    for equation in jaxpr.eqns:
        launch = launch_of(equation, jaxpr, outputs)
        if launch is not None:
            yield launch
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    wraps = equation.primitive.name == "custom_vmap_call"
                    yield from launches(inner, len(equation.outvars) if wraps else outputs)
