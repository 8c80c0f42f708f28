import functools

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from configs.vision.slab import slab_cswin, slab_deit, slab_pvt, slab_swin
from effjax.compress.slab import fold_norms
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure import count, count_parameters
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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(block=dict(order="res_post_norm")), "order of a Block is 'pre_norm', not 'res_post_norm'"),
        (dict(pool="max"), "pool of a ViT is"),
        (dict(pre_norm=True), "nothing beside the norm /pre_norm"),
        (dict(block=dict(mixer=dict(kind="identity"))), "nothing beside the norm /blocks/mixer_norm"),
    ],
)
def test_norms_with_no_place_to_go_are_refused(change, match):
    section = slab_deit(8, 1, 2, patch=2, classes=5, steps=1)
    change = change | dict(block=section["block"] | change.get("block", {}))
    model = build_kind(KINDS, section | change, "config.model")
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1))))
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(UsageError, match=match):
        fold_norms(model, variables)


@pytest.mark.parametrize("made", [pvt, cswin])
def test_every_norm_counts_training_passes(made):
    model, variables, pictures, _ = made()
    train = jax.jit(lambda held, x: model.apply(held, x, train=True, mutable=["batch_stats"]))
    logits, changed = train(variables, pictures)
    assert bool(jnp.isfinite(logits).all())
    for path, leaf in jax.tree.leaves_with_path(changed["batch_stats"]):
        if path[-1].key == "passes":
            assert (leaf == 1).all(), path
        else:
            held = functools.reduce(lambda tree, key: tree[key.key], path, variables["batch_stats"])
            assert jnp.abs(leaf - held).max() > 1e-3, path
