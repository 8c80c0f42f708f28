import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.compress.rounding import fake_fitted
from effjax.compress.steps.fake_quantise import FakeQuantise, Freeze
from effjax.compress.storage.fake import Fake, fake_inputs, followed
from effjax.compress.storage.trees import boxed_like, stored_in, with_beside
from effjax.compress.storage.uniform import QTensor, Uniform
from effjax.compress.subject import Calibration, Subject
from effjax.config import build, build_kind
from effjax.errors import UsageError
from effjax.models import KINDS
from effjax.train.state import TrainState
from effjax.train.step import Precision, make_step
from effjax.train.tasks.classification import Classification

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)
BATCH = {"image": IMAGES, "label": jnp.arange(8) % 4, "mask": jnp.ones(8)}
CALIBRATION = Calibration(lambda: [BATCH], jax.random.key(0), report=lambda text: None)


def test_the_gradient_is_one_inside_the_range_and_zero_outside(draw):
    x = jnp.asarray(draw.normal(size=64) * 2, jnp.float32)
    low, high = jnp.asarray(-1.0), jnp.asarray(2.0)
    y, pull = jax.vjp(lambda x: fake_inputs(x, low, high, 8), x)
    s = 3 / 255
    codes = np.round(np.asarray(x, np.float64) / s) + np.round(1 / s)
    np.testing.assert_allclose(y, (np.clip(codes, 0, 255) - np.round(1 / s)) * s, atol=1e-6)
    upstream = jnp.asarray(draw.normal(size=64), jnp.float32)
    inside = (codes >= 0) & (codes <= 255)
    np.testing.assert_array_equal(pull(upstream)[0], np.where(inside, upstream, 0))
    # No weight lies beyond a grid that reaches from the smallest to the largest.
    matrix = jnp.asarray(draw.normal(size=(16, 4)), jnp.float32)
    gradient = jax.grad(lambda m: jnp.sum(fake_fitted(Uniform(4, 8, scale="float32"), m) * matrix))(matrix)
    np.testing.assert_array_equal(gradient, matrix)


def test_the_moving_range_starts_with_the_first_batch():
    known = {"low": jnp.zeros(()), "high": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}
    for low, high in ((-2.0, 4.0), (-4.0, 8.0)):
        known = followed(known, jnp.asarray(low), jnp.asarray(high), 0.75)
    np.testing.assert_allclose([known["low"], known["high"], known["steps"]], [-2.5, 5.0, 2])


@pytest.fixture(scope="module")
def subject():
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp", ratio=2.0))
    section = dict(kind="vit", patch=4, dim=8, depth=2, classes=4, block=block)
    task = Classification(model=build_kind(KINDS, section, "config.model"))
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH))
    return Subject(task, variables, BATCH)


def trained(subject, steps):
    """The ordinary training step, compiled once."""
    optimizer = optax.adamw(1e-3)
    params, rest = subject.params, {k: v for k, v in subject.variables.items() if k != "params"}
    state = TrainState.create(params=params, opt_state=optimizer.init(params), key=jax.random.key(1),
                              ema=None, collections=rest)  # fmt: skip
    step = jax.jit(make_step(subject.task, optimizer, precision=Precision()))
    states = [state]
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        states.append(state)
    return [Subject(subject.task, {"params": s.params, **s.collections}, BATCH) for s in states], metrics


def test_a_network_is_trained_through_rounding_and_frozen(subject):
    delay = 3
    wrapped = FakeQuantise(Fake(Uniform(8, 0), decay=0.5, delay=delay)).apply(subject, CALIBRATION)
    subjects, metrics = trained(wrapped, 4)
    assert not metrics["halted"]
    last = subjects[-1]
    ranges = last.variables["ranges"]["blocks"]["ffn"]["expand"]["kernel"]
    np.testing.assert_array_equal(ranges["steps"], [4, 4])
    assert jnp.all(ranges["low"] < 0)
    assert jnp.all(ranges["high"] > 0)

    logits = jax.jit(lambda variables: subject.model.apply(variables, IMAGES))
    held = subjects[delay - 1], last
    for known, rounds in zip(held, (False, True), strict=True):
        floats = {name: value for name, value in known.variables.items() if name != "ranges"}
        apart = jnp.abs(logits(known.variables) - logits(floats)).max()
        assert (apart > 1e-4) == rounds  # before the delay is over nothing that enters is rounded

    frozen = Freeze().apply(last, CALIBRATION)
    stored = stored_in(frozen.params)
    assert all(isinstance(kernel, QTensor) for kernel in stored.values())
    assert "ranges" not in frozen.variables
    np.testing.assert_allclose(logits(frozen.variables), logits(last.variables), atol=2e-5)


def test_shapes_of_such_a_run_follow_from_its_layouts(subject):
    wrapped = FakeQuantise().apply(subject, CALIBRATION)
    layouts = {path: leaf.layout for path, leaf in stored_in(wrapped.params).items()}

    def made():
        drawn = subject.task.init(jax.random.key(0), BATCH)
        return meta.unbox(with_beside({**drawn, "params": boxed_like(drawn["params"], layouts)}))

    shapes = jax.eval_shape(made)
    assert jax.tree.structure(shapes) == jax.tree.structure(dict(wrapped.variables))


def test_what_was_not_trained_is_not_frozen(subject):
    with pytest.raises(UsageError, match="'fake_quantise' is the step before"):
        Freeze().apply(subject, CALIBRATION)
    with pytest.raises(UsageError, match="nothing ever entered"):
        Freeze().apply(FakeQuantise().apply(subject, CALIBRATION), CALIBRATION)
    with pytest.raises(UsageError, match="delay=-1"):
        build(Fake, dict(delay=-1, weights=dict(bits=4)), "layout")
