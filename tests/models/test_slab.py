import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.slab import slab_cswin, slab_deit, slab_pvt, slab_swin
from effjax.compress.slab import fold_norms
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.norms import norm, norm_size
from effjax.layers.progressive import Progressive
from effjax.measure import count, count_parameters
from effjax.mixers import SimplifiedLinear
from effjax.mixers.context import Context
from effjax.mixers.simplified_linear import linear_attention
from effjax.models import KINDS
from tests.models import official

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow


def norm_rows(theirs, ours):
    after = f"{ours}/after"
    return (
        (f"{theirs}.norm1.weight", f"params/{ours}/before/scale", ""),
        (f"{theirs}.norm1.bias", f"params/{ours}/before/bias", ""),
        (f"{theirs}.norm2.alpha", f"params/{after}/eta", "1 ->"),
        (f"{theirs}.norm2.bn.weight", f"params/{after}/batch/scale", ""),
        (f"{theirs}.norm2.bn.bias", f"params/{after}/batch/bias", ""),
        (f"{theirs}.norm2.bn.running_mean", f"batch_stats/{after}/batch/mean", ""),
        (f"{theirs}.norm2.bn.running_var", f"batch_stats/{after}/batch/var", ""),
    )


def linear_rows(theirs, ours):
    return (
        (f"{theirs}.weight", f"params/{ours}/kernel", "o i -> i o"),
        (f"{theirs}.bias", f"params/{ours}/bias", ""),
    )


def block_rows(theirs, ours, linear):
    parts = ("query", "key", "value")
    kernels, biases = (tuple(f"params/{ours}/mixer/{p}/{leaf}" for p in parts) for leaf in ("kernel", "bias"))
    own = (
        (f"{theirs}.attn.positional_encoding", f"params/{ours}/mixer/places", "1 n (h d) -> n h d"),
        (f"{theirs}.attn.dwc.weight", f"params/{ours}/mixer/local_kernel", "d 1 u v -> u v d"),
        (f"{theirs}.attn.dwc.bias", f"params/{ours}/mixer/local_bias", ""),
    )
    table = ((f"{theirs}.attn.relative_position_bias_table", f"params/{ours}/mixer/bias/table", ""),)
    return (
        *norm_rows(f"{theirs}.norm1", f"{ours}/mixer_norm"),
        *norm_rows(f"{theirs}.norm2", f"{ours}/ffn_norm"),
        (f"{theirs}.attn.qkv.weight", kernels, "(h d) i -> i h d"),
        (f"{theirs}.attn.qkv.bias", biases, "(h d) -> h d"),
        (f"{theirs}.attn.proj.weight", f"params/{ours}/mixer/output/kernel", "o (h d) -> h d o"),
        (f"{theirs}.attn.proj.bias", f"params/{ours}/mixer/output/bias", ""),
        *(own if linear else table),
        *linear_rows(f"{theirs}.mlp.fc1", f"{ours}/ffn/expand"),
        *linear_rows(f"{theirs}.mlp.fc2", f"{ours}/ffn/contract"),
    )


def patch_rows(ours):
    return (
        ("patch_embed.proj.weight", f"params/{ours}/projection/kernel", "o c p q -> (p q c) o"),
        ("patch_embed.proj.bias", f"params/{ours}/projection/bias", ""),
    )


DEIT = (
    *patch_rows("embed"),
    ("pos_embed", "params/positions", "1 n c -> n c"),
    *block_rows("blocks.{}", "blocks", linear=True),
    *norm_rows("norm", "norm"),
    *linear_rows("head", "head"),
)


def swin_rows():
    """The second stage has blocks of two kinds in turn, one of each here."""
    stem = (
        *patch_rows("stem/embed"),
        *norm_rows("patch_embed.norm", "stem/norm"),
        ("layers.0.downsample.reduction.weight", "params/stages_1/downsample/reduction/kernel", "o i -> i o"),
        *norm_rows("layers.0.downsample.norm", "stages_1/downsample/norm"),
        *norm_rows("norm", "head/norm"),
        *linear_rows("head", "head/classifier"),
    )
    second = [
        row
        for i in range(2)
        for row in one_layer(block_rows(f"layers.1.blocks.{i}", f"stages_1/stack/members_{i}", False))
    ]
    return (stem, 1), (block_rows("layers.0.blocks.{}", "stages_0/stack", linear=True), 2), (second, 4)


def one_layer(rows):
    """A stack of one block: `layers.1.blocks.0` is the only one of its kind."""
    return [(theirs + "{}", ours, layout) for theirs, ours, layout in rows]


