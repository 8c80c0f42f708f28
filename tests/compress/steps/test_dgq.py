import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.steps.dgq import Dgq, cut, expected_error, spread
from effjax.compress.steps.inputs import CalibrateInputs
from effjax.compress.steps.round import Round
from effjax.compress.storage.grouped_inputs import Grouped, Groups
from effjax.compress.storage.inputs import Static
from effjax.compress.storage.trees import stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject
from effjax.config import build_kind
from effjax.diffusion.ddpm import DDPM
from effjax.errors import UsageError
from effjax.models import KINDS
from effjax.train.tasks.diffusion import Diffusion


def ends(x, axis):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return x.min(others), x.max(others)


def rounded(x, axis, groups, bits=6):
    """What the grid of the best cut along an axis makes of `x`."""
    known = Groups(
        *(
            jnp.asarray(part, dtype)
            for part, dtype in zip(
                cut(*ends(x, axis), groups), (jnp.float32, jnp.float32, jnp.uint8), strict=True
            )
        )
    )
    kind = Grouped(bits, "channels", groups) if axis == -1 else Grouped(bits, "places", groups, x.shape[1])
    return np.asarray(kind.rounded(jnp.asarray(x, jnp.float32), known), np.float64)


def test_the_cut_is_the_best_of_all_into_neighbours(draw):
    width = np.sort(draw.exponential(size=9))
    ours = expected_error(-width, width, 3)
    costs = []
    for a, b in itertools.combinations(range(1, 9), 2):
        pieces = width[:a], width[a:b], width[b:]
        costs.append(sum(len(piece) * (2 * piece.max()) ** 2 for piece in pieces) / 9)
    np.testing.assert_allclose(ours, min(costs))


def test_more_groups_never_expect_more_error(draw):
    for x in (draw.normal(size=(4, 9, 24)), draw.standard_t(2, (4, 9, 24)), np.ones((4, 9, 24))):
        for axis in (-1, 1):
            errors = [expected_error(*ends(x, axis), g) for g in (1, 2, 3, 8, 9, 30)]
            assert errors == sorted(errors, reverse=True)
    x = draw.standard_t(2, (4, 9, 24)) * draw.lognormal(0, 1.5, 24)
    seen = [np.mean((rounded(x, -1, g) - x) ** 2) for g in (1, 2, 4, 8)]
    assert seen == sorted(seen, reverse=True)
    low, high, _ = cut(*ends(x, -1), 1)
    np.testing.assert_allclose([low[0], high[0]], [x.min(), x.max()])


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_axis_with_outliers_is_found_and_is_the_better_one(axis, draw):
    x = draw.normal(size=(8, 16, 24))
    planted = [slice(None)] * 3
    planted[axis] = [3, 7]
    x[tuple(planted)] *= 25
    other = 1 if axis == -1 else -1
    assert spread(*ends(x, axis)) > spread(*ends(x, other))
    assert expected_error(*ends(x, axis), 4) < expected_error(*ends(x, other), 4)
    errors = {way: np.mean((rounded(x, way, 4) - x) ** 2) for way in (axis, other)}
    assert errors[axis] < 0.5 * errors[other]


IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)), jnp.float32)
BATCH = {"image": IMAGES, "label": jnp.arange(8) % 4, "mask": jnp.ones(8)}


@pytest.fixture(scope="module")
def subject():
    block = dict(kind="adaln_zero", mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp", ratio=2.0))
    section = dict(kind="dit", patch=2, dim=16, depth=2, classes=4, block=block, learned_sigma=False)
    task = Diffusion(model=build_kind(KINDS, section, "config.model"), process=DDPM(sigma="large"))
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # zeros at the start would hide everything
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    variables = jax.tree.unflatten(tree, leaves)
    modulation = variables["params"]["blocks"]["modulation"]["projection"]
    modulation["bias"] = modulation["bias"].at[..., ::5].multiply(40.0)  # a few channels are outliers
    return Subject(task, variables, BATCH)


def calibration(batches=(BATCH,)):
    return Calibration(lambda: list(batches), jax.random.key(0), report=lambda text: None)


def test_a_denoiser_with_groups_is_nearer_to_the_float_one(subject):
    """Signal over noise of the whole network, of 4-bit inputs and 8-bit weights."""
    predict = jax.jit(lambda variables: subject.model.apply(variables, IMAGES, jnp.arange(8) * 100.0,
                                                            BATCH["label"]))  # fmt: skip
    exact = predict(subject.variables)
    small = Round(Uniform(8, 0), kernels=("blocks/(mixer|ffn)/.*",)).apply(subject, calibration())

    def noise(step):
        return float(jnp.sum((predict(step.apply(small, calibration()).variables) - exact) ** 2))

    one = noise(CalibrateInputs(Static(4), how="min_max"))
    grouped = Dgq(4, 8).apply(small, calibration())
    assert float(jnp.sum((predict(grouped.variables) - exact) ** 2)) < 0.7 * one
    kinds = {path: leaf.layout.inputs for path, leaf in stored_in(grouped.params).items()}
    assert {type(kind) for kind in kinds.values()} == {Grouped}
    np.testing.assert_allclose(noise(Dgq(4, 1)), one, rtol=1e-3)


def test_what_has_no_places_has_one_range(subject):
    small = Round(Uniform(8, 0), kernels=("blocks/.*",)).apply(subject, calibration())
    found = stored_in(Dgq(8, 8, kernels=("blocks/modulation/.*",)).apply(small, calibration()).params)
    assert found["blocks/modulation/projection/kernel"].layout.inputs == Static(8)


def test_nan_names_the_kernel(subject):
    small = Round(Uniform(8, 0), kernels=("blocks/.*",)).apply(subject, calibration())
    bad = {**BATCH, "image": IMAGES.at[0, 0, 0].set(jnp.inf)}
    with pytest.raises(UsageError, match=r"what enters .*kernel"):
        Dgq().apply(small, calibration([bad]))
