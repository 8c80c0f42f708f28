"""Weights of models that keep running averages besides their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.errors import UsageError
from effjax.interop import (
    export,
    load_converted,
    load_converted_variables,
    load_pretrained,
    load_variables,
    save_converted,
)
from effjax.interop.families import FAMILIES
from effjax.interop.family import Family
from effjax.interop.names import CONV, LINEAR, Ignored, Name
from effjax.interop.variables import flatten, unflatten
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.models.heads import Linear
from effjax.models.pyramid import Pyramid, Stage
from experiments.run import converting
from experiments.run.training import first_state
from tests.train.toy import program_of

SOURCE = "timm:toy_with_batch_norm"
NORM = "stem/layers_0/norm"
NAMES = (
    Name("conv.weight", "stem/layers_0/conv/kernel", CONV),
    Name("bn.weight", f"{NORM}/scale"),
    Name("bn.bias", f"{NORM}/bias"),
    Name("bn.running_mean", f"batch_stats:{NORM}/mean"),
    Name("bn.running_var", f"batch_stats:{NORM}/var"),
    Name("head.weight", "head/classifier/kernel", LINEAR, classifier=True),
    Name("head.bias", "head/classifier/bias", classifier=True),
    Ignored(r".*num_batches_tracked", "counts training steps"),
)


@pytest.fixture(autouse=True)
def family(monkeypatch):
    def build(config):
        stem = Convs((ConvNorm(),))
        return Pyramid((Stage(0, 4),), config.get("num_classes", 5), stem=stem, head=Linear(norm=None))

    inputs = (jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32),)
    monkeypatch.setitem(FAMILIES, SOURCE, Family(build, lambda model: NAMES, lambda model, config: inputs))


def weights(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "head.weight": (5, 4), "head.bias": (5,)}
    shapes |= {f"bn.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
    tensors = {name: rng.uniform(0.5, 1.5, shape).astype(dtype) for name, shape in shapes.items()}
    return tensors | {"bn.num_batches_tracked": np.array(7)}


def test_variables_are_the_tree_of_the_model():
    model, variables = load_variables(SOURCE, weights())
    fresh = jax.eval_shape(lambda: unflatten(flatten(model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3))))))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)


def test_the_running_averages_are_used():
    tensors = weights()
    model, variables = load_variables(SOURCE, tensors)
    x = np.random.default_rng(1).standard_normal((2, 6, 6, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((2, 6, 6, 4))
    for i in range(6):
        for j in range(6):
            y[:, i, j] = np.einsum("buvc,ocuv->bo", padded[:, i : i + 3, j : j + 3], tensors["conv.weight"])
    y = (y - tensors["bn.running_mean"]) / np.sqrt(tensors["bn.running_var"] + 1e-5)
    y = (y * tensors["bn.weight"] + tensors["bn.bias"]).mean((1, 2))
    expected = y @ tensors["head.weight"].T + tensors["head.bias"]
    assert np.allclose(model.apply(variables, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_round_trips_are_exact():
    tensors = weights()
    model, variables = load_variables(SOURCE, tensors)
    back = export(model, variables, SOURCE)
    assert back.keys() == tensors.keys() - {"bn.num_batches_tracked"}
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in back)
    _, again = load_variables(SOURCE, back)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, again))


def test_parameters_alone_are_refused_and_the_other_function_named(tmp_path):
    with pytest.raises(UsageError, match=r"batch_stats besides its parameters: call load_variables"):
        load_pretrained(SOURCE, weights())
    model, variables = load_variables(SOURCE, weights())
    with pytest.raises(UsageError, match=r"all of batch_stats is missing: give the variables"):
        export(model, variables["params"], SOURCE)
    save_converted(tmp_path / "ours", model, variables, SOURCE)
    with pytest.raises(UsageError, match=r"call load_converted_variables"):
        load_converted(tmp_path / "ours")


def test_a_missing_average_is_listed_like_a_parameter():
    tensors = weights()
    del tensors["bn.running_var"]
    with pytest.raises(UsageError, match=r"missing\s+bn\.running_var.*for batch_stats:stem/layers_0/norm"):
        load_variables(SOURCE, tensors)


def test_averages_stay_float32_where_another_dtype_is_asked_for():
    _, variables = load_variables(SOURCE, weights(), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {np.dtype("float32")}
    _, variables = load_variables(SOURCE, weights(np.float16))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float16")}


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_there_and_back_through_the_disk(tmp_path, shard_bytes, capsys):
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    options = dict(library_config=None, classes="keep", dtype=None, allow_nan=False, shard_bytes=shard_bytes)
    converting.inwards(SOURCE, str(tmp_path / "model.safetensors"), str(tmp_path / "ours"), **options)
    assert "141 parameters in 5 leaves" in capsys.readouterr().out
    _, read, source = load_converted_variables(tmp_path / "ours")
    _, variables = load_variables(SOURCE, tensors)
    assert source == SOURCE
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, variables))
    converting.outwards(SOURCE, str(tmp_path / "ours"), str(tmp_path / "theirs"), 10**9, allow_nan=False)
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert back.keys() == tensors.keys() - {"bn.num_batches_tracked"}
    assert all(np.array_equal(back[name], tensors[name]) for name in back)


def test_a_run_starts_from_the_averages_too(tmp_path):
    model = dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=(dict(),)),
        stages=(dict(depth=0, dim=4),),
        head=dict(kind="linear", norm=None),
        classes=10,
    )
    program = program_of("vision", model=model)
    shapes = {"params": program.shapes.params, **program.shapes.collections}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(np.float16), shapes)
    save_converted(tmp_path / "ours", program.task.model, variables, SOURCE)
    program = program_of("vision", model=model, train__start=str(tmp_path / "ours"))
    state = first_state(program)
    held = {"params": state.params, **state.collections}
    assert jax.tree.structure(state) == jax.tree.structure(program.init())
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b.astype(np.float32)), held, variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {np.dtype(np.float32)}
