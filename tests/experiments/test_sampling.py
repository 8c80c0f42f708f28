"""From a program to a grid: which labels, which keys, what is refused."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from effjax.diffusion.caches import BlockwiseCache, ConfidenceTaylor
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DDIMSampler, EulerSampler
from effjax.errors import UsageError
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import batch_sharding, merge_rules
from effjax.train.step import Precision
from effjax.train.tasks.diffusion import Diffusion
from experiments.run import sampling
from experiments.run.sampling import Request, build_sampler, draw, numbers_of, parse_cache, to_bytes
from tests.train.toy import program_of


class Model(nn.Module):
    """Predicts a picture of one grey per class: class / 10."""

    classes: int = 4
    null_class: bool = True
    learned_sigma: bool = False

    def null(self, label):
        return jnp.full_like(label, self.classes)

    @nn.compact
    def __call__(self, x_t, t, label, train=False):
        return jnp.broadcast_to(label[:, None, None, None] / 10, x_t.shape)


def task(process=None, label_dropout=0.1):
    process = process or DDPM(sigma="small", prediction="x0")
    return Diffusion(model=Model(), process=process, label_dropout=label_dropout)


def program(channels=1, **options):
    mesh, rules = make_mesh(MeshShape()), merge_rules({})
    train = types.SimpleNamespace(precision=Precision())
    return types.SimpleNamespace(
        task=task(**options),
        mesh=mesh,
        rules=rules,
        batch_sharding=batch_sharding(mesh, rules),
        experiment=types.SimpleNamespace(train=train),
        data=types.SimpleNamespace(
            example_batch=lambda rows: {"image": np.zeros((rows, 4, 4, channels), np.float32)}
        ),
    )


VARIABLES = {"params": {"w": jnp.zeros(())}}
REQUEST = Request(classes=(3, 1), per_class=3, steps=2)


def test_rows_are_classes():
    pictures, columns = draw(program(), VARIABLES, REQUEST)
    assert columns == 3
    assert pictures.shape == (6, 4, 4, 1)
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], to_bytes(np.float32([0.3] * 3 + [0.1] * 3)))


def test_all_classes_by_default():
    pictures, _ = draw(program(), VARIABLES, dataclasses.replace(REQUEST, classes=None))
    assert len(pictures) == 4 * 3


def test_batches_do_not_change_pictures():
    noisy = program(process=DDPM(sigma="small", prediction="epsilon"))
    whole, _ = draw(noisy, VARIABLES, REQUEST)
    pieces, _ = draw(noisy, VARIABLES, dataclasses.replace(REQUEST, batch=4))
    np.testing.assert_array_equal(whole, pieces)
    assert len({picture.tobytes() for picture in whole}) == 6
    other, _ = draw(noisy, VARIABLES, dataclasses.replace(REQUEST, seed=1))
    assert np.any(other != whole)


def test_a_row_may_show_the_way_from_noise_to_one_picture():
    noisy = program(process=DDPM(sigma="small", prediction="epsilon"))
    request = dataclasses.replace(REQUEST, steps=9, seed=2)
    drawn, _ = draw(noisy, VARIABLES, dataclasses.replace(request, per_class=1))
    states, columns = draw(noisy, VARIABLES, dataclasses.replace(request, trajectory=4))
    assert columns == 4
    assert states.shape == (2 * 4, 4, 4, 1)
    np.testing.assert_array_equal(states[3::4], drawn)
    assert all(np.any(states[at] != states[at + 1]) for at in range(3))
    with pytest.raises(UsageError, match="--trajectory=10: the sampler takes 9 steps"):
        draw(noisy, VARIABLES, dataclasses.replace(request, trajectory=10))


class Told(Model):
    """Predicts the one value that it is told; knows no classes."""

    classes: int = 0

    def null(self, told):
        return jnp.zeros_like(told)

    @nn.compact
    def __call__(self, x_t, t, told, train=False):
        return jnp.broadcast_to(told[:, :, None, None], x_t.shape)


def told():
    """A run whose model is told the field `text`, with seven held-out examples."""
    made = program()
    made.task = dataclasses.replace(made.task, model=Told(), condition="text")
    rows = np.arange(8, dtype=np.float32)[:, None] / 10
    batches = [
        {"image": np.zeros((4, 4, 4, 1), np.float32), "text": rows[:4], "mask": np.ones(4)},
        {"image": np.zeros((4, 4, 4, 1), np.float32), "text": rows[4:], "mask": np.array([1, 1, 1, 0])},
    ]
    data = types.SimpleNamespace(open=lambda: types.SimpleNamespace(evaluate=lambda: iter(batches)))
    made.experiment.evaluators = {"test": types.SimpleNamespace(data=data)}
    return made


def test_a_model_that_knows_no_classes_is_told_what_held_out_examples_are():
    request = dataclasses.replace(REQUEST, classes=None, per_class=2)
    pictures, columns = draw(told(), VARIABLES, request)
    assert columns == 2
    expected = to_bytes(np.repeat(np.arange(7, dtype=np.float32) / 10, 2))
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], expected)
    pictures, _ = draw(told(), VARIABLES, dataclasses.replace(request, examples=(5, 2)))
    np.testing.assert_array_equal(pictures[:, 0, 0, 0], to_bytes(np.float32([0.5, 0.5, 0.2, 0.2])))
    with pytest.raises(UsageError, match=r"Told is told no classes.*--examples=0,1,2"):
        draw(told(), VARIABLES, dataclasses.replace(request, classes=(1,)))
    with pytest.raises(UsageError, match="names 7, and the evaluation data has 0 to 6"):
        draw(told(), VARIABLES, dataclasses.replace(request, examples=(1, 7)))


def test_a_cache_is_read_and_used():
    assert parse_cache("cg_taylor:threshold=0.1") == ConfidenceTaylor(threshold=0.1)
    with pytest.raises(UsageError, match="--cache=cg_tailor"):
        parse_cache("cg_tailor")
    flow, request = program_of("configs.diffusion.instaflow"), dataclasses.replace(REQUEST, steps=3)
    keys = iter(jax.random.split(jax.random.key(0), 100))  # at first all branches are zero
    variables = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape),
        flow.variables(flow.init(), ema=True),
    )
    whole, _ = draw(flow, variables, request)
    for cache in (ConfidenceTaylor(threshold=0.0), BlockwiseCache(updates=3)):
        cached, _ = draw(flow, variables, dataclasses.replace(request, cache=cache))
        np.testing.assert_array_equal(cached, whole)
    rough, _ = draw(flow, variables, dataclasses.replace(request, cache=BlockwiseCache(updates=1)))
    assert np.any(rough != whole)
    # A toy comes in no pieces, which a cache needs.
    with pytest.raises(UsageError, match="does not come in pieces"):
        draw(program(), VARIABLES, dataclasses.replace(request, cache=ConfidenceTaylor()))


def test_bytes():
    assert to_bytes(np.float32([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "load_run", lambda workdir, step, ema: (program(), VARIABLES))
    out = tmp_path / "grid.png"
    assert sampling.run("runs/x", str(out), REQUEST) == 0
    with Image.open(out) as image:
        assert image.width > image.height  # three columns, two rows
    assert "2 classes x 3 pictures" in capsys.readouterr().out


def test_usual_sampler_of_each_process():
    assert build_sampler(task(), None, None) == DDIMSampler(clip=1.0)
    assert build_sampler(task(process=RectifiedFlow()), None, 7) == EulerSampler(steps=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": (4,)}, "class 4 does not exist: the model knows classes 0 to 3"),
        ({"sampler": "dimm"}, r"--sampler=dimm is no sampler. Did you mean 'ddim'"),
        ({"sampler": "euler"}, "'euler' does not walk a ddpm process"),
        ({"steps": 1001}, "schedule has 1000 steps"),
        ({"guidance": -1.0}, "must not be negative"),
    ],
)
def test_refused_requests(changes, message):
    with pytest.raises(UsageError, match=message):
        draw(program(), VARIABLES, dataclasses.replace(REQUEST, **changes))


def test_refused_values():
    with pytest.raises(UsageError, match=r"--classes=1,x must be numbers"):
        numbers_of("classes", ["1", "x"])
    with pytest.raises(UsageError, match=r"--per_class=0"):
        Request(per_class=0)
    with pytest.raises(UsageError, match=r"--classes is empty"):
        Request(classes=())
    with pytest.raises(UsageError, match=r"--trajectory=1 must be at least 2"):
        Request(trajectory=1)
    with pytest.raises(UsageError, match=r"--classes and --examples exclude each other"):
        Request(classes=(1,), examples=(1,))


def test_refused_runs(monkeypatch):
    with pytest.raises(UsageError, match="latents of 4 channels"):
        draw(program(channels=4), VARIABLES, REQUEST)
    with pytest.raises(UsageError, match="trained with dropped labels"):
        draw(program(label_dropout=0.0), VARIABLES, dataclasses.replace(REQUEST, guidance=2.0))
    other = types.SimpleNamespace(task=object())
    monkeypatch.setattr(sampling, "load_run", lambda workdir, step, ema: (other, VARIABLES))
    with pytest.raises(UsageError, match="holds a object run, and sampling needs a diffusion run"):
        sampling.run("runs/x", "grid.png", REQUEST)
