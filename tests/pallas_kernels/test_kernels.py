"""What holds for every kernel: it lowers for its platforms, passes the linter, and imports nothing else."""

import ast
import importlib
import sys
from pathlib import Path

import jax
import pytest

import pallas_kernels
from effjax.measure import count
from effjax.measure.bits import bytes_of
from pallas_kernels import KERNELS, blocks, versions
from pallas_kernels.lint import lint

ROOT = Path(pallas_kernels.__file__).parent
CALLS = {"gpu": ("cuda", versions.MOSAIC_GPU_CALL), "tpu": ("tpu", "tpu_custom_call")}
SHAPES = [
    (name, shape)
    for name in KERNELS
    for shape in importlib.import_module(f"pallas_kernels.{name}.shapes").SHAPES
]
IDS = [f"{name}-{shape.name}" for name, shape in SHAPES]


def op(name):
    return importlib.import_module(f"pallas_kernels.{name}").OP


COMPILED = [
    pytest.param(name, shape, implementation, id=f"{name}-{shape.name}-{implementation}")
    for name, shape in SHAPES
    for implementation in CALLS
    if getattr(op(name), implementation) is not None
]


def training(name, shape, **how):
    """The kernel at a shape, forward and backward where it is trained."""
    function = getattr(importlib.import_module(f"pallas_kernels.{name}"), name)
    call = lambda *arrays: function(*arrays, **shape.options, **how)
    if not shape.trained:
        return call, shape.arrays

    def both(cotangent, *arrays):
        y, pullback = jax.vjp(call, *arrays)
        return y, [one for one in pullback(cotangent) if one.dtype != jax.dtypes.float0]

    return both, (jax.eval_shape(call, *shape.arrays), *shape.arrays)


@pytest.mark.parametrize(("name", "shape", "implementation"), COMPILED)
def test_lowers_where_there_is_no_such_device(name, shape, implementation):
    platform, custom_call = CALLS[implementation]
    both, arguments = training(name, shape, strict=True)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(custom_call)]
    exported = jax.export.export(jax.jit(both), platforms=[platform], disabled_checks=unchecked)(*arguments)
    backward = shape.trained and getattr(op(name), f"{implementation}_backward") is not None
    assert exported.mlir_module().count(f"custom_call @{custom_call}") >= 1 + backward


@pytest.mark.parametrize(("name", "shape", "implementation"), COMPILED)
def test_passes_the_linter(name, shape, implementation):
    both, arguments = training(name, shape, implementation=implementation)
    assert lint(both, *arguments) == []


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=IDS)
def test_declares_no_more_work_than_the_reference_does(name, shape):
    package = importlib.import_module(f"pallas_kernels.{name}")
    # What part of the neurons, or blocks, is read is no part of a shape: without it all are, as there.
    options = {option: value for option, value in shape.options.items() if option not in ("active", "shares")}
    reference = lambda *arrays: getattr(package, name)(*arrays, **options, implementation="reference")
    declared = package.OP.cost(*shape.arrays, **options)
    moved = jax.tree.leaves([*shape.arrays, jax.eval_shape(reference, *shape.arrays)])
    assert 0.4 * 2 * count(reference, *shape.arrays).macs <= declared.flops
    assert declared.flops <= 2 * count(reference, *shape.arrays).macs
    assert 0.9 * sum(map(bytes_of, moved)) <= declared.bytes_accessed <= sum(map(bytes_of, moved))


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=IDS)
def test_shapes_name_configs_that_exist(name, shape):
    file, variant = shape.config.split(":")
    assert f'"{variant}"' in (ROOT.parent / file).read_text()


def test_imports_nothing_but_jax_and_numpy():
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "pallas_kernels"}
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, file


def test_every_kernel_has_its_files():
    for name in KERNELS:
        present = {file.name for file in (ROOT / name).iterdir()}
        kernels = {f"{one}.py" for one in CALLS if getattr(op(name), one) is not None}
        assert {"__init__.py", "reference.py", "shapes.py", *kernels} <= present
        assert kernels


def test_blocks_of_the_most_specific_entry(monkeypatch):
    entries = [
        dict(op="a", device="*", jax="*", shape="d64", blocks=dict(rows=1), how="static"),
        dict(op="a", device="NVIDIA H200", jax="*", shape="*", blocks=dict(rows=2), how="static"),
        dict(op="a", device="NVIDIA H200", jax="9.9", shape="d64", blocks=dict(rows=3), how="static"),
    ]
    monkeypatch.setattr(blocks, "table", lambda: entries)
    default = dict(rows=8, columns=8)
    assert blocks.blocks("a", "d64", default, "TPU v5p") == dict(rows=1, columns=8)
    assert blocks.blocks("a", "d64", default, "NVIDIA H200") == dict(rows=2, columns=8)
    assert blocks.blocks("b", "d64", default, "NVIDIA H200") == default


def test_the_table_of_blocks_is_of_kernels_that_exist():
    for entry in blocks.table():
        assert set(entry) == {"op", "device", "jax", "shape", "blocks", "how"}
        assert entry["op"] in KERNELS
