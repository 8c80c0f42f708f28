"""What a function costs, counted from its jaxpr: nothing runs, no device is touched, every trip counts."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.meta import Partitioned

from effjax.errors import UsageError
from effjax.matching import Rules, named_leaves
from effjax.measure.walk import Value, Walker


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates of one call of a function, for the whole batch and all devices."""

    parameters_by_path: Mapping[str, int]
    """Elements of each parameter, by its path: `blocks/mixer/query/kernel`."""
    parameter_bytes: Mapping[str, int]
    """Bytes of the parameters by dtype, sub-byte types at their width: `{"int4": 512}`."""
    macs_by_scope: Mapping[str, Mapping[str, int]]
    """Multiply-accumulates by module path, then by kind: attention, dense, convolution, kernel."""
    unknown: tuple[str, ...]
    """What the figures leave out, a phrase each: loops of unknown length, kernels that declare nothing."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(self.parameters_by_path.values())

    @property
    def macs_by_kind(self) -> dict[str, int]:
        """Multiply-accumulates by kind, kinds that do not occur left out."""
        kinds: collections.Counter[str] = collections.Counter()
        for macs in self.macs_by_scope.values():
            kinds.update(macs)
        return dict(sorted(kinds.items()))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of dots, convolutions and kernels; elementwise work and FFTs have none."""
        return sum(self.macs_by_kind.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of the same: two for each multiply-accumulate."""
        return 2 * self.macs


def count(
    function: Callable[..., Any],
    *arguments: Any,
    parameters: int | None = 0,
    branches: Rules = (),
    trips: Rules = (),
) -> Cost:
    """Counts what one call `function(*arguments)` costs.

    Scans count every trip, rematerialised work counts as often as it runs, a `shard_map` counts all its
    devices, and what no output needs does not count. Kinds: *attention* is a `dot_general` of two activations
    paired by a batch dimension; *dense* is every other dot, `ragged_dot` included; *convolution*; *kernel* is
    a `pallas_call`, by its declared `cost_estimate`. Gradients are counted like anything else:
    `count(jax.value_and_grad(loss), params, batch)`.

    Args:
      function: anything `jax.make_jaxpr` traces.
      *arguments: arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
      parameters: which argument holds the parameters, the first by the convention of this library; None for
        a function of data alone. Constants the function closes over are weights too.
      branches: `(regexp, index)` rules on the scope of a `cond`; the dearest branch where none matches.
      trips: `(regexp, trips)` rules on the scope of a `while` whose trip count depends on data. Without a
        rule such a loop counts nothing and stands in `Cost.unknown`.

    Raises:
      UsageError: for a parameter position that is no argument, or a rule that names no branch.
    """
    if parameters is not None and not 0 <= parameters < len(arguments):
        raise UsageError(
            f"parameters={parameters} is no argument: {len(arguments)} were given. "
            f"Use parameters=None where the function has none."
        )
    jaxpr = jax.make_jaxpr(function)(*arguments)
    values = [
        Value(weight=position == parameters)
        for position, argument in enumerate(arguments)
        for _ in jax.tree.leaves(argument)
    ]
    tally, _ = Walker(branches, trips).walk(jaxpr, values, [True] * len(jaxpr.jaxpr.outvars))
    macs: dict[str, dict[str, int]] = {}
    for (scope, kind), amount in tally.macs.items():
        macs.setdefault(scope, {})[kind] = amount
    held = {} if parameters is None else _parameters_of(arguments[parameters])
    return Cost(
        parameters_by_path={path: math.prod(leaf.shape) for path, leaf in held.items()},
        parameter_bytes=_bytes_by_dtype(held),
        macs_by_scope=macs,
        unknown=tuple(tally.unknown),
    )


def count_parameters(params: Any) -> int:
    """Number of parameters in a pytree of arrays or shapes; of Linen variables, in their `params`."""
    return sum(math.prod(leaf.shape) for leaf in _parameters_of(params).values())


def count_bytes(params: Any) -> dict[str, int]:
    """Bytes of the parameters by dtype, `{"bfloat16": 1024, "int4": 512}`; two int4 take one byte."""
    return _bytes_by_dtype(_parameters_of(params))


def _parameters_of(params: Any) -> dict[str, Any]:
    """Leaves by path, without random keys, the boxes of logical axis names, and Linen's other collections."""
    if isinstance(params, Mapping) and "params" in params:
        params = params["params"]
    params = jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Partitioned) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Partitioned),
    )
    leaves = named_leaves(jax.eval_shape(lambda tree: tree, params))
    return {
        path: leaf for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def _bytes_by_dtype(leaves: Mapping[str, Any]) -> dict[str, int]:
    held: collections.Counter[str] = collections.Counter()
    for leaf in leaves.values():
        held[leaf.dtype.name] += math.ceil(math.prod(leaf.shape) * bits_of(leaf.dtype) / 8)
    return dict(sorted(held.items()))


def bits_of(dtype: Any) -> int:
    """Width of one element in bits; numpy gives four-bit types a whole byte."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8
