"""From a program to a grid: which labels, which keys, what is refused."""

import dataclasses
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DDIMSampler, EulerSampler
from effjax.errors import UsageError
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import batch_sharding, merge_rules
from effjax.train.step import Precision
from effjax.train.tasks.diffusion import Diffusion
from experiments.run import sampling
from experiments.run.sampling import Request, build_sampler, class_numbers, draw, to_bytes


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
        class_numbers(["1", "x"])
    with pytest.raises(UsageError, match=r"--per_class=0"):
        Request(per_class=0)
    with pytest.raises(UsageError, match=r"--classes is empty"):
        Request(classes=())


def test_refused_runs(monkeypatch):
    with pytest.raises(UsageError, match="latents of 4 channels"):
        draw(program(channels=4), VARIABLES, REQUEST)
    with pytest.raises(UsageError, match="trained with dropped labels"):
        draw(program(label_dropout=0.0), VARIABLES, dataclasses.replace(REQUEST, guidance=2.0))
    other = types.SimpleNamespace(task=object())
    monkeypatch.setattr(sampling, "load_run", lambda workdir, step, ema: (other, VARIABLES))
    with pytest.raises(UsageError, match="holds a object run, and sampling needs a diffusion run"):
        sampling.run("runs/x", "grid.png", REQUEST)