def pvt_rows(heads):
    """Linear attention in the first stage, keys of a coarser map in the second."""
    yield linear_rows("head", "head/classifier"), 1
    for i, h in enumerate(heads):
        coarser = f"stages_{i}/downsample" if i else "stem"
        projection = f"params/{coarser}/embed/projection"
        block = pvt_block(f"block{i + 1}.{{}}", f"stages_{i}/stack", linear=i == 0, reduced=i == 1)
        yield (
            (
                (f"patch_embed{i + 1}.proj.weight", f"{projection}/kernel", "o c p q -> (p q c) o"),
                (f"patch_embed{i + 1}.proj.bias", f"{projection}/bias", ""),
                (f"pos_embed{i + 1}", f"params/{coarser}/positions", "1 n c -> n c"),
                *norm_rows(f"patch_embed{i + 1}.norm", f"{coarser}/norm"),
                *block,
            ),
            h,
        )


def pvt_block(theirs, ours, linear, reduced):
    """As everywhere, but for queries apart and what makes the coarser map."""
    mixer = f"params/{ours}/mixer"
    rows = [row for row in block_rows(theirs, ours, linear) if "qkv" not in row[0] and "table" not in row[0]]
    for leaf, layout in (("weight", "(h d) i -> i h d"), ("bias", "(h d) -> h d")):
        ending = "kernel" if leaf == "weight" else "bias"
        pair = tuple(f"{mixer}/{name}/{ending}" for name in ("key", "value"))
        rows += [(f"{theirs}.attn.q.{leaf}", f"{mixer}/query/{ending}", layout)]
        rows += [(f"{theirs}.attn.kv.{leaf}", pair, layout)]
    if reduced:
        rows += [
            (f"{theirs}.attn.sr.weight", f"{mixer}/reduce/projection/kernel", "o c p q -> (p q c) o"),
            (f"{theirs}.attn.sr.bias", f"{mixer}/reduce/projection/bias", ""),
            *norm_rows(f"{theirs}.attn.norm", f"{ours}/mixer/reduced_norm"),
        ]
    return rows


def cswin_rows(heads):
    """Linear attention with LePE in the first two stages; the third has stripes, the last sees all."""
    yield (*norm_rows("norm", "head/norm"), *linear_rows("head", "head/classifier")), 1
    for i, h in enumerate(heads):
        coarser = f"stages_{i}/downsample/layers_0" if i else "stem/layers_0"
        conv, norm = (
            (f"merge{i}.conv", f"merge{i}.norm") if i else ("stage1_conv_embed.0", "stage1_conv_embed.2")
        )
        yield (
            (
                (f"{conv}.weight", f"params/{coarser}/conv/kernel", "o i u v -> u v i o"),
                (f"{conv}.bias", f"params/{coarser}/conv/bias", ""),
                *norm_rows(norm, f"{coarser}/norm"),
                *cswin_block(f"stage{i + 1}.{{}}", f"stages_{i}/stack", linear=i < 2, striped=i == 2),
            ),
            h,
        )


def cswin_block(theirs, ours, linear, striped):
    """Their parts of attention are numbered, and its projections are the block's."""
    rows = []
    for name, path, layout in block_rows(theirs, ours, linear):
        for part in ("positional_encoding", "dwc"):
            name = name.replace(f".attn.{part}", f".attns.0.{part}")
        name = name.replace(".attn.qkv", ".qkv").replace(".attn.proj", ".proj")
        if "table" in name:
            continue
        # The output of their kind of attention is put together before it is projected.
        rows.append((name, path, layout if linear else layout.replace("o (h d) -> h d o", "o c -> c o")))
    names = ("lepe_columns", "lepe_rows") if striped else ("lepe",)
    for at, ending in enumerate(names):
        rows += [
            (
                f"{theirs}.attns.{at}.get_v.weight",
                f"params/{ours}/mixer/{ending}/kernel",
                "c 1 u v -> u v c",
            ),
            (f"{theirs}.attns.{at}.get_v.bias", f"params/{ours}/mixer/{ending}/bias", ""),
        ]
    return rows


