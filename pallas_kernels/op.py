"""An operation with kernels: a specification in plain JAX, and what computes it faster on some platforms.

`implementation=None` leaves the choice to lowering, where the platform is known, by a primitive with one
lowering rule a platform, as `jax.lax.platform_dependent` has: the GPU's kernel for `cuda`, the TPU's for
`tpu`, the specification elsewhere. A program exported for several platforms holds one of each. No default
device is asked, and what is not lowered is not even traced.

A rule first lowers the kernel alone, in a module that is thrown away. Where that raises, whatever it raises,
the specification is lowered in its place, with one warning that says what was raised; `strict` raises
instead. So a fault in a kernel is never silent, and there are faults that nobody catches here: what the
compilers behind (`ptxas`, libtpu) refuse after lowering, which is shared memory, registers and vector memory
for the most part, and wrong numbers. `pallas_kernels.aot` compiles every kernel for that reason.

Two more things lead to the specification with a warning, as kernels cannot do them: a program that the
compiler would cut for several devices by itself (put the call in a `jax.shard_map`), and a GPU that is not of
a generation the kernel is written for. An implementation that is named is never replaced.

Derivatives: the cotangents come from the backward kernel by the same rules, or from the specification by
differentiation. Both get the arguments again and nothing else, so either may follow either.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import core
from jax.interpreters import batching, mlir

from pallas_kernels import versions

Implementation = Literal["reference", "gpu", "tpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
# Where `interpret` is False a kernel is compiled.
Interpret = Any
# The platforms of lowering and what is written for them; for all others there is the specification.
_PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}


class Unsupported(ValueError):
    """Arguments that no implementation takes; the message says which are."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation on arrays, and its kernels.

    Static options are keyword arguments of all functions; they must be hashable. Kernels take `interpret`
    besides: False compiles, True or the parameters of an interpreter run anywhere.

    Attributes:
      name: shown by warnings, profilers and tables.
      reference: the specification, `(*arrays, **options) -> outputs`.
      gpu: a kernel with the same signature, or None.
      tpu: likewise.
      gpu_backward: `(*arrays, cotangents, **options) -> cotangents of the arrays`, None for integers.
      tpu_backward: likewise.
      cost: `(*arrays, **options) -> pl.CostEstimate`, by shapes alone.
      capabilities: major compute capabilities of GPUs that the kernels are written for.
    """

    name: str
    reference: Callable[..., Any]
    gpu: Callable[..., Any] | None = None
    tpu: Callable[..., Any] | None = None
    gpu_backward: Callable[..., Any] | None = None
    tpu_backward: Callable[..., Any] | None = None
    cost: Callable[..., pl.CostEstimate] | None = None
    capabilities: tuple[int, ...] = (9,)

    def __call__(
        self,
        *arrays: Any,
        implementation: Implementation | None = None,
        interpret: Interpret = False,
        strict: bool = False,
        **options: Hashable,
    ) -> Any:
        """Computes the operation; differentiable in the arrays of floats.

        Args:
          arrays: arguments; None where the operation allows it.
          implementation: None chooses where the program is lowered.
          interpret: runs the kernel of the named implementation on any platform, for tests.
          strict: whether a kernel that does not lower is an error.
          options: static options.

        Raises:
          Unsupported: for an implementation that there is not, or nothing to interpret.
        """
        if implementation is not None and implementation not in IMPLEMENTATIONS:
            named = ", ".join(map(repr, IMPLEMENTATIONS))
            raise Unsupported(f"{self.name}: implementation={implementation!r} is none of {named}, None.")
        if implementation in ("gpu", "tpu") and getattr(self, implementation) is None:
            raise Unsupported(
                f"{self.name} has no kernel for the {implementation}: give another implementation."
            )
        if interpret and implementation not in ("gpu", "tpu"):
            raise Unsupported(
                f"{self.name}: interpret runs one kernel; name it: implementation='gpu' or 'tpu'."
            )
        if implementation == "reference":
            return self.reference(*arrays, **options)
        call = _Call(self, implementation, interpret, strict, tuple(sorted(options.items())))
        return _differentiable(call)(*arrays)


@dataclasses.dataclass(frozen=True)
class _Call:
    """An operation with everything but its arrays."""

    op: Op
    implementation: str | None
    interpret: Interpret
    strict: bool
    options: tuple[tuple[str, Hashable], ...]

    def forward(self, implementation: str, *arrays: Any) -> Any:
        options = dict(self.options)
        if implementation == "reference":
            return self.op.reference(*arrays, **options)
        return getattr(self.op, implementation)(*arrays, interpret=self.interpret, **options)

    def backward(self, implementation: str, arrays: tuple[Any, ...], cotangents: Any) -> Any:
        """Cotangents of the arrays, None for those that have none."""
        options = dict(self.options)
        kernel = getattr(self.op, f"{implementation}_backward", None)
        if implementation != "reference" and kernel is not None:
            return tuple(kernel(*arrays, cotangents, interpret=self.interpret, **options))
        floats = [position for position, array in enumerate(arrays) if _differs(array)]

        def of_floats(*some: Any) -> Any:
            whole = list(arrays)
            for position, array in zip(floats, some, strict=True):
                whole[position] = array
            return self.op.reference(*whole, **options)

        _, pullback = jax.vjp(of_floats, *(arrays[position] for position in floats))
        found = dict(zip(floats, pullback(cotangents), strict=True))
        return tuple(found.get(position) for position in range(len(arrays)))

    def has(self, implementation: str, direction: str) -> bool:
        suffix = "_backward" if direction == "backward" else ""
        return getattr(self.op, implementation + suffix) is not None


def _differs(array: Any) -> bool:
    """Whether something has a derivative in this argument."""
    return array is not None and jax.numpy.issubdtype(array.dtype, jax.numpy.floating)


@functools.lru_cache(maxsize=1024)
def _differentiable(call: _Call) -> Callable[..., Any]:
    def run(direction: str, *arguments: Any) -> Any:
        of = functools.partial(_run, call, direction)
        if call.implementation is None:
            return _chosen_at_lowering(call, direction, arguments)
        return of(call.implementation, *arguments)

    @jax.custom_vjp
    def op(*arrays: Any) -> Any:
        return run("forward", *arrays)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        return op(*arrays), arrays

    def backward(arrays: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
        found = run("backward", arrays, cotangents)
        return tuple(_tangent_of(array, given) for array, given in zip(arrays, found, strict=True))

    op.defvjp(forward, backward)
    return op


def _run(call: _Call, direction: str, implementation: str, *arguments: Any) -> Any:
    return getattr(call, direction)(implementation, *arguments)


def _tangent_of(array: Any, cotangent: Any) -> Any:
    if array is None or _differs(array):
        return cotangent
    return np.zeros(array.shape, jax.dtypes.float0)


# The primitive. Its `jaxpr` is the specification's: whoever walks a program, to count what it does or to
# check it, finds that and need not know the kernels.

kernel_p = core.Primitive("kernel_or_reference")
kernel_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A call from flat arrays to flat arrays, mapped over axes of them as often as `vmap` was applied."""

    call: _Call
    direction: str
    tree: Any
    axes: tuple[tuple[int | None, ...], ...] = ()

    def function(self, implementation: str) -> Callable[..., list[Any]]:
        def flat(*leaves: Any) -> list[Any]:
            arguments = jax.tree.unflatten(self.tree, leaves)
            return jax.tree.leaves(_run(self.call, self.direction, implementation, *arguments))

        mapped: Callable[..., list[Any]] = flat
        for axes in self.axes:
            mapped = jax.vmap(mapped, axes)
        return mapped


