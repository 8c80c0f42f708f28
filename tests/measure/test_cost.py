"""Parameters, bytes, kinds and the tree of modules."""

import io

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from rich.console import Console

from effjax.errors import UsageError
from effjax.measure import count, count_bytes, count_parameters, short, table, tree


class Block(nn.Module):
    def setup(self):
        self.attention = nn.MultiHeadDotProductAttention(2)
        self.up = nn.Dense(16)
        self.down = nn.Dense(8)

    def feed_forward(self, x):
        return self.down(nn.gelu(self.up(x)))

    def __call__(self, x, _):
        return x + self.feed_forward(self.attention(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(8, (2, 2), strides=(2, 2), name="patch")(image)
        x = x.reshape(x.shape[0], -1, 8)
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned(name="blocks")(x, None)
        return nn.Dense(5, name="head")(x.mean(axis=1))


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
# By hand: 16 tokens of 8 channels, 2 images.
ATTENTION = 2 * (2 * 16 * 16 * 8)
PROJECTIONS = 4 * (2 * 16 * 8 * 8)
FEED_FORWARD = 2 * (2 * 16 * 8 * 16)
PATCH = 2 * 16 * (2 * 2 * 3 * 8)
HEAD = 2 * 8 * 5


def net():
    model = Net()
    return model, jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def by_path(module):
    return {module.path: module} | {p: m for child in module.children for p, m in by_path(child).items()}


def test_a_model_is_counted_by_kind():
    model, variables = net()
    cost = count(model.apply, variables, IMAGES)
    assert cost.unknown == ()
    assert cost.macs_by_kind == {
        "attention": 3 * ATTENTION,
        "convolution": PATCH,
        "dense": 3 * (PROJECTIONS + FEED_FORWARD) + HEAD,
    }
    assert cost.macs == sum(cost.macs_by_kind.values())
    assert cost.flops == sum(cost.flops_by_kind.values())
    assert cost.flops_by_kind["attention"] == 2 * cost.macs_by_kind["attention"]
    assert cost.flops_by_kind["elementwise"] > 0


@pytest.mark.parametrize("jit", [True, False])
def test_the_tree_puts_work_beside_the_parameters_that_do_it(jit):
    model, variables = net()
    whole = tree(count(jax.jit(model.apply) if jit else model.apply, variables, IMAGES))
    rows = by_path(whole)
    assert rows[""].total() == sum(child.total() for child in whole.children)
    assert rows["blocks"].macs == {"attention": 3 * ATTENTION, "dense": 3 * (PROJECTIONS + FEED_FORWARD)}
    assert rows["blocks/attention"].macs == {"attention": 3 * ATTENTION, "dense": 3 * PROJECTIONS}
    # Called from a method of its own, which is no module.
    assert rows["blocks/up"].total() == 3 * FEED_FORWARD // 2
    assert rows["blocks/up"].parameters == 3 * (8 * 16 + 16)
    assert rows["head"].parameters == 8 * 5 + 5
    assert rows[""].parameters == count_parameters(variables)
    assert "Net" not in rows


def test_the_backward_pass_stands_with_its_module():
    model, variables = net()
    step = jax.value_and_grad(lambda variables, x: model.apply(variables, x).sum())
    rows = by_path(tree(count(step, variables, IMAGES)))
    assert rows["head"].total() == 3 * HEAD
    assert rows["patch"].total() == 2 * PATCH
    assert rows["blocks/attention"].macs["attention"] >= 3 * 3 * ATTENTION
    assert set(rows) == set(by_path(tree(count(model.apply, variables, IMAGES))))


def test_the_table_shows_the_tree_and_what_is_missing():
    model, variables = net()
    console = Console(width=120, file=io.StringIO())
    console.print(table(tree(count(model.apply, variables, IMAGES)), depth=1))

    def lost(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    console.print(table(tree(count(lost, jnp.ones((4, 4)), parameters=None))))
    text = console.file.getvalue()
    blocks = next(line for line in text.splitlines() if "blocks" in line)
    assert short(3 * (ATTENTION + PROJECTIONS + FEED_FORWARD)) in blocks
    # One level deep, its children stay inside it.
    assert " up " not in text
    assert "not counted: while at the top" in text


def test_parameters_of_linen_variables_leave_the_other_collections_out():
    variables = {"params": {"a": jnp.ones((2, 3))}, "batch_stats": {"mean": jnp.ones(7)}}
    assert count_parameters(variables) == 6
    assert count_parameters({"a": jnp.ones((2, 3)), "key": jax.random.key(0)}) == 6


def test_boxes_of_logical_axes_are_no_part_of_a_path():
    kernel = nn.LogicallyPartitioned(jnp.ones((2, 3)), ("embed", "mlp"))
    params = {"up": {"kernel": kernel}}
    cost = count(lambda params, x: x @ params["up"]["kernel"].unbox(), params, jnp.ones((4, 2)))
    assert cost.parameters_by_path == {"up/kernel": 6}
    assert cost.macs_by_kind == {"dense": 4 * 2 * 3}


class Stack(nn.Module):
    """Keeps the parameters of a block as its own, as a stack scanned over depth does."""

    block: nn.Module

    @nn.compact
    def __call__(self, x):
        block = self.block.clone(parent=None, name=None)
        if self.is_initializing():
            for name, value in block.init(jax.random.key(0), x, None)["params"].items():
                self.put_variable("params", name, value)
        return block.apply({"params": self.variables["params"]}, x, None)[0]


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Stack(Block(), name="blocks")(x)
        return jnp.einsum("bnc,bmc->bnm", x, x)


def test_a_scope_that_parameter_paths_leave_out_has_no_row():
    x = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    variables = jax.eval_shape(Stacked().init, jax.random.key(0), x)
    assert "up" in variables["params"]["blocks"]
    cost = count(Stacked().apply, variables, x)
    assert "Stacked/blocks/Block/up" in cost.macs_by_scope
    rows = by_path(tree(cost))
    assert not {"Stacked", "Block"} & set("/".join(rows).split("/"))
    assert rows["blocks/up"].total() == FEED_FORWARD // 2
    assert rows["blocks"].total() == ATTENTION + PROJECTIONS + FEED_FORWARD
    # Work that stands in no module but the model itself.
    assert rows[""].total() - rows["blocks"].total() == 2 * 16 * 16 * 8


def test_bytes_at_the_width_of_the_type():
    types = {"float32": 12, "bfloat16": 6, "int8": 3, "int4": 2, "uint2": 1, "float8_e4m3fn": 3, "bool": 3}
    for name, size in types.items():
        assert count_bytes({"w": jax.ShapeDtypeStruct((3,), jnp.dtype(name))}) == {name: size}


def test_constants_closed_over_and_what_is_made_of_weights_are_weights():
    tokens, stacked = jax.ShapeDtypeStruct((3, 5, 8), jnp.float32), jnp.ones((3, 8, 8))
    closed = count(lambda x: jnp.einsum("ebc,ecd->ebd", x, stacked), tokens, parameters=None)
    assert set(closed.macs_by_kind) == {"dense"}
    made = count(lambda w, x: jnp.einsum("ebc,ecd->ebd", x, jax.jit(jnp.tanh)(w) * 2.0), stacked, tokens)
    assert set(made.macs_by_kind) == {"dense"}


def test_nothing_runs():
    def function(x):
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return x @ x

    # Four terabytes, were they to exist.
    assert count(function, jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32), parameters=None).macs == 10**18


def test_a_parameter_position_that_is_no_argument():
    with pytest.raises(UsageError, match="parameters=1 is no argument: 1 were given"):
        count(jnp.sin, jnp.ones(3), parameters=1)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (12, "12"),
        (5_717_416, "5.72M"),
        (17_582_740_224, "17.6G"),
        (999_999, "1.00M"),
        (1e19, "10E"),
    ],
)
def test_short(number, text):
    assert short(number) == text


