"""Bytes to and from memory, under one model of what a compiler fuses.

A value is *materialised*, that is, stands in memory, where

- it is an input, a captured constant or an output of the function or of a loop's body;
- or what makes it is no elementwise or layout operation: a dot, convolution, gather, scatter, sort,
  reduction, running sum, loop, branch, kernel, update of a slice, or random bits;
- or what takes it reads its operands from memory: a dot, convolution, scatter, sort, loop, branch, kernel.

All else is fused into what takes it. Each materialised value is written once, and read once by each
materialised value computed from it through fused operations. Reshapes and transposes are other views of the
same memory. Gathers and slices read what they take; scatters and updates of slices write what they put and
leave the rest in place, as XLA does where nothing reads the old array afterwards. Types narrower than a byte
are packed.

Left out: what no schedule of whole operations shows, such as caches, tiles that a product reads again because
they did not fit, padding, and copies between layouts.
"""

import dataclasses
import math

from effjax.measure.bits import bytes_of
from effjax.measure.graph import Graph, Node

# Other views of their operand's memory. `broadcast_in_dim` is one where it only adds axes of one.
_VIEWS = frozenset(
    """bitcast_convert_type copy_p layout_constraint mesh_cast name optimization_barrier pbroadcast pcast
    pvary random_unwrap random_wrap reshard reshape sharding_constraint squeeze stop_gradient
    transpose""".split()  # noqa: SIM905
)
_TAKES = {"dynamic_slice", "gather", "slice"}
# What reads its operands from memory, and so makes them stand there: products, loops and branches,
# collectives, calls out of the program, linear algebra, orders.
_READERS = frozenset(
    """conv_general_dilated dot_general ragged_dot_general
    cond scan shard_map while
    all_gather all_to_all ppermute psum psum2 psum_invariant reduce_scatter
    ffi_call io_callback pallas_call pure_callback scaled_matmul_wrapper
    cholesky eig eigh fft hessenberg householder_product lu qr schur svd triangular_solve tridiagonal
    tridiagonal_solve
    approx_top_k sort top_k""".split()  # noqa: SIM905
)
# What is not fused with its consumer, whoever that is, although it may be with what it reads.
_STANDING = frozenset(
    """argmax argmin cumlogsumexp cummax cummin cumprod cumsum
    random_bits random_fold_in random_seed random_split rng_bit_generator threefry2x32
    dynamic_update_slice gather""".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run of a graph moves; numbers are those of the graph's values.

    Attributes:
      reads: for each node, bytes of each standing value that it reads.
      writes: for each node, bytes that it puts into each standing value.
      copies: bytes read and written to store an output that is an input, or another output, once more.
      storage: for each value the one whose memory it is a view of, itself mostly.
      standing: the values with memory of their own.
    """

    reads: list[dict[int, int]]
    writes: list[dict[int, int]]
    copies: tuple[int, int]
    storage: list[int]
    standing: frozenset[int]


def traffic_of(graph: Graph, stored: int | None = None) -> Traffic:
    """Decides what stands in memory, and what is read and written.

    Args:
      graph: what runs; the bodies inside it are not looked into.
      stored: the first output that must be stored even where it is an input as it came: the number of carries
        for a scan's body, whose later outputs are stacked. None where no output must, as of a function.
    """
    storage = _storage(graph)
    standing = _standing(graph, storage)
    frontiers: dict[int, dict[int, int]] = {number: {} for number in graph.literals}
    for number in (*graph.inputs, *graph.constants):
        frontiers[number] = {number: bytes_of(graph.avals[number])}
    reads, writes = [], []
    for node in graph.nodes:
        seen = _seen(graph, node, frontiers)
        made = {r: _written(graph, node, r) for r in node.results if r in standing and storage[r] == r}
        for result in node.results:
            root = storage[result]
            frontiers[result] = {root: bytes_of(graph.avals[root])} if root in standing else seen
        nested = bool(node.bodies)
        # The bodies of a nested node read and write for it; keeping the operands is what it asks.
        reads.append(dict.fromkeys(seen, 0) if nested else seen if made or node.equation.effects else {})
        writes.append(dict.fromkeys(made, 0) if nested else made)
    return Traffic(reads, writes, _copies(graph, storage, stored), storage, standing)


def is_view(node: Node) -> bool:
    """Whether a node only looks at its operand's memory in another way."""
    if node.name == "broadcast_in_dim":
        return math.prod(node.equation.invars[0].aval.shape) == math.prod(node.equation.outvars[0].aval.shape)
    return node.name in _VIEWS


def is_update(node: Node) -> bool:
    """Whether a node writes into a part of its first operand."""
    return node.name == "dynamic_update_slice" or node.name.startswith("scatter")


def is_fused(node: Node) -> bool:
    """Whether a node is computed element by element, in one loop with what takes its results."""
    if node.name.startswith(("reduce", "scatter", "select_and")):
        return node.name == "reduce_precision"
    return node.name not in _READERS and node.name not in _STANDING


def _storage(graph: Graph) -> list[int]:
    storage = list(range(len(graph.avals)))
    for node in graph.nodes:
        if is_view(node):
            for operand, result in zip(node.operands, node.results, strict=False):
                storage[result] = storage[operand]
    inputs = {*graph.inputs, *graph.constants}
    for out in graph.outputs:
        # A view of an input cannot leave as an output without being copied.
        if out is not None and out not in inputs and storage[out] in inputs:
            storage[out] = out
    return storage


def _standing(graph: Graph, storage: list[int]) -> frozenset[int]:
    standing = {*graph.inputs, *graph.constants}
    for node in graph.nodes:
        if not is_fused(node):
            standing.update(node.results)
        if node.name in _READERS or node.name == "optimization_barrier" or node.name.startswith("scatter"):
            standing.update(storage[operand] for operand in node.operands)
        elif is_update(node):
            # What is put is computed in place; what it is put into stands.
            standing.add(storage[node.operands[0]])
    standing.update(storage[out] for out in graph.outputs if out is not None)
    return frozenset(standing - graph.literals.keys())


def _seen(graph: Graph, node: Node, frontiers: dict[int, dict[int, int]]) -> dict[int, int]:
    """Standing values behind the operands, with the bytes that this node takes of each."""
    operands = node.operands[1:] if is_update(node) else node.operands
    seen: dict[int, int] = {}
    for position, operand in enumerate(operands):
        share = 1.0
        if node.name in _TAKES and position == 0:
            share = taken(node) / max(1, math.prod(graph.avals[operand].shape))
        for number, amount in frontiers[operand].items():
            whole = bytes_of(graph.avals[number])
            seen[number] = min(whole, seen.get(number, 0) + math.ceil(amount * min(1.0, share)))
    if is_update(node):
        # Kept until here. Its other elements stay where they are; those added to are read.
        added = bytes_of(graph.avals[node.operands[-1]]) if "-" in node.name else 0
        for number in frontiers[node.operands[0]]:
            seen[number] = seen.get(number, 0) + added
    return seen


def taken(node: Node) -> int:
    """Elements that a gather or a slice takes of its first operand."""
    return math.prod(node.equation.outvars[0].aval.shape)


def _written(graph: Graph, node: Node, result: int) -> int:
    if is_update(node):
        # scatter: operand, indices, updates; dynamic_update_slice: operand, update, starts.
        update = node.operands[2] if node.name.startswith("scatter") else node.operands[1]
        return bytes_of(graph.avals[update])
    return bytes_of(graph.avals[result])


def _copies(graph: Graph, storage: list[int], stored: int | None) -> tuple[int, int]:
    """What it takes to store an output that is there already."""
    read = written = 0
    inputs = {*graph.inputs, *graph.constants}
    kept: set[int] = set()
    for position, out in enumerate(graph.outputs):
        if out is None or out in graph.literals:
            continue
        size = bytes_of(graph.avals[out])
        if storage[out] in inputs:
            if stored is not None and position >= stored:
                read, written = read + size, written + size
        elif storage[out] in kept:
            written += size
        kept.add(storage[out])
    return read, written
