"""Videos out of a program: what is given, what is copied, what is written and what is refused."""

import dataclasses
import io
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from effjax.diffusion import masks
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import batch_sharding, merge_rules
from effjax.train.step import Precision
from effjax.train.tasks.diffusion import Diffusion
from experiments.run import sampling
from experiments.run.clips import Clips, held_out_clips, parse
from experiments.run.plots import film_strips, moving_grid
from experiments.run.sampling import Request, draw, to_bytes
from tests.experiments.driver import drive

SHAPE = (4, 4, 4, 1)


class Model(nn.Module):
    """Moves towards the mean of each place over time."""

    classes: int = 1
    null_class: bool = False
    learned_sigma: bool = False

    @nn.compact
    def __call__(self, x_t, t, label, train=False):
        return x_t - x_t.mean(1, keepdims=True)


def contents():
    return np.random.default_rng(0).uniform(-1, 1, (5, *SHAPE)).astype(np.float32)


def program(evaluators=True, shape=SHAPE, field="video"):
    mesh, rules = make_mesh(MeshShape()), merge_rules({})

    def evaluate():
        for start in (0, 3):
            rows = contents()[start : start + 3]
            filled = np.concatenate([rows, contents()[: 3 - len(rows)]])
            yield {"video": filled, "mask": (np.arange(3) < len(rows)).astype(np.float32)}

    data = types.SimpleNamespace(open=lambda: types.SimpleNamespace(evaluate=evaluate))
    evaluator = {"test": types.SimpleNamespace(data=data)} if evaluators else {}
    return types.SimpleNamespace(
        task=Diffusion(Model(), RectifiedFlow(), 0.0, content=field, condition=None),
        mesh=mesh,
        rules=rules,
        batch_sharding=batch_sharding(mesh, rules),
        experiment=types.SimpleNamespace(
            train=types.SimpleNamespace(precision=Precision()), evaluators=evaluator
        ),
        data=types.SimpleNamespace(example_batch=lambda rows: {field: np.zeros((rows, *shape), np.float32)}),
    )


VARIABLES = {"params": {"w": jnp.zeros(())}}
REQUEST = Request(per_class=4, steps=2, given=masks.Forward(given=2))


