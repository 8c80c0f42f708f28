"""Every recorded case: the original library's weights and inputs give its outputs here."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from effjax.interop import export, load_variables

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.npz"))


def read(path):
    with np.load(path) as data:
        arrays = dict(data)
    weights = {name.removeprefix("weight/"): x for name, x in arrays.items() if name.startswith("weight/")}
    inputs = [arrays[f"input/{i}"] for i in range(sum(name.startswith("input/") for name in arrays))]
    return str(arrays["source"]), json.loads(str(arrays["config"])), weights, inputs, arrays["output"]


def test_there_are_some_and_they_are_small():
    assert FIXTURES
    assert all(path.stat().st_size <= 200_000 for path in FIXTURES)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_original(path):
    source, config, weights, inputs, output = read(path)
    model, variables = load_variables(source, weights, config)
    ours = jax.jit(model.apply)(variables, *inputs)
    assert ours.shape == output.shape
    assert np.abs(np.asarray(ours) - output).max() <= 1e-4 * np.abs(output).max()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_what_was_loaded_goes_back_bit_by_bit(path):
    source, config, weights, _, _ = read(path)
    model, variables = load_variables(source, weights, config)
    back = export(model, variables, source, like=weights)
    assert back
    for name, array in back.items():
        assert array.dtype == weights[name].dtype
        assert array.shape == weights[name].shape
        assert array.flags.c_contiguous
        assert array.tobytes() == weights[name].tobytes(), name