def test_the_tree_holds_all_work_and_the_table_what_moves():
    model, variables = net()
    cost = count(model.apply, variables, IMAGES)
    whole = tree(cost)
    assert whole.whole == cost.work
    assert whole.flops == cost.flops_by_kind
    head = by_path(whole)["head"].work["dense"]
    # The input of the head, its kernel, its output.
    assert (head.flops, head.bytes) == (2 * HEAD, 4 * (2 * 8 + 8 * 5 + 2 * 5))
    console = Console(width=200, file=io.StringIO())
    console.print(table(whole, depth=1))
    row = next(line for line in console.file.getvalue().splitlines() if "head" in line)
    assert short(by_path(whole)["head"].whole.bytes) in row
    assert f"{by_path(whole)['head'].whole.intensity:.1f}" in row


def test_bytes_and_flops_of_a_scan_are_those_of_its_trips():
    model, variables = net()
    rows = by_path(tree(count(model.apply, variables, IMAGES)))
    up = rows["blocks/up"].work["dense"]
    # Three trips, each reads 2 x 16 tokens of 8 channels and one layer's kernel, and writes 16 channels.
    assert up.flops == 3 * 2 * (2 * 16 * 8 * 16)
    assert up.bytes == 3 * 4 * (2 * 16 * 8 + 8 * 16 + 2 * 16 * 16)
