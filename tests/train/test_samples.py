import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.train import evaluators
from effjax.train.evaluators.samples import _compared, _Seen
from effjax.train.extractors import Classifier
from tests.train.toy import no_weights, program_of, smoke


def definition(**changes):
    section = smoke("diffusion").evaluators.samples.to_dict()
    section["data"] |= {"source": dict(kind="tfds", name="digits", split="test[:24]"), "batch_size": 12}
    return build_kind(evaluators.KINDS, {**section, **changes}, "config.evaluators.samples")


def run(definition, program, read=no_weights):
    return definition.open(read)(program, program.variables(program.init(), ema=True), lambda: None)


def never():
    """What nobody told to stop asks between batches."""


class Told(Exception):
    pass


def at_once():
    raise Told


@pytest.fixture(scope="module")
def program():
    return program_of("diffusion")


def test_pictures_do_not_depend_on_how_they_are_batched(program):
    one = definition()
    other = dataclasses.replace(one, data=dataclasses.replace(one.data, batch_size=16))  # 16, then 8 of 16
    values, again = run(one, program), run(other, program)
    assert set(values) == {
        "frechet",
        "frechet_halves",
        "precision",
        "recall",
        "agreement",
        "agreement_real",
    }
    for name in values:
        np.testing.assert_allclose(values[name], again[name], rtol=1e-3, atol=1e-5)
    assert values["frechet"] > 0


def test_real_ones_are_at_no_distance_from_themselves_and_a_shift_counts_squared():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, 3)).astype(np.float32)
    right = draw.uniform(size=40) < 0.5
    real = _Seen(features, right)
    same = _compared(real, real, 3)
    np.testing.assert_allclose(same["frechet"], 0, atol=1e-4)
    assert same["precision"] == same["recall"] == 1
    assert same["agreement"] == same["agreement_real"] == right.mean()
    moved = _compared(_Seen(features + np.float32([10, 0, 0]), ~right), real, 3)
    np.testing.assert_allclose(moved["frechet"], 100, rtol=1e-4)
    assert moved["precision"] == moved["recall"] == 0
    np.testing.assert_allclose(moved["agreement"], 1 - right.mean())
    unlabelled = _compared(_Seen(features, None), _Seen(features, None), 3)
    assert "agreement" not in unlabelled


class Grey(nn.Module):
    """Classifies by how bright a picture is; its features are the mean alone."""

    classes: int = 2

    @nn.compact
    def __call__(self, images, train=False):
        mean = images.mean((1, 2))  # [B, C]
        return mean if not self.classes else nn.Dense(self.classes)(mean)


def test_features_are_those_before_the_head_of_pictures_as_the_classifier_knows_them():
    extractor = Classifier(Grey(), fit="1 epochs", size=2, mean=(0.25,), std=(0.5,))
    pictures = jnp.asarray([-1.0, 1.0])[:, None, None, None] * jnp.ones((1, 4, 4, 1))
    variables = Grey().init(jax.random.key(0), pictures)
    features, logits = extractor(variables, pictures)
    np.testing.assert_allclose(features[:, 0], [-0.5, 1.5], atol=1e-6)  # ([0, 1] - 0.25) / 0.5
    dense = variables["params"]["Dense_0"]
    np.testing.assert_allclose(logits, features @ dense["kernel"] + dense["bias"][None], atol=1e-6)


def test_weights_come_from_a_folder_or_by_training(program):
    asked = []

    def read(folder, shapes, of):
        asked.append(folder)
        return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)

    model = definition().extractor.model
    named = Classifier(model, weights="runs/judge")
    held = named.variables(program, lambda batch: batch["image"], read, never)
    assert asked == ["runs/judge"]
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves(held))
    with pytest.raises(UsageError, match="weights='runs/judge' is no folder"):
        dataclasses.replace(definition(), extractor=named).open(read)
    with pytest.raises(UsageError, match=r"either weights='FOLDER'.*or fit="):
        Classifier(model)
    with pytest.raises(UsageError, match="either"):
        Classifier(model, weights="runs/judge", fit="1 epochs")


def test_training_the_extractor_teaches_it(program):
    """Three epochs of a small ViT are far from the end, and far from chance."""
    longer = dataclasses.replace(definition().extractor, fit="3 epochs")
    values = run(dataclasses.replace(definition(), extractor=longer), program)
    assert values["agreement_real"] > 0.6


def test_a_run_that_is_told_to_stop_does_not_train_the_extractor_to_its_end(program):
    extractor = definition().extractor
    with pytest.raises(Told):
        extractor.variables(program, lambda batch: batch["image"], no_weights, at_once)


def test_only_diffusion_runs_draw(program):
    vision = program_of("vision")
    with pytest.raises(UsageError, match="needs a diffusion run, and this one is classification"):
        definition().open(no_weights)(vision, vision.variables(vision.init(), ema=False), lambda: None)


def test_the_extractor_may_be_trained_on_data_of_its_own(program):
    """The run's own pictures are then not looked at."""
    data = dataclasses.replace(definition().data, batch_size=16)
    data = dataclasses.replace(data, source=dataclasses.replace(data.source, split="train[:32]"))
    own = dataclasses.replace(definition().extractor, fit="1 epochs", data=data)
    variables, again = (
        own.variables(program, lambda batch: batch["none"], no_weights, never) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    others = dataclasses.replace(own, data=None).variables(
        program, lambda batch: batch["image"], no_weights, never
    )
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables, others)
    assert any(jax.tree.leaves(different))
