"""One pass over a graph: what each node does, how often it runs, and in which module it stands."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from effjax.errors import UsageError, did_you_mean
from effjax.matching import Rules, compile_rules
from effjax.measure import loops, operations
from effjax.measure.arithmetic import arithmetic
from effjax.measure.bits import bytes_of
from effjax.measure.graph import Graph, Node, devices_of, join_scopes, scan_layout
from effjax.measure.traffic import is_view, traffic_of
from effjax.measure.work import Tally, Work


class Value(NamedTuple):
    """What is known of a value without running anything."""

    weight: bool = False
    """It depends on parameters and constants alone."""
    number: int | None = None
    """Its value, where it is a known integer scalar: a loop's bound, mostly."""
    leaves: frozenset[int] = frozenset()
    """The parameters it comes from, element by element: through slices, types and scales, not products."""


_CONSTANT = Value(weight=True)
# What takes a part of a parameter, or gives it another type, leaves it that parameter.
_PARTS = {"convert_element_type", "copy", "dynamic_slice", "gather", "reduce_precision", "slice"}
# So does arithmetic with other parameters and constants: scales, masks, updates of low rank.
_ARITHMETIC = {"add", "div", "mul", "select_n", "sub"}


class Walker:
    """Walks graphs under one choice of branches and of trip counts that the program does not say.

    Args:
      branches: `(regexp, index)` rules that pick the branch of a `cond` by its scope; the dearest by default.
      trips: `(regexp, trips)` rules for `while` loops whose trip count depends on data.
    """

    def __init__(self, branches: Rules = (), trips: Rules = ()) -> None:
        self._branches = compile_rules(branches, "branches")
        self._trips = compile_rules(trips, "trips")
        self._nested = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
        }

    def walk(
        self, graph: Graph, values: Sequence[Value], scope: str = "", stored: int | None = None
    ) -> tuple[Tally, list[Value]]:
        """Counts one run of a graph.

        Args:
          graph: what runs.
          values: what is known of each input.
          scope: the scope path around the graph.
          stored: see `traffic_of`.

        Returns:
          The tally, and what is known of each output.
        """
        known = dict(zip(graph.inputs, values, strict=True))
        known.update(dict.fromkeys(graph.constants, _CONSTANT))
        known.update({n: Value(True, loops.integer(value)) for n, value in graph.literals.items()})
        traffic = traffic_of(graph, stored)
        tally = Tally()
        for place, node in enumerate(graph.nodes):
            operands = [known[operand] for operand in node.operands]
            inner = join_scopes(scope, node.scope)
            if node.name in self._nested:
                done, results = self._nested[node.name](node, operands, inner)
                tally.add(done)
            else:
                kind, work = self._work(node, operands, inner, tally)
                if node.name != "pallas_call" or not work.bytes:
                    work += Work(
                        bytes_read=sum(traffic.reads[place].values()),
                        bytes_written=sum(traffic.writes[place].values()),
                    )
                tally.put(inner, kind, work)
                results = [_result(node, operands)] * len(node.results)
            known.update(zip(node.results, results, strict=True))
        read, written = traffic.copies
        tally.put(scope, "elementwise", Work(bytes_read=read, bytes_written=written))
        return tally, [Value() if out is None else known[out] for out in graph.outputs]

    def _work(self, node: Node, values: list[Value], scope: str, tally: Tally) -> tuple[str, Work]:
        """The kind and the arithmetic of one node."""
        equation, name = node.equation, node.name
        if name in operations.MACS:
            macs = operations.MACS[name](equation)
            for value in values:
                tally.macs_of_leaf.update(dict.fromkeys(value.leaves, macs))
            kind = operations.kind_of_product(equation, [value.weight for value in values])
            return kind, Work(macs, 2 * macs)
        if name == "pallas_call":
            return "kernel", _kernel(node, scope, tally)
        known = arithmetic(equation)
        if known is None:
            line = f"{name} at {scope or 'the top'}: its work is not known"
            tally.unknown += [line] if line not in tally.unknown else []
            return operations.kind_of(equation), Work()
        flops, transcendentals = known
        return operations.kind_of(equation), Work(0, flops, transcendentals)

    def _shard_map(self, node: Node, values: list[Value], scope: str) -> tuple[Tally, list[Value]]:
        """The body is what one device does; every device along the manual axes does it."""
        once, results = self.walk(node.bodies[0], values, scope)
        tally = Tally()
        tally.add(once, devices_of(node.equation))
        return tally, results

    def _scan(self, node: Node, values: list[Value], scope: str) -> tuple[Tally, list[Value]]:
        constants, carries = scan_layout(node.equation)
        # A carry that starts as a constant takes up activations on the way.
        carry = Value(weight=all(value.weight for value in values))
        # Of a stacked or carried number only the first value would be known.
        stacked = (value._replace(number=None) for value in values[constants + carries :])
        inputs = [*values[:constants], *[carry] * carries, *stacked]
        once, results = self.walk(node.bodies[0], inputs, scope, stored=carries)
        tally = Tally()
        tally.add(once, node.equation.params["length"])
        return tally, [carry] * carries + [value._replace(number=None) for value in results[carries:]]

    def _while(self, node: Node, values: list[Value], scope: str) -> tuple[Tally, list[Value]]:
        carry = Value(weight=all(value.weight for value in values))
        carries = [carry] * len(node.results)
        # The constants of the condition, those of the body, the carries as they start.
        condition, first = node.equation.params["cond_nconsts"], len(values) - len(carries)
        test, _ = self.walk(node.bodies[0], [*values[:condition], *carries], scope)
        body, _ = self.walk(node.bodies[1], [*values[condition:first], *carries], scope)
        trips = loops.trip_count(node.equation, [value.number for value in values])
        if trips is None:
            trips = _choose(self._trips, scope)
        tally = Tally()
        if trips is not None:
            tally.add(body, trips)
            tally.add(test, trips + 1)
        else:
            each, place = body.total() + test.total(), scope or "the top"
            if each != Work():
                done = f"{each.flops:,} FLOPs ({each.macs:,} MACs) a trip"
                tally.unknown.append(f"while at {place}: {done}, its trip count is not known")
            tally.unknown += [*test.unknown, *body.unknown]
        return tally, carries

    def _cond(self, node: Node, values: list[Value], scope: str) -> tuple[Tally, list[Value]]:
        """The dearest branch, or the one that a rule picks."""
        walked = [self.walk(branch, values[1:], scope) for branch in node.bodies]
        results = [
            Value(weight=all(v.weight for v in column))
            for column in zip(*(r for _, r in walked), strict=True)
        ]
        chosen = self.branch(node, scope)
        if chosen is not None:
            return walked[chosen][0], results
        return max((tally for tally, _ in walked), key=_price), results

    def branch(self, node: Node, scope: str) -> int | None:
        """The branch of a `cond` at this scope that a rule picks, if one does."""
        chosen = _choose(self._branches, scope)
        if chosen is not None and not 0 <= chosen < len(node.bodies):
            known = did_you_mean("", [str(index) for index in range(len(node.bodies))])
            raise UsageError(f"branches: {scope!r} has no branch {chosen}. {known}")
        return chosen


