"""What differs between jax 0.10, 0.11 and 0.12. No other file here asks for a version or an internal name.

0.10  `plgpu.kernel(out_shape=, scratch_shapes=)`, without a cost; lane semantics are the default.
0.11  `out_type=` and `scratch_types=`; warpgroup semantics are the default; Pallas Triton is deprecated.
0.12  `plgpu.kernel` takes a cost.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

# The custom call that a Mosaic GPU kernel becomes: `jax.export` refuses it unless told otherwise.
MOSAIC_GPU_CALL = "mosaic_gpu_v2"


def mosaic_gpu() -> Any:
    """The module `jax.experimental.pallas.mosaic_gpu`, which needs more than jax does: it is imported late.

    Raises:
      ImportError: where absl-py is missing, that jax 0.10 imports there.
    """
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def mosaic_gpu_kernel(
    body: Callable[..., None],
    *,
    out: Any,
    scratch: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    name: str,
    cost: pl.CostEstimate | None = None,
    approximate: bool = False,
    warpgroups: int | None = None,
) -> Callable[..., Any]:
    """`plgpu.kernel`, spelled the same for every jax.

    Shared memory is laid out by the compiler (warpgroup semantics): kernels name no tiling and no swizzle.

    Args:
      body: gets references to the inputs, the outputs and the scratch.
      out: shapes of the outputs.
      scratch: shared memory and barriers.
      grid: programs.
      grid_names: an axis name for each side of the grid.
      name: shown by profilers and by the linter.
      cost: for XLA's scheduler; jax before 0.12 cannot be told.
      approximate: whether `exp` and `tanh` may be the hardware's own.
      warpgroups: of a block, along the axis `warpgroup`; None means one, without an axis.
    """
    plgpu = mosaic_gpu()
    known = inspect.signature(plgpu.kernel).parameters
    new = "out_type" in known
    options: dict[str, Any] = {
        "out_type" if new else "out_shape": out,
        "scratch_types" if new else "scratch_shapes": scratch,
    }
    if "cost_estimate" in known:
        options["cost_estimate"] = cost
    if warpgroups is not None:
        options |= dict(num_threads=warpgroups, thread_name="warpgroup")
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        body,
        grid=grid,
        grid_names=grid_names,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=approximate, lowering_semantics=semantics),
        **options,
    )


def many_devices(context: Any) -> int:
    """Over how many devices the compiler would have to cut a program by itself, given its lowering context.

    1 inside a `shard_map` over the whole mesh, where each device has a program of its own.
    """
    axes = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        left = [axis for axis in axes.mesh.axis_names if axis not in manual]
        return max([1, *(axes.mesh.shape[axis] for axis in left)])
    return getattr(axes, "num_devices", None) or 1


def compute_capability(context: Any) -> tuple[int, int] | None:
    """That of the GPU a program is lowered for; None where no GPU is here, as in ahead-of-time compiling."""
    backend = context.module_context.get_backend(optional=True)
    if backend is None or backend.platform not in ("gpu", "cuda"):
        return None
    major, _, minor = str(backend.devices()[0].compute_capability).partition(".")
    return int(major), int(minor or 0)


def version() -> str:
    """`0.12` of jax 0.12.0.1: what tables of measured blocks are keyed by."""
    return ".".join(jax.__version__.split(".")[:2])


def compilers() -> dict[str, str]:
    """Versions of the compilers for TPUs and GPUs that are installed."""
    found = {}
    for name in ("libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