def test_what_is_given_is_read_like_a_method():
    assert parse("forward:given=2") == masks.Forward(given=2)
    assert parse("completion:area=(0.2,0.3),ends=0") == masks.Completion(area=(0.2, 0.3), ends=0)
    for spec, message in (
        ("forwards:given=2", r"--given=forwards:given=2.kind is 'forwards'.* Did you mean 'forward'"),
        ("forward:frames=2", "frames is read by nobody"),
        ("forward:given=", "--given=forward:given= cannot be read. Example: --given=forward:given=2"),
        ("forward:given=0", "given=0 must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            parse(spec)


def test_clips_are_the_first_real_ones_of_the_evaluation_data():
    clips = held_out_clips(program(), masks.Forward(given=2), 4, seed=0)
    np.testing.assert_array_equal(clips.content, contents()[:4])
    assert clips.known[:, :2].all()
    assert not clips.known[:, 2:].any()
    np.testing.assert_array_equal(clips.told, 0)
    assert len(held_out_clips(program(), masks.Forward(given=2), 9, seed=0).content) == 5
    random = [held_out_clips(program(), masks.RandomFrames(0.5), 4, seed).known for seed in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])
    assert np.any(random[0] != random[2])


def test_what_is_copied_is_the_last_given_value_of_every_place():
    content = np.arange(5, dtype=np.float32)[None, :, None, None, None] + np.zeros(
        (1, 5, 1, 2, 1), np.float32
    )
    known = np.zeros((1, 5, 1, 2, 1), bool)
    known[0, [1, 3], 0, 0] = True  # the other place is never given
    clips = Clips(content, known, np.zeros(1, np.int32))
    np.testing.assert_array_equal(clips.copied()[0, :, 0, 0, 0], [1, 1, 1, 3, 3])
    np.testing.assert_array_equal(clips.copied()[0, :, 0, 1, 0], 0)
    assert clips.error(clips.copied()) == pytest.approx((1 + 1 + 1 + 0 + 1 + 4 + 9 + 16) / 8)
    assert clips.error(np.where(known, 99, content)) == 0


def test_given_frames_pass_through_and_the_rest_depends_on_the_seed_alone():
    clips = held_out_clips(program(), REQUEST.given, 4, seed=0)
    videos, columns = draw(program(), VARIABLES, REQUEST, clips)
    assert columns == 4
    np.testing.assert_array_equal(videos[:, :2], to_bytes(contents()[:4, :2]))
    pieces, _ = draw(program(), VARIABLES, dataclasses.replace(REQUEST, batch=3), clips)
    np.testing.assert_array_equal(pieces, videos)
    other, _ = draw(program(), VARIABLES, dataclasses.replace(REQUEST, seed=1), clips)
    np.testing.assert_array_equal(other[:, :2], videos[:, :2])
    assert np.all(np.any(other[:, 2:] != videos[:, 2:], axis=(1, 2, 3, 4)))


def test_a_gif_runs_all_clips_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "load_run", lambda workdir, step, ema: (program(), VARIABLES))
    out = tmp_path / "clips.gif"
    assert sampling.run("runs/x", str(out), REQUEST) == 0
    said = capsys.readouterr().out
    assert "4 clips" in said
    assert "copied" in said
    with Image.open(out) as image:
        assert image.n_frames == 4
        assert image.size == (4 * 68 + 4, 2 * 68 + 4)  # real clips above drawn ones
        image.seek(0)
        first = np.asarray(image.convert("L"), int)
        shown = first[4:68, 4:68][::16, ::16], first[72:136, 4:68][::16, ::16]
    for seen in shown:  # the first frame is given
        np.testing.assert_allclose(seen, to_bytes(contents()[0, 0, ..., 0]), atol=2)
    free = dataclasses.replace(REQUEST, given=None)
    assert sampling.run("runs/x", str(out), free) == 0
    assert "1 classes x 4 videos" in capsys.readouterr().out
    first_bytes = out.read_bytes()
    sampling.run("runs/x", str(out), free)
    assert out.read_bytes() == first_bytes


def test_grids_and_strips():
    videos = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(moving_grid(videos, 2, milliseconds=100))) as image:
        assert image.n_frames == 5
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0
    strips = film_strips(videos)
    assert strips.shape == (3, 8, 30, 3)
    np.testing.assert_array_equal(strips[1, :, 12:18], videos[1, 2])


def test_refused_requests(monkeypatch):
    def run(out, request=REQUEST, **options):
        made = program(**options), VARIABLES
        monkeypatch.setattr(sampling, "load_run", lambda workdir, step, ema: made)
        return sampling.run("runs/x", out, request)

    with pytest.raises(
        UsageError, match=r"--out='x.png': the run makes videos, which are written as --out=NAME.gif"
    ):
        run("x.png")
    picture = dict(shape=(4, 4, 1), field="image")
    with pytest.raises(UsageError, match=r"makes pictures, which are written as --out=NAME.png"):
        run("x.gif", **picture)
    with pytest.raises(UsageError, match="--given is for runs that make videos"):
        draw(program(**picture), VARIABLES, REQUEST)
    with pytest.raises(
        UsageError, match="held-out examples were asked for, and the run has no evaluation data"
    ):
        run("x.gif", evaluators=False)
    with pytest.raises(UsageError, match="4 frames given of a video of 4 leave nothing to draw"):
        run("x.gif", dataclasses.replace(REQUEST, given=masks.Forward(given=4)))
    with pytest.raises(UsageError, match="--classes and --given exclude each other"):
        Request(classes=(0,), given=masks.Forward())


@pytest.mark.slow
def test_clips_of_a_trained_run(tmp_path):
    drive("train", "--config=configs/diffusion/vdt.py:smoke", f"--workdir={tmp_path / 'run'}")
    out = tmp_path / "clips.gif"
    asked = ("--given=forward:given=2", "--per_class=3", "--steps=4")
    said, _ = drive("sample", f"--workdir={tmp_path / 'run'}", f"--out={out}", *asked)
    assert "3 clips" in said
    with Image.open(out) as image:
        assert image.n_frames == 4
