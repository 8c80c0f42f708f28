import jax
import pytest

from configs.vision.focalnet import LARGE, get_config
from effjax.experiment import resolve
from effjax.matching import named_leaves
from effjax.mixers.focal_modulation import FocalModulation

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

# Millions of parameters with a thousand classes: the authors' model zoo.
MILLIONS = dict(zip(LARGE, (207, 207, 366, 366, 687, 689), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_large_networks_have_as_many_parameters_as_published(name):
    model = resolve(get_config(name)).model
    held = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"))
    count = sum(leaf.size for leaf in named_leaves(held["params"]).values())
    assert round(count / 1e6) == MILLIONS[name]


def test_norms_of_large_networks_stand_behind_the_branches():
    model = resolve(get_config("huge-fl4-22k")).model
    block = model.stages[2].blocks[0]
    assert (block.order, block.layer_scale, model.classes) == ("res_post_norm", 1e-4, 21_842)
    assert block.mixer == FocalModulation(levels=4, kernel=3, norm="layer")
    assert resolve(get_config("large-fl4")).model.stages[0].blocks[0].mixer.averaged
    assert not resolve(get_config("xlarge-fl4")).model.stages[0].blocks[0].mixer.averaged
