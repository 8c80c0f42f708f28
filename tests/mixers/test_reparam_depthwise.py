import jax
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.merge import merge
from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.reparam_depthwise import DILATED, ReparamDepthwise

X = jax.random.normal(jax.random.key(0), (2, 9, 7, 4))


@pytest.mark.parametrize(
    "mixer",
    [
        ReparamDepthwise(13),
        ReparamDepthwise(3, ((1, 1),), identity=True),
        ReparamDepthwise(3, (), identity=True),
        ReparamDepthwise(3, ()),
    ],
    ids=["dilated", "small", "identity", "alone"],
)
def test_after_training_the_merged_convolution_gives_what_the_branches_give(mixer):
    variables = meta.unbox(mixer.init(jax.random.key(1), X, Context()))
    _, changed = mixer.apply(variables, X, Context(), train=True, mutable=["batch_stats"])
    variables = {**variables, **changed}
    expected = mixer.apply(variables, X, Context())
    merged, folded = merge(mixer, variables)
    assert set(folded) == {"params"}
    assert set(folded["params"]["conv"]) == {"kernel", "bias"}
    kernel = folded["params"]["conv"]["kernel"]
    ours = jax.lax.conv_general_dilated(
        X,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    ours = ours + folded["params"]["conv"]["bias"][None, None, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged.apply(folded, X, Context()), expected, rtol=1e-4, atol=1e-5)
    # Statistics moved in training; without branches there are none.
    assert bool(changed) == (mixer.identity or mixer.branches != ())


def test_every_dilated_branch_stands_in_the_middle_of_its_kernel():
    for side, branches in DILATED.items():
        assert ReparamDepthwise(side).branches is None
        assert all(dilation * (k - 1) + 1 <= side for k, dilation in branches)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="side 3 and dilation 3 spans 7 places"):
        ReparamDepthwise(5, ((3, 3),))
    with pytest.raises(UsageError, match="both must be odd"):
        ReparamDepthwise(5, ((2, 1),))
    with pytest.raises(UsageError, match="kernel=3 has no branches of its own"):
        ReparamDepthwise(3)