def with_counters(model, variables, pictures):
    """Their count of passes is no tensor of the recording; ours starts at zero."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), pictures))["batch_stats"]

    def filled(shape, held):
        if not isinstance(shape, dict):
            return jnp.zeros(shape.shape, shape.dtype) if held is None else held
        return {key: filled(value, (held or {}).get(key)) for key, value in shape.items()}

    return {**variables, "batch_stats": filled(shapes, variables["batch_stats"])}


def deit():
    tensors, pictures, expected = official.recording("slab_deit")
    del tensors["cls_token"]  # there and never used
    model = build_kind(KINDS, slab_deit(8, 2, 2, patch=2, classes=5, steps=10), "config.model")
    variables = official.translated(tensors, DEIT, h=2)
    return model, with_counters(model, variables, pictures), pictures, expected


def swin():
    tensors, pictures, expected = official.recording("slab_swin")
    tensors = {(f"{k}0" if k.startswith("layers.1.blocks") else k): v for k, v in tensors.items()}
    section = slab_swin(
        8, (2, 2), steps=10, linear=1, drop_path=0.0, classes=5, window=4, patch=2, head_dim=4
    )
    return made_of(section, tensors, swin_rows(), pictures, expected)


def pvt():
    tensors, pictures, expected = official.recording("slab_pvt")
    heads = (1, 2, 2, 4)
    shape = dict(dims=(8, 8, 16, 16), heads=heads, ratios=(4, 4, 2, 2), reductions=(4, 2, 1, 1))
    section = slab_pvt((2, 1, 2, 1), steps=10, linear=1, drop_path=0.0, classes=5, **shape)
    return made_of(section, tensors, pvt_rows(heads), pictures, expected)


def cswin():
    tensors, pictures, expected = official.recording("slab_cswin")
    tensors = {name: tensor for name, tensor in tensors.items() if ".scale" not in name}  # never used
    heads = (2, 2, 4, 4)
    shape = dict(width=4, heads=heads, stripes=(None, None, 1, None))
    section = slab_cswin((1, 1, 2, 1), steps=10, drop_path=0.0, classes=5, **shape)
    return made_of(section, tensors, cswin_rows(heads), pictures, expected)


def made_of(section, tensors, groups, pictures, expected):
    """A pyramid and its variables; every group of rows has its own number of heads."""
    model, tree, used = build_kind(KINDS, section, "config.model"), {}, set()
    for rows, heads in groups:
        for row in rows:
            own = {name: tensor for name, tensor in tensors.items() if matches(row[0], name)}
            used |= own.keys()
            merge(tree, official.translated(own, [row], h=heads))
    assert used == tensors.keys()
    return model, with_counters(model, tree, pictures), pictures, expected


def matches(theirs, name):
    head, _, tail = theirs.partition("{}")
    return name == theirs or (
        "{}" in theirs
        and name.startswith(head)
        and name.endswith(tail)
        and name[len(head) : len(name) - len(tail)].isdigit()
    )


def merge(tree, more):
    for key, value in more.items():
        if isinstance(value, dict):
            merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


@pytest.mark.parametrize("made", [deit, swin, pvt, cswin])
def test_equals_the_published_code(made):
    model, variables, pictures, expected = made()
    official.check(model, variables, pictures, expected)


@pytest.mark.parametrize("made", [deit, swin, pvt, cswin])
def test_folded_it_is_the_same_and_less(made):
    model, variables, pictures, _ = made()
    fast, folded = fold_norms(model, variables)
    before, after = jax.jit(model.apply)(variables, pictures), jax.jit(fast.apply)(folded, pictures)
    assert jnp.abs(after - before).max() <= 1e-5 * jnp.abs(before).max()
    shapes = meta.unbox(jax.eval_shape(fast.init, jax.random.key(0), pictures))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    assert count_parameters(folded["params"]) < count_parameters(variables["params"])
    costs = [count(m.apply, v, pictures) for m, v in ((model, variables), (fast, folded))]
    assert costs[0].macs == costs[1].macs
    assert not any("norm" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(folded))


def test_only_what_has_such_norms_is_folded():
    model = build_kind(KINDS, slab_deit(8, 1, 2, patch=2, classes=5, steps=1), "config.model")
    plain = model.clone(block=model.block.clone(norm="layer"))
    with pytest.raises(UsageError, match="no such norms"):
        fold_norms(plain, {"params": {}})
    with pytest.raises(UsageError, match="not in a Block"):
        fold_norms(model.block, {"params": {}})


X = 1 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 6))
SETTING = Progressive(steps=4)


def drawn(kind):
    module = norm(kind, 1e-6, "norm")
    held = meta.unbox(module.init(jax.random.key(0), X))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(1 + 0.3 * draw.normal(size=p.shape)), held["params"])
    assert sum(p.size for p in jax.tree.leaves(params)) == norm_size(kind, 6)
    return {**held, "params": params}


def at_pass(variables, passes):
    stats = {**variables["batch_stats"], "passes": jnp.int32(passes)}
    return {**variables, "batch_stats": stats}


def trained(variables):
    return norm(SETTING, 1e-6, "norm", train=True).apply(variables, X, mutable=["batch_stats"])


def test_it_goes_in_a_line_from_layer_norm_to_repbn():
    held = drawn(SETTING)
    first, _ = trained(held)
    layer = norm("layer", 1e-6, "norm").apply({"params": held["params"]["before"]}, X)
    np.testing.assert_allclose(first, layer, rtol=1e-5, atol=1e-6)
    last, _ = trained(at_pass(held, 4))
    mean, var = X.mean((0, 1), keepdims=True), X.var((0, 1), keepdims=True)
    p = held["params"]["after"]
    batch = (X - mean) / jnp.sqrt(var + 1e-5) * p["batch"]["scale"][None, None] + p["batch"]["bias"][
        None, None
    ]
    np.testing.assert_allclose(last, batch + p["eta"] * X, rtol=1e-4, atol=1e-5)
    for passes in (1, 2, 3):
        between, _ = trained(at_pass(held, passes))
        np.testing.assert_allclose(
            between, (1 - passes / 4) * first + passes / 4 * last, rtol=1e-5, atol=1e-5
        )


def test_training_passes_are_counted_and_evaluation_is_repbn_alone():
    held = drawn(SETTING)
    counts = []
    for _ in range(6):
        _, changed = trained(held)
        held = {**held, **changed}
        counts.append(int(held["batch_stats"]["passes"]))
    assert counts == [1, 2, 3, 4, 4, 4]
    evaluated = norm(SETTING, 1e-6, "norm").apply(held, X)
    alone = norm("rep_batch", 1e-5, "norm").apply(
        {name: held[name]["after"] for name in ("params", "batch_stats")}, X
    )
    np.testing.assert_allclose(evaluated, alone, rtol=1e-6)
    with pytest.raises(UsageError, match="give at least 1"):
        Progressive(steps=0)


def features(n=10, m=10, d=3):
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, length, 2, d)) for length in (n, m, m))
    return np.maximum(q, 0), np.maximum(k, 0), v


@pytest.mark.parametrize("places", [4, 40])
def test_both_orders_equal_the_matrix_of_all_pairs(places):
    """With three channels a head, 4 places take the matrix of pairs and 40 the product of keys and values."""
    q, k, v = features(places, places)
    pairs = np.einsum("bnhd,bmhd->bhnm", q, k)
    expected = np.einsum("bhnm,bmhd->bnhd", pairs / (pairs.sum(-1, keepdims=True) + 1e-6), v)
    got = linear_attention(*map(jnp.float32, (q, k, v)), 1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_query_sum_to_one_unless_it_meets_no_key():
    q, k, v = features(12, 12)
    q[:, 0] = 0.0
    sums = linear_attention(jnp.float32(q), jnp.float32(k), jnp.ones(v.shape), 1e-6)[..., 0]
    met = np.einsum("bnhd,bmhd->bnh", q, k) > 0
    np.testing.assert_allclose(sums, met.astype(np.float32), atol=1e-4)
    assert not met.all()
    slope = jax.grad(lambda q: linear_attention(q, jnp.float32(k), jnp.float32(v), 1e-6).sum())(
        jnp.float32(q)
    )
    assert jnp.isfinite(slope).all()


def test_work_is_linear_in_the_number_of_places():
    mixer = SimplifiedLinear(heads=2)

    def macs(side):
        x = jax.ShapeDtypeStruct((1, side, side, 16), jnp.float32)
        held = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
        return count(lambda v, x: mixer.apply(v, x, Context()), held, x).macs

    assert macs(32) == 4 * macs(16)


def test_tokens_need_their_grid_and_maps_their_size():
    mixer = SimplifiedLinear(heads=2)
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    held = meta.unbox(mixer.init(jax.random.key(1), x, Context(grid=(3, 4))))
    as_map = mixer.apply(held, x.reshape(1, 3, 4, 8), Context())
    np.testing.assert_allclose(
        mixer.apply(held, x, Context(grid=(3, 4))), as_map.reshape(1, 12, 8), rtol=1e-6
    )
    with pytest.raises(UsageError, match="12 tokens are no grid of None"):
        mixer.apply(held, x, Context())
    with pytest.raises(UsageError, match="the code of places holds 12 and this map has 16"):
        mixer.apply(held, jnp.zeros((1, 4, 4, 8)), Context())
    with pytest.raises(UsageError, match="heads=3 does not divide"):
        SimplifiedLinear(heads=3).init(jax.random.key(0), x, Context(grid=(3, 4)))
