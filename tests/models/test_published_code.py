"""UniRepLKNet and LSNet against their published code, whose toys tests/parity/record_public.py recorded."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.lsnet import lsnet
from configs.vision.unireplknet import unireplknet
from effjax import models
from effjax.compress.merge import merge, plan
from effjax.config import build_kind
from effjax.matching import named_leaves

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "fixtures"
PICTURES = jnp.asarray(np.random.RandomState(1).standard_normal((2, 96, 96, 3)), jnp.float32)
KERNELS = (3,), (7, 7), (13, 3, 13), (5,)


def unireplknet_toy(merged=False):
    section = unireplknet(8, (1, 2, 3, 1), ((3,), (7,), (13, 3), (5,)), classes=5, merged=merged)
    for stage, dim in zip(section["stages"], (8, 8, 16, 16), strict=True):
        stage["dim"] = dim
    return build_kind(models.KINDS, section, "model")


def lsnet_toy(merged=False):
    section = lsnet((32, 32, 32, 32), (0, 2, 3, 2), classes=5, side=2, merged=merged)
    section["head"]["distillation"] = True
    section["stages"][-1]["blocks"][1]["mixer"] |= dict(heads=2, key_dim=8)
    return build_kind(models.KINDS, section, "model")


def place(stage, block, cycle, depth):
    """Where a block of theirs lies: a path, and the index in the scan."""
    turn, member = divmod(block, cycle)
    if turn == depth // cycle:
        return f"stages_{stage}/rest_{member}", 0
    return f"stages_{stage}/stack" + (f"/members_{member}" if cycle > 1 else ""), turn


NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
LAYER = {"weight": "kernel", "bias": "bias"}


def ours_of_unireplknet(name):
    """Path and index here of one of their tensors."""
    head, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"downsample_layers\.(\d)\.(\d)", head):
        stage, i = map(int, match.groups())
        layer = f"layers_{0 if i < 3 else 1}/" + ("conv" if i in (0, 3) else "norm")
        kinds = LAYER if i in (0, 3) else NORM
        return (f"stages_{stage}/downsample/" if stage else "stem/") + f"{layer}/{kinds[leaf]}", None
    if match := re.fullmatch(r"stages\.(\d)\.(\d)(?:\.(.*))?", head):
        stage, block = int(match[1]), int(match[2])
        cycle = 2 if stage == 2 else 1
        path, layer = place(stage, block, cycle, len(KERNELS[stage]))
        inside = f"{match[3]}.{leaf}" if match[3] else leaf
        for pattern, to, kinds in (
            (r"dwconv(?:\.lk_origin)?\.(\w+)", "mixer/conv", LAYER),
            (r"dwconv\.origin_bn\.(\w+)", "mixer/norm", NORM),
            (r"dwconv\.dil_conv_k(\d)_(\d)\.(\w+)", r"mixer/conv_\1_\2", LAYER),
            (r"dwconv\.dil_bn_k(\d)_(\d)\.(\w+)", r"mixer/norm_\1_\2", NORM),
            (r"norm\.(\w+)", "mixer_norm", NORM),
            (r"se\.down\.(\w+)", "gate/reduce", LAYER),
            (r"se\.up\.(\w+)", "gate/expand", LAYER),
            (r"pwconv1\.1\.(\w+)", "expand", LAYER),
            (r"act\.1\.(\w+)", "response", {"gamma": "scale", "beta": "bias"}),
            (r"pwconv2\.0\.(\w+)", "contract", LAYER),
            (r"pwconv2\.2\.(\w+)", "ffn_norm", NORM),
        ):
            if found := re.fullmatch(pattern, inside):
                return f"{path}/{found.expand(to)}/{kinds[leaf]}", layer
        assert inside == "gamma", inside
        return f"{path}/scale", layer
    return {"norm": f"head/norm/{NORM[leaf]}", "head": f"head/classifier/{LAYER[leaf]}"}[head], None


def conv_norm(path, part):
    kind, leaf = part.split(".")
    return f"{path}/conv/{LAYER[leaf]}" if kind == "c" else f"{path}/norm/{NORM[leaf]}"


def ours_of_lsnet(name):
    """Path and index here of one of their tensors."""
    depths = (0, 2, 3, 2)
    if match := re.fullmatch(r"patch_embed\.(\d)\.(.*)", name):
        return conv_norm(f"stem/layers_{int(match[1]) // 2}", match[2]), None
    if match := re.fullmatch(r"head(_dist)?\.(bn|l)\.(\w+)", name):
        prefix = "distillation_" if match[1] else ""
        if match[2] == "bn":
            return f"head/{prefix}norm/{NORM[match[3]]}", None
        return f"head/{prefix}classifier/{LAYER[match[3]]}", None
    match = re.fullmatch(r"blocks(\d)\.(\d+)\.(.*)", name)
    stage, i, inside = int(match[1]) - 1, int(match[2]) - (2 if match[1] != "1" else 0), match[3]
    if i < 0:
        return conv_norm(f"stages_{stage}/downsample/layers_{i + 2}", inside), None
    path, layer = place(stage, i, 2, depths[stage])
    for pattern, to in (
        (r"mixer\.m\.qkv\.(.*)", "mixer/qkv"),
        (r"mixer\.m\.dw\.(.*)", "mixer/query"),
        (r"mixer\.m\.proj\.1\.(.*)", "mixer/output"),
        (r"mixer\.lkp\.cv1\.(.*)", "mixer/reduce"),
        (r"mixer\.lkp\.cv2\.(.*)", "mixer/see"),
        (r"mixer\.lkp\.cv3\.(.*)", "mixer/mix"),
        (r"ffn\.m\.pw1\.(.*)", "ffn/expand"),
        (r"ffn\.m\.pw2\.(.*)", "ffn/contract"),
    ):
        if found := re.fullmatch(pattern, inside):
            return conv_norm(f"{path}/{to}", found[1]), layer
    first, leaf = inside.rsplit(".", 1)
    others = {
        "mixer.conv.c": ("mixer/conv", LAYER),
        "mixer.conv.bn": ("mixer/norm", NORM),
        "mixer.conv1.c": ("mixer/conv_1_1", LAYER),
        "mixer.conv1.bn": ("mixer/norm_1_1", NORM),
        "mixer.lkp.cv4": ("mixer/weigh", LAYER),
        "mixer.lkp.norm": ("mixer/weigh_norm", NORM),
        "mixer.bn": ("mixer/norm", NORM),
        "mixer.m": ("mixer/bias", {"attention_biases": "table"}),
        "se.fc1": ("gate/reduce", LAYER),
        "se.fc2": ("gate/expand", LAYER),
    }
    to, kinds = others[first]
    return f"{path}/{to}/{kinds[leaf]}", layer


def laid_out(array, path, shape):
    """Their array in our layout."""
    if "/weigh" in path:  # nine taps of each group, ours by tap
        array = array.reshape(-1, 9, *array.shape[1:2])
        return (
            array.transpose(2, 1, 0)
            if path.endswith("kernel")
            else array[..., 0].T
            if array.ndim == 3
            else array.T
        )
    if path.endswith("table"):
        return array.T
    if path.endswith("kernel") and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)  # [u, v, i, o]
        return array.reshape(shape)
    if path.endswith("kernel"):
        return array.T
    return array.reshape(shape)


def load(name, model, rename):
    """Their recorded weights as our variables, each of which is set once; and their outputs."""
    with np.load(FOLDER / f"{name}.npz") as data:
        arrays = dict(data)
    shapes = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), PICTURES)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), shapes)
    leaves = {path.split("/", 1)[1]: leaf for path, leaf in named_leaves(variables).items()}
    for key, array in arrays.items():
        if key.startswith("weight/"):
            path, layer = rename(key.removeprefix("weight/"))
            target = leaves[path] if layer is None else leaves[path][layer]
            assert np.isnan(target).all(), path
            target[...] = laid_out(array.astype(np.float32), path, target.shape)
    assert not any(np.isnan(leaf).any() for leaf in leaves.values())
    return variables, arrays["logits"]


CASES = {
    "unireplknet": (unireplknet_toy, ours_of_unireplknet),
    "lsnet": (lsnet_toy, ours_of_lsnet),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, rename = CASES[request.param]
    model = make()
    return make, model, *load(request.param, model, rename)


def distance(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_logits_are_those_of_the_published_code(case):
    _, model, variables, logits = case
    assert distance(jax.jit(model.apply)(variables, PICTURES), logits) < 1e-4


def test_the_merged_form_has_the_same_logits(case):
    make, model, variables, logits = case
    merged, folded = plan(model)[0], jax.jit(lambda variables: merge(model, variables)[1])(variables)
    assert merged == make(merged=True)
    assert distance(jax.jit(merged.apply)(folded, PICTURES), logits) < 1e-5
    shapes = meta.unbox(jax.eval_shape(lambda: merged.init(jax.random.key(0), PICTURES)))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    again, fold = plan(merged)
    assert again == merged
    assert all(map(np.array_equal, jax.tree.leaves(fold(folded)), jax.tree.leaves(folded)))
