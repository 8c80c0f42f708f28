import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effjax.errors import UsageError
from effjax.interop import export, families, load_pretrained
from effjax.interop.family import Family
from effjax.interop.names import Ignored, Name

# One matrix [in, out] and its bias, as three libraries might spell it.
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.ones(2, np.float32)
SPELLINGS = {
    "usual": {"proj.weight": WEIGHT, "proj.bias": BIAS},
    "prefixed": {"model.proj.weight": WEIGHT, "model.proj.bias": BIAS},
    "older": {"proj.gamma": WEIGHT, "proj.bias": BIAS},
    "apart": {"proj.first": WEIGHT[:1], "proj.second": WEIGHT[1:], "proj.bias": BIAS},
}


@pytest.fixture(autouse=True)
def family(monkeypatch):
    bias = [Name("proj.bias", "bias"), Ignored("proj.mask", "a buffer")]
    rows = (Name("proj.weight", "kernel", "o i -> i o"), *bias)
    apart = (Name(("proj.first", "proj.second"), "kernel", "o i -> i o"), *bias)
    toy = Family(
        build=lambda config: nn.Dense(config["width"]),
        names=lambda model: rows,
        inputs=lambda model, config: (jax.ShapeDtypeStruct((1, 3), jnp.float32),),
        renames=((r"^model\.", ""), ("gamma$", "weight")),
        spellings=(lambda model: apart,),
        complete=lambda config, names: {"width": 2, **config},
    )
    monkeypatch.setitem(families.FAMILIES, "transformers:toy", toy)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_parameters(spelling):
    _, params = load_pretrained("transformers:toy", SPELLINGS[spelling])
    assert np.array_equal(params["kernel"], WEIGHT.T)


def test_export_spells_as_usual_or_like_the_names_given():
    model, params = load_pretrained("transformers:toy", SPELLINGS["apart"])
    assert export(model, params, "transformers:toy").keys() == SPELLINGS["usual"].keys()
    like = export(model, params, "transformers:toy", like=SPELLINGS["apart"])
    assert {name: x.tolist() for name, x in like.items()} == {
        name: x.tolist() for name, x in SPELLINGS["apart"].items()
    }


def test_ignored_tensors_are_reported_and_others_refused():
    said = []
    tensors = SPELLINGS["usual"] | {"proj.mask": BIAS}
    load_pretrained("transformers:toy", tensors, report=said.append)
    assert said == ["proj.mask is left out: a buffer."]
    with pytest.raises(UsageError, match=r"unexpected\s+proj\.mask2"):
        load_pretrained("transformers:toy", tensors | {"proj.mask2": BIAS})