def _chosen_at_lowering(call: _Call, direction: str, arguments: tuple[Any, ...]) -> Any:
    leaves, tree = jax.tree.flatten(arguments)
    flat = _Flat(call, direction, tree)
    outputs = jax.eval_shape(functools.partial(_run, call, direction, "reference"), *arguments)
    return jax.tree.unflatten(jax.tree.structure(outputs), _bind(flat, leaves))


def _bind(flat: _Flat, leaves: list[Any]) -> list[Any]:
    jaxpr = jax.make_jaxpr(flat.function("reference"))(*leaves)
    return kernel_p.bind(*leaves, flat=flat, jaxpr=jaxpr)


@kernel_p.def_abstract_eval
def _abstract(*_: Any, flat: _Flat, jaxpr: core.ClosedJaxpr) -> list[Any]:
    del flat
    return list(jaxpr.out_avals)


@functools.lru_cache(maxsize=1024)
def _compiled(flat: _Flat) -> Callable[..., list[Any]]:
    return jax.jit(lambda *leaves: _bind(flat, list(leaves)))


@kernel_p.def_impl
def _eager(*leaves: Any, flat: _Flat, jaxpr: core.ClosedJaxpr) -> list[Any]:
    del jaxpr
    return _compiled(flat)(*leaves)


