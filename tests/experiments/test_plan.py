"""Plans by the driver, for chips that are not here."""

import json

import pytest

from experiments.run.formatting import count
from tests.experiments.driver import drive

CONFIGS = {
    "vision": "configs/vision/vit.py:smoke",
    "diffusion": "configs/diffusion/dit.py:smoke",
    "language": "configs/language/lm.py:smoke",
}


def plan(tmp_path, config, topology, *more, code=0):
    out = tmp_path / "plan.json"
    arguments = (f"--config={config}", f"--topology={topology}", f"--out={out}", *more)
    output, errors = drive("plan", *arguments, code=code, JAX_PLATFORMS="")
    assert errors == "", "what the compilers say does not reach the terminal"
    return json.loads(out.read_text()), output


def refused(config, topology, *more):
    _, errors = drive("plan", f"--config={config}", f"--topology={topology}", *more, code=2)
    return errors


def sound(found, devices):
    """What must hold of every plan that fits."""
    memory, floor = found["memory"], found["floor"]
    assert found["compiles"]
    assert found["fits"]
    assert found["devices"] == devices
    assert 0 < memory["peak"] <= found["capacity"]
    assert memory["reused"] > 0.9 * memory["outputs"], "the state is donated"
    assert found["macs_per_device"] * devices >= 0.999 * found["macs"]
    assert floor["seconds"] == max(floor["compute"], floor["memory"], floor["network"]) > 0
    assert floor["compute"] == pytest.approx(2 * found["macs_per_device"] / found["peak"])
    assert 0 < found["mfu"] <= 1
    assert found["units_per_second"] == pytest.approx(found["units"] / floor["seconds"])
    assert found["units_per_day"] == pytest.approx(86_400 * found["units_per_second"])
    assert not found["notes"]


def along(found, axis):
    return [one for one in found["collectives"] if axis in one["axes"]]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("h200:8", 8)])
@pytest.mark.parametrize("family", CONFIGS)
def test_one_config_of_each_family(tmp_path, family, topology, devices):
    found, output = plan(tmp_path, CONFIGS[family], topology, "--config.data.batch_size=64")
    sound(found, devices)
    # The gradients of all parameters are added up along the data axis, once, in float32.
    summed = sum(one["bytes"] for one in along(found, "data") if one["kind"] == "all-reduce")
    assert summed >= 4 * found["parameters"]
    assert all(one["hosts"] == 1 and one["group"] == devices for one in along(found, "data"))
    assert f"floor             {found['floor']['seconds'] * 1e3:.3g} ms" in output


@pytest.mark.slow
def test_a_mesh_shows_in_the_collectives(tmp_path):
    """Tensor parallelism adds activations up in every layer; hosts of two GPUs are told from their links."""
    flags = ("--config.mesh.data=2", "--config.mesh.tensor=2", "--config.model.unroll=1")
    found, output = plan(tmp_path, CONFIGS["language"], "h100:2x2", *flags)
    sound(found, 4)
    depth = 2
    (tensor,) = [one for one in along(found, "tensor") if one["kind"] == "all-reduce"]
    (data,) = [one for one in along(found, "data") if one["kind"] == "all-reduce"]
    assert (tensor["group"], tensor["hosts"]) == (2, 1)
    assert (data["group"], data["hosts"]) == (2, 2)
    assert tensor["count"] >= 4 * depth, "two in the forward pass of a layer, two in the backward pass"
    assert "all-reduce" in output
    assert "MACs a device" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "step", "unit", "units", "more"),
    [
        ("vision", "evaluate", "images", 32, ()),
        ("diffusion", "sample", "images", 16, ("--batch=16", "--sampler_steps=5", "--guidance=2")),
        ("language", "prefill", "tokens", 16 * 64, ("--batch=16", "--context=64")),
        ("language", "decode", "tokens", 16, ("--batch=16", "--context=64")),
    ],
)
def test_steps_of_a_trained_model(tmp_path, family, step, unit, units, more):
    found, _ = plan(tmp_path, CONFIGS[family], "v5e:4x4", f"--step={step}", *more)
    assert found["fits"]
    assert (found["unit"], found["units"]) == (unit, units)
    assert found["steps"] is None
    shares = found["macs_per_device"] * 16 / found["macs"]
    # What follows the last layer's cache nobody reads: a compiler that unrolls the layers leaves it out.
    assert 0.5 < shares <= 1.001 if step == "prefill" else shares == pytest.approx(1, rel=1e-3)
    if step in ("prefill", "decode"):
        assert found["memory"]["reused"] > 0, "the caches are updated in place"
        assert not found["collectives"], "sequences do not talk to each other"


