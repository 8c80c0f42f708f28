"""Checkpoints that are damaged on disk, in every way that disks and people have."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import RunError
from effjax.train.checkpoint import Checkpoints
from effjax.train.state import TrainState
from tests.faults.figures import Figures


def state(step):
    """A small state, of other numbers at each step."""
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(64, 96)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(50, 7)), jnp.bfloat16),
        "bias": jnp.asarray(rng.normal(size=(96,)), jnp.float32),
    }
    made = TrainState.create(
        params, opt_state=((), {"mu": jax.tree.map(jnp.copy, params)}), key=jax.random.key(step)
    )
    return made.replace(step=jnp.int32(step))


def truncated(folder, file, draw):
    file.write_bytes(file.read_bytes()[: draw.randrange(max(1, file.stat().st_size))])


def flipped(folder, file, draw):
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def zeroed(folder, file, draw):
    """A block that was never written, as after a loss of power."""
    content = bytearray(file.read_bytes())
    begin = draw.randrange(max(1, len(content)))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    file.write_bytes(bytes(content))


def grown(folder, file, draw):
    file.write_bytes(file.read_bytes() + draw.randbytes(64))


def missing(folder, file, draw):
    file.unlink()


def half_deleted(folder, file, draw):
    """An interrupted `rm -r`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in draw.sample(files, max(1, len(files) // 2)):
        path.unlink()


WAYS = (truncated, flipped, zeroed, grown, missing, half_deleted)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def damaged(folder, trials, draw, say=print):
    """The newest of three checkpoints, in every third trial the one before it too, spoiled and then read.

    A file that nothing depends on may be spoiled without a word, if the state is whole. Otherwise the damage
    is said, and the newest sound checkpoint is used. Never is a number wrong.
    """
    figures = Figures(f"{trials} damaged checkpoints")
    whole = folder / "whole"
    checkpoints = Checkpoints(whole)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.close()
    expected = {step: bits(state(step)) for step in (1, 2, 3)}
    shapes = jax.eval_shape(lambda: state(0))
    for trial in range(trials):
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        way = WAYS[trial % len(WAYS)]
        spoiled = (3, 2) if draw.random() < 1 / 3 else (3,)
        for step in spoiled:
            files = sorted(path for path in (copy / str(step)).rglob("*") if path.is_file())
            # Every other time one that holds numbers: most files are notes about them.
            files = [path for path in files if "/d/" in str(path)] if draw.random() < 0.5 else files
            way(copy / str(step), draw.choice(files), draw)
        said = []
        checkpoints = Checkpoints(copy, report=said.append)
        try:
            restored = checkpoints.restore(shapes)
        except RunError as error:
            figures.failures.append(f"{way.__name__}: step 1 was whole, and not used: {error}")
        else:
            step, told = restored.step, " ".join(said)
            right = bits(restored.state) == expected[step] and restored.extra == {"step": step}
            figures.expect(right, f"{way.__name__}: wrong numbers of step {step}")
            skipped = range(step + 1, 4)
            silent = [one for one in skipped if f"The checkpoint of step {one} is damaged" not in told]
            figures.expect(not silent, f"{way.__name__}: steps {silent} were left out without a word")
            sound = sorted(set(skipped) - set(spoiled))
            figures.expect(not sound, f"{way.__name__}: the sound steps {sound} were not used")
            outcome = "detected, an older one used" if skipped else "of bytes that nothing reads"
            figures.outcomes[outcome] += 1
        finally:
            checkpoints.close()
        shutil.rmtree(copy)
        if (trial + 1) % 50 == 0:
            say(f"  {trial + 1}/{trials}")
    return figures