def _batched(leaves: Any, axes: Any, *, flat: _Flat, jaxpr: core.ClosedJaxpr) -> tuple[list[Any], list[int]]:
    del jaxpr
    over = tuple(axis if isinstance(axis, int) else None for axis in axes)
    outputs = _bind(dataclasses.replace(flat, axes=(*flat.axes, over)), list(leaves))
    return outputs, [0] * len(outputs)


batching.primitive_batchers[kernel_p] = _batched


def _lower(platform: str, context: mlir.LoweringRuleContext, *leaves: Any, flat: _Flat, jaxpr: Any) -> Any:
    implementation = _PLATFORMS.get(platform, "reference")
    if implementation != "reference":
        refused = _refused(platform, implementation, context, flat)
        if refused is not None:
            _fall_back(flat, platform, refused)
            implementation = "reference"
        elif not flat.call.has(implementation, flat.direction):
            implementation = "reference"
    if implementation == "reference":
        return mlir.lower_fun(core.jaxpr_as_fun(jaxpr), multiple_results=True)(context, *leaves)
    return mlir.lower_fun(flat.function(implementation), multiple_results=True)(context, *leaves)


def _refused(platform: str, implementation: str, context: mlir.LoweringRuleContext, flat: _Flat) -> Any:
    """Why the kernel cannot be lowered here: a sentence, what was raised, or None."""
    if not flat.call.has(implementation, flat.direction):
        return None
    devices = versions.many_devices(context)
    if devices > 1:
        return f"no kernel is cut over {devices} devices by itself: put the call in a jax.shard_map"
    capability = versions.compute_capability(context) if platform == "cuda" else None
    if capability is not None and capability[0] not in flat.call.op.capabilities:
        known = ", ".join(f"{major}.x" for major in flat.call.op.capabilities)
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, its kernel is for {known}"
    return _raised(platform, implementation, flat, tuple(context.avals_in))


@functools.lru_cache(maxsize=1024)
def _raised(platform: str, implementation: str, flat: _Flat, avals: tuple[Any, ...]) -> Exception | None:
    """What lowering the kernel alone raises."""
    alone = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    try:
        jax.jit(flat.function(implementation)).trace(*alone).lower(lowering_platforms=(platform,))
    except Exception as error:
        return error
    return None


_warned: set[tuple[str, str, str]] = set()


def _fall_back(flat: _Flat, platform: str, refused: str | Exception) -> None:
    """Warns once that the specification stands in for a kernel.

    Raises:
      RuntimeError: in its place, where the call is strict.
    """
    op = flat.call.op
    why = refused if isinstance(refused, str) else f"{type(refused).__name__}: {refused}".splitlines()[0]
    message = f"{op.name} ({flat.direction}): no kernel for {platform}, its reference is used: {why}"
    if flat.call.strict:
        cause = refused if isinstance(refused, Exception) else None
        raise RuntimeError(
            f"{op.name} ({flat.direction}), strict: no kernel for {platform}: {why}"
        ) from cause
    key = (op.name, flat.direction, why)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


mlir.register_lowering(kernel_p, functools.partial(_lower, "default"))
for _platform in _PLATFORMS:
    mlir.register_lowering(kernel_p, functools.partial(_lower, _platform), platform=_platform)
