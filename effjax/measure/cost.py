"""What a function costs, counted from its jaxpr: nothing runs, no device is touched, every trip counts."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from effjax.errors import UsageError
from effjax.matching import Rules, match
from effjax.measure.compulsory import Compulsory, compulsory
from effjax.measure.graph import flatten
from effjax.measure.memory import peak_bytes
from effjax.measure.parameters import (
    active_by_path,
    alternatives_of,
    count_bytes,
    leaf_paths,
    parameters_of,
    sizes_of,
)
from effjax.measure.walk import Value, Walker
from effjax.measure.work import Work, nested, total


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a function costs, for the whole batch and all devices."""

    parameters_by_path: Mapping[str, int]
    """Elements of each parameter, by its path: `blocks/mixer/query/kernel`."""
    trainable_by_path: Mapping[str, bool]
    """Whether each parameter trains."""
    active_by_path: Mapping[str, int]
    """Elements of each parameter that one token uses."""
    parameter_bytes: Mapping[str, int]
    """Bytes of the parameters by dtype, sub-byte types at their width: `{"int4": 512}`."""
    macs_by_path: Mapping[str, int]
    """Multiply-accumulates that each parameter takes part in, by its path."""
    work_by_scope: Mapping[str, Mapping[str, Work]]
    """Work by module path, then by kind: attention, dense, convolution, kernel, elementwise, gather."""
    compulsory: Compulsory
    """Bytes that no schedule avoids, by input and output: see `effjax.measure.compulsory`."""
    peak_bytes: int
    """Most bytes that stand in memory at one moment: see `effjax.measure.memory`."""
    unknown: tuple[str, ...]
    """What the figures leave out, a phrase each: loops of unknown length, kernels that declare nothing."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(self.parameters_by_path.values())

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(size for path, size in self.parameters_by_path.items() if self.trainable_by_path[path])

    @property
    def active(self) -> int:
        """Number of parameters that one token uses, all of them unless there are experts."""
        return sum(self.active_by_path.values())

    @property
    def work_by_kind(self) -> dict[str, Work]:
        """Work by kind, kinds that do not occur left out."""
        kinds: dict[str, Work] = {}
        for work in self.work_by_scope.values():
            for kind, amount in work.items():
                kinds[kind] = kinds.get(kind, Work()) + amount
        return dict(sorted(kinds.items()))

    @property
    def work(self) -> Work:
        """All work."""
        return total(self.work_by_kind.values())

    @property
    def macs_by_scope(self) -> dict[str, dict[str, int]]:
        """Multiply-accumulates by module path, then by kind: attention, dense, convolution, kernel."""
        scopes = ((scope, _macs(kinds)) for scope, kinds in self.work_by_scope.items())
        return {scope: kinds for scope, kinds in scopes if kinds}

    @property
    def macs_by_kind(self) -> dict[str, int]:
        """Multiply-accumulates by kind, kinds that do not occur left out."""
        return _macs(self.work_by_kind)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of dots, convolutions and kernels; elementwise work and FFTs have none."""
        return self.work.macs

    def macs_without_zeros(self, sparsity: Rules) -> int:
        """Multiply-accumulates where zeros of the matrices were skipped, as no kernel of this library does.

        Args:
          sparsity: `(regexp, share)` rules on the paths of the parameters, how much of each is zero; 0 where
            none matches. Of a forward pass: a product with two of them counts for both.

        Raises:
          UsageError: for a rule that matches no parameter, or what is no share.
        """
        for pattern, share in sparsity:
            if not 0 <= share <= 1:
                raise UsageError(f"sparsity: {share} for {pattern!r} is a share from 0 to 1.")
        shares = match(sparsity, dict(self.macs_by_path), default=0.0, where="sparsity")
        return self.macs - round(sum(share * self.macs_by_path[path] for path, share in shares.items()))

    @property
    def flops_by_kind(self) -> dict[str, int]:
        """Arithmetic operations by kind, kinds that do not occur left out."""
        return {kind: work.flops for kind, work in self.work_by_kind.items() if work.flops}

    @property
    def flops(self) -> int:
        """Arithmetic operations: two for each multiply-accumulate, one for each element of elementwise work
        and of what a reduction folds, integers and comparisons included; transcendentals apart."""
        return self.work.flops

    @property
    def transcendentals(self) -> int:
        """Exponentials, logarithms, roots, powers, trigonometry; one for each element."""
        return self.work.transcendentals

    @property
    def bytes_read(self) -> int:
        """Bytes read from memory, under the model of `effjax.measure.traffic`."""
        return self.work.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes written to memory, under the same model."""
        return self.work.bytes_written

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.work.bytes

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that no schedule avoids: what goes in and is used, what comes out, once each."""
        return self.compulsory.total

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations for each byte read or written."""
        return self.work.intensity


def count(
    function: Callable[..., Any],
    *arguments: Any,
    parameters: int | None = 0,
    branches: Rules = (),
    trips: Rules = (),
    donated: Collection[int] = (),
    trainable: Rules = (),
    tokens: int | None = None,
) -> Cost:
    """Counts what one call `function(*arguments)` costs.

    Scans count every trip, rematerialised work counts as often as it runs, a `shard_map` counts all its
    devices, and what no output needs does not count. Kinds: *attention* is a `dot_general` of two activations
    paired by a batch dimension; *dense* is every other dot, `ragged_dot` included; *convolution*; *kernel* is
    a `pallas_call`, by its declared `cost_estimate`; *gather* finds, takes or puts elements by their place;
    *elementwise* is the rest: elementwise, reductions, layout. Gradients and optimisers are counted like
    anything else: `count(jax.value_and_grad(loss), params, batch)`.

    FLOPs follow XLA's conventions (`effjax.measure.arithmetic`) except where noted there, and that padding of
    a convolution counts as if it were data.

    Args:
      function: anything `jax.make_jaxpr` traces.
      *arguments: arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
      parameters: which argument holds the parameters, the first by the convention of this library; None for
        a function of data alone. Constants the function closes over are weights too.
      branches: `(regexp, index)` rules on the scope of a `cond`; the dearest branch where none matches.
      trips: `(regexp, trips)` rules on the scope of a `while` whose trip count depends on data. Without a
        rule such a loop counts nothing and stands in `Cost.unknown`.
      donated: positions of the arguments whose memory the call may reuse, as `donate_argnums` of `jax.jit`.
      trainable: `(regexp, bool)` rules on the paths of the parameters; all train where none matches. For an
        optimiser of this library: `[(pattern, False) for pattern in optimizer.freeze]`.
      tokens: how many tokens the call passes through the parameters. With it, parameters of which a token
        uses a part (those with an axis named `expert`) count so in `Cost.active`; see
        `effjax.measure.parameters.active_by_path`. Only of use for a forward pass.

    Raises:
      UsageError: for a position that is no argument, or a rule that names no branch or no parameter.
    """
    if parameters is not None and not 0 <= parameters < len(arguments):
        raise UsageError(
            f"parameters={parameters} is no argument: {len(arguments)} were given. "
            f"Use parameters=None where the function has none."
        )
    if wrong := [position for position in donated if not 0 <= position < len(arguments)]:
        raise UsageError(f"donated names argument {wrong[0]}: {len(arguments)} were given, counted from 0.")
    graph = flatten(jax.make_jaxpr(function)(*arguments))
    owners = [place for place, argument in enumerate(arguments) for _ in jax.tree.leaves(argument)]
    first = owners.index(parameters) if parameters in owners else 0
    values = [
        Value(weight=owner == parameters, leaves=frozenset([leaf - first] if owner == parameters else []))
        for leaf, owner in enumerate(owners)
    ]
    walker = Walker(branches, trips)
    tally, _ = walker.walk(graph, values)
    reusable = {number for number, owner in zip(graph.inputs, owners, strict=True) if owner in donated}
    tree = {} if parameters is None else arguments[parameters]
    sizes = sizes_of(parameters_of(tree))
    used: collections.Counter[str] = collections.Counter()
    for leaf, path in enumerate(leaf_paths(tree)):
        if path is not None:
            used[path] += tally.macs_of_leaf[leaf]
    active = dict(sizes)
    if tokens is not None:
        active = active_by_path(sizes, alternatives_of(tree), used, tokens)
    return Cost(
        parameters_by_path=sizes,
        trainable_by_path=match(trainable, sizes, default=True, where="trainable"),
        active_by_path=active,
        macs_by_path=dict(used),
        parameter_bytes=count_bytes(tree),
        work_by_scope=nested(tally.work),
        compulsory=compulsory(graph, reusable),
        peak_bytes=peak_bytes(graph, reusable, walker.branch),
        unknown=tuple(tally.unknown),
    )


def _macs(kinds: Mapping[str, Work]) -> dict[str, int]:
    return {kind: work.macs for kind, work in kinds.items() if work.macs}
