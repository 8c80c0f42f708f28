import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data
from effjax.data.in_context import Autoregression, Regression
from effjax.errors import UsageError

REGRESSION = Regression(dims=3, examples_per_prompt=9, layers=2, examples=20)
SEQUENCES = Autoregression(dims=2, examples_per_prompt=14, layers=2, order=2, examples=20)


def test_answers_are_linear_in_the_representation_and_weights_differ_between_prompts():
    found = []
    for example in (REGRESSION.open()[i] for i in range(3)):
        x, y = example["prompt"][::2], example["prompt"][1::2]
        np.testing.assert_array_equal(y[:, 1:], 0.0)
        np.testing.assert_allclose(example["targets"][::2][:-1], y[:, :1])
        np.testing.assert_array_equal(example["weights"], np.arange(17) % 2 == 0)
        answers = example["targets"][::2, 0]
        w, *_ = np.linalg.lstsq(REGRESSION.phi(x), answers, rcond=None)
        np.testing.assert_allclose(REGRESSION.phi(x) @ w, answers, atol=1e-4)
        plain, *_ = np.linalg.lstsq(x, answers, rcond=None)
        assert np.abs(x @ plain - answers).max() > 0.1  # and not in x itself
        found.append(w)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_vectors_follow_from_the_last_few():
    example = SEQUENCES.open()[4]
    x = np.concatenate([example["prompt"], example["targets"][-1:]])
    np.testing.assert_array_equal(example["targets"], x[1:])
    np.testing.assert_array_equal(example["weights"], [0.0] + [1.0] * 12)
    phi = SEQUENCES.phi(x)
    before = np.concatenate([phi[:-2], phi[1:-1]], axis=1)  # of each x_t from the third on, the two before it
    a, *_ = np.linalg.lstsq(before, x[2:], rcond=None)
    np.testing.assert_allclose(before @ a, x[2:], atol=1e-4)


def test_sequences_keep_their_size():
    reader = Autoregression(dims=20, order=3, examples=30).open()
    last = np.stack([reader[i]["targets"][-10:] for i in range(30)])
    assert 0.1 < np.mean(last**2) < 10.0


def test_noise_and_no_representation():
    quiet = Regression(dims=3, layers=0, examples_per_prompt=40)
    noisy = Regression(dims=3, layers=0, examples_per_prompt=40, noise=0.5)
    for source, least, most in ((quiet, 0.0, 1e-4), (noisy, 0.3, 0.7)):
        example = source.open()[0]
        x, y = example["prompt"][::2], example["targets"][::2, 0]
        w, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert least <= np.std(x @ w - y) <= most


def test_prompts_are_functions_of_seed_and_number_and_the_representation_stays():
    again, other = REGRESSION.open(), Regression(**{**vars_of(REGRESSION), "seed": 1})
    np.testing.assert_array_equal(again[3]["prompt"], REGRESSION.open()[3]["prompt"])
    assert not np.array_equal(again[3]["prompt"], other.open()[3]["prompt"])
    x = np.ones((1, 3))
    np.testing.assert_array_equal(REGRESSION.phi(x), other.phi(x))
    assert not np.array_equal(Regression(dims=3, representation=1).phi(x), Regression(dims=3).phi(x))


def vars_of(source):
    return {name: getattr(source, name) for name in ("dims", "examples_per_prompt", "layers", "examples")}


def test_a_config_names_them():
    section = dict(kind="in_context_autoregression", dims=2, examples_per_prompt=6, examples=5)
    data = build(Data, dict(source=section, batch_size=4, threads=0), "config.data").open()
    assert next(data.train())["prompt"].shape == (4, 5, 2)
    assert [batch["mask"].sum() for batch in data.evaluate()] == [4, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(dims=0), "dims=0 must be at least 1"),
        (lambda: Regression(layers=-1), "layers=-1"),
        (lambda: Regression(noise=-1.0), r"noise=-1\.0"),
        (lambda: Autoregression(order=0), "order=0 must be at least 1"),
        (lambda: Autoregression(order=5, examples_per_prompt=5), "order=5"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()