@pytest.mark.slow
def test_the_cpu_in_front_of_you(tmp_path):
    """Its floor is below what its step takes: 20 steps of this config take seconds."""
    found, _ = plan(tmp_path, CONFIGS["vision"], "cpu:4", "--config.mesh.fsdp=4")
    assert found["fits"]
    assert found["chip"]["name"] == "cpu"
    assert {one["kind"] for one in along(found, "fsdp")} >= {"all-gather", "all-reduce"}
    assert found["floor"]["seconds"] < 0.1


@pytest.mark.slow
def test_what_does_not_fit_is_told_by_the_exit_code(tmp_path):
    # A step of decoding: of a training step the compiler would first try for a minute to make it fit.
    flags = ("--step=decode", "--batch=32", "--context=8192")
    found, output = plan(tmp_path, "configs/language/lm.py:8b", "v5e:2x2", *flags, code=3)
    assert not found["fits"]
    assert found["needed"] > found["capacity"] == int(15.75 * 2**30)
    assert "does not fit" in output


@pytest.mark.slow
def test_search_ranks_what_fits(tmp_path):
    found, output = plan(tmp_path, CONFIGS["vision"], "v5e:2x2", "--search=3")
    ranked = found["ranked"]
    assert len(ranked) == 3
    assert len({one["layout"] for one in ranked}) == 3
    turns = [one["floor"]["without_overlap"] / one["units"] for one in ranked]
    assert turns == sorted(turns)
    assert "data x fsdp x tensor" in output


@pytest.mark.slow
def test_products_and_roofline(tmp_path):
    picture = tmp_path / "roofline.png"
    flags = ("--products", "--watts=400", f"--roofline={picture}")
    found, output = plan(tmp_path, CONFIGS["language"], "a100:1", *flags)
    total = sum(one["times"] * one["batch"] * one["m"] * one["n"] * one["k"] for one in found["products"])
    assert total == found["macs_per_device"] == found["macs"]
    most = found["products"][0]
    assert f"{most['batch']}: {most['m']} x {most['n']} x {most['k']}" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert count(found["macs"]) in output


def test_users_of_a_language_model(tmp_path):
    config = "configs/language/lm.py:8b"
    found, output = plan(tmp_path, config, "h100:8", "--concurrency", "--context=8192")
    one, four, sixteen = found["serving"]
    # 32 layers of 8 key/value heads of 128 channels, keys and values, two bytes each.
    assert one["kv_bytes_per_user"] == 2 * 32 * 8 * 128 * 2 * 8192
    assert one["users"] > four["users"] > sixteen["users"] > 0
    assert str(one["users"]) in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "topology", "flag", "message"),
    [
        ("vision", "v5q:4x4", "", "'v5q' is no chip. Did you mean 'v5p' or 'v5e'?"),
        ("vision", "v5e:2x2", "--step=trian", "--step=trian is no step. Did you mean 'train'"),
        ("vision", "v5e:2x2", "--step=decode", "decoding needs a language config"),
        ("vision", "v5e:2x2", "--step=sample", "--step=sample needs a diffusion config"),
        ("language", "v5e:2x2", "--step=decode --batch=6", "--batch=6 does not divide into 4 parts"),
        ("language", "v5e:2x2", "--step=decode --context=65", "longer than the 64 that the model is made"),
        ("vision", "v5e:2x2", "--concurrency", "--concurrency counts users of a language model"),
        ("vision", "v5e:2x2", "--config.mesh.tensor=3", "does not multiply to the 4 devices"),
        ("vision", "v5e:2x2", "--config.data.batch_size=6", "does not divide into 4 parts"),
        ("language", "v5e:2x2", "--config.mesh.tensor=4", "mesh axis tensor=4 does not divide"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, family, topology, flag, message):
    out = tmp_path / "plan.json"
    assert message in refused(CONFIGS[family], topology, f"--out={out}", *flag.split())
    assert not out.exists()


def test_a_topology_is_needed():
    _, errors = drive("plan", f"--config={CONFIGS['vision']}", code=2)
    assert "--topology is missing" in errors