def _price(tally: Tally) -> tuple[int, int, int, int]:
    """What makes one branch dearer than another."""
    work = tally.total()
    return len(tally.unknown), work.flops, work.bytes, work.transcendentals


def _kernel(node: Node, scope: str, tally: Tally) -> Work:
    """A kernel costs what it declares; its body says how one block is done, not how many."""
    declared = node.equation.params["cost_estimate"]
    if declared is None:
        name = node.equation.params.get("name") or "without a name"
        tally.unknown.append(f"pallas_call {name} at {scope or 'the top'}: it declares no cost_estimate")
        return Work()
    flops, moved = int(declared.flops), int(declared.bytes_accessed)
    # It declares one figure for both ways; the outputs are written, and the rest is read.
    written = min(moved, sum(bytes_of(out.aval) for out in node.equation.outvars))
    return Work(flops // 2, flops, int(declared.transcendentals), moved - written, written)


def _result(node: Node, values: list[Value]) -> Value:
    """What is known of the results of a node without bodies."""
    weight = all(value.weight for value in values)
    if values and (is_view(node) or node.name in _PARTS):
        number = values[0].number if node.name == "convert_element_type" else None
        return Value(weight, number, values[0].leaves)
    if weight and node.name in _ARITHMETIC:
        return Value(weight, leaves=frozenset().union(*(value.leaves for value in values)))
    return Value(weight)


def _choose(rules: list[tuple[re.Pattern[str], Any]], scope: str) -> int | None:
    return next((value for pattern, value in rules if pattern.fullmatch(scope)), None)
