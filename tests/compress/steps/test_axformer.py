import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.blocks import evaluated
from effjax.compress.steps.axformer import AxFormer, Bound, Element, built, hardened, walked
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.masks import branches, masked
from effjax.compress.structure.units import silence, sizes
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress.structure.networks import subject
from tests.compress.structure.test_layers import outputs


def searched(network, **fields):
    told = []
    calibration = Calibration(lambda: iter([network.example] * 2), jax.random.key(0), told.append)
    return AxFormer(**fields).apply(network, calibration), told


def without_heads(network, places):
    """The network in which some heads give nothing."""
    layers = list(take_apart(network))
    for at, head in places:
        factors = np.ones(sizes(layers[at]).heads, np.float32)
        factors[head] = 0
        quiet = silence(layers[at], "heads", factors)
        layers[at] = dataclasses.replace(layers[at], variables={**layers[at].variables, "params": quiet})
    return put_together(network, layers)


@pytest.mark.parametrize("name", ["vit", "dit", "lm"])
def test_the_loss_is_within_the_bound_and_what_is_left_is_what_was_measured(name):
    network = subject(name)
    small, told = searched(network, tolerance=0.1, group=4, batches=1)
    before, after = outputs(network), outputs(small)
    assert after <= 1.1 * before
    assert macs(small) < macs(network)
    measured = float(told[-2].split("loss ")[1].split(",")[0])
    np.testing.assert_allclose(after, measured, atol=1e-4)


def test_heads_that_were_planted_to_give_nothing_are_found():
    """Of a network whose answers are the right ones, with heads of which every other one says something."""
    planted = without_heads(subject("vit"), [(0, 1), (1, 0)])
    batch = evaluated(planted.example)
    answers = jax.jit(planted.task.answers)(planted.variables, batch)
    planted = dataclasses.replace(planted, example={**planted.example, "label": answers.astype(jnp.int32)})
    small, _ = searched(planted, tolerance=0.0, tiers=("heads",), batches=1)
    np.testing.assert_allclose(outputs(small), outputs(planted), rtol=1e-5)
    for at, (head, layer) in enumerate(zip((0, 1), take_apart(small), strict=True)):
        whole = take_apart(planted)[at].params["mixer"]["query"]["kernel"]  # [C, H, D]
        kept = layer.params["mixer"]["query"]["kernel"]
        np.testing.assert_array_equal(
            kept, whole[:, head : head + 1], err_msg="the one that gave nothing went"
        )


@pytest.mark.parametrize("name", ["vit", "dit", "lm", "swin"])
def test_masked_branches_and_units_are_those_that_are_not_there(name):
    network = subject(name)
    layers = take_apart(network)
    masks = {
        (at, part): np.ones((), np.float32) for at, layer in enumerate(layers) for part in branches(layer)
    }
    masks[1, "hidden"] = np.ones(sizes(layers[1]).hidden, np.float32)
    masks[0, "mixer"] = np.zeros((), np.float32)
    masks[1, "hidden"][::2] = 0
    quiet = jax.jit(lambda variables, masks: masked(network, variables, masks).variables)(
        network.variables, jax.tree.map(jnp.asarray, masks)
    )
    silent = dataclasses.replace(network, variables=quiet)
    small = put_together(network, built(layers, masks))
    assert abs(outputs(silent) - outputs(network)) > 1e-4
    np.testing.assert_allclose(outputs(small), outputs(silent), rtol=1e-5)
    assert take_apart(small)[0].block.mixer is None


def test_what_hurts_goes_first_and_lowers_the_bound():
    """Of a loss that is a sum: 10, and what each of five heads adds or saves while it is there."""
    adds = np.array([2.0, -0.45, 0.4, -3.0, 1.0])
    asked = []

    def loss(masks):
        asked.append(masks)
        return float(10 + adds @ masks[0, "heads"])

    masks = {(0, "heads"): np.ones(5)}
    elements = [Element(0, "heads", np.array([i])) for i in range(5)]
    bound = Bound(loss(masks), 0.05)
    start = bound.start
    left, gone = walked(masks, elements, loss, bound)
    # 9.95 -> 7.95 -> 6.95 -> 6.55; without the second 7.0 is above 1.05 * 6.55, though below 1.05 * 9.95.
    np.testing.assert_array_equal(left[0, "heads"], [0, 1, 0, 1, 0])
    assert gone == 3
    assert (bound.start, round(bound.now, 6), round(bound.least, 6)) == (start, 6.55, 6.55)
    assert len(asked) == 1 + 5 + 4, "the fourth is above the bound alone"


def test_every_loss_that_is_taken_is_within_the_bound(draw):
    for _ in range(20):
        table = draw.normal(size=(8, 8))
        loss = lambda masks, table=table: float(3 + 0.2 * masks[0, "hidden"] @ table @ masks[0, "hidden"])
        masks = {(0, "hidden"): np.ones(8)}
        elements = [Element(0, "hidden", np.array([i])) for i in range(8)]
        bound = Bound(loss(masks), 0.1)
        left, gone = walked(masks, elements, loss, bound)
        assert loss(left) == bound.now <= bound.least + 0.1 * abs(bound.least)
        assert bound.least <= bound.start
        assert left[0, "hidden"].sum() == 8 - gone >= 1


def test_nothing_goes_where_everything_matters():
    masks = {(0, "heads"): np.ones(2)}
    elements = [Element(0, "heads", np.array([i])) for i in range(2)]
    left, gone = walked(masks, elements, lambda masks: 3 - masks[0, "heads"].sum(), Bound(1.0, 0.5))
    assert gone == 0
    np.testing.assert_array_equal(left[0, "heads"], 1)
    assert not Bound(1.0, 0.5).takes(float("nan"))


def test_attention_is_hard_where_the_loss_allows():
    network = subject("vit")
    depth = network.model.depth
    batches = [evaluated(network.example)]
    start = outputs(network)
    loose, layers = hardened(network, 1, Bound(float(start), 1e9), batches)
    assert layers == list(range(depth))
    assert loose.model.block.mixer.top == 1, "all alike they are a scan"
    assert abs(outputs(loose) - start) > 1e-4
    same, layers = hardened(network, 16, Bound(float(start), 0.0), batches)
    assert layers == list(range(depth)), "all 16 keys are the softmax"
    np.testing.assert_array_equal(outputs(same), start)
    none, layers = hardened(network, 1, Bound(-1e9, 0.0), batches)
    assert (none, layers) == (network, [])


def test_bad_walks_are_refused():
    with pytest.raises(UsageError, match="is not negative"):
        AxFormer(tolerance=-1.0)
    with pytest.raises(UsageError, match="top=0"):
        AxFormer(top=0)
    with pytest.raises(UsageError, match="names what is tried"):
        AxFormer(tiers=())
    network = subject("vit")
    bare = [layer.block.clone(mixer=None, parent=None, name=None) for layer in take_apart(network)]
    layers = [
        dataclasses.replace(
            layer,
            block=block,
            variables={"params": {k: v for k, v in layer.params.items() if not k.startswith("mixer")}},
        )
        for layer, block in zip(take_apart(network), bare, strict=True)
    ]
    with pytest.raises(UsageError, match="no layer has any of heads"):
        searched(put_together(network, layers), tiers=("heads",))
