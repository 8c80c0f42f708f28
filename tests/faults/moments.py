"""Runs that are killed or told to stop at random moments, until one has come to its end.

Of a run that goes straight through every checkpoint is kept, and each that a killed run leaves is compared
with the straight one's of the same step: parameters, moments, keys, data position, bit by bit.
"""

import contextlib
import itertools
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.experiments.driver import COMPILED, drive, manifest, metric_rows, start
from tests.faults.figures import Figures
from tests.train.toy import FAMILIES

CONFIG = {family: f"--config={module.replace('.', '/')}.py:smoke" for family, module in FAMILIES.items()}
STEPS = 60
EARLIEST = 0.4
OFTEN = [
    f"--config.train.steps={STEPS} steps",
    "--config.train.checkpoint_every=4 steps",
    "--config.train.keep=99",
]


def saved(workdir):
    """Steps whose checkpoint is complete."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def writing(workdir):
    """Whether a checkpoint is being written."""
    folder = Path(workdir) / "checkpoints"
    with contextlib.suppress(FileNotFoundError):  # it was renamed while we looked
        return any("tmp" in p.name for p in folder.iterdir())
    return False


def rows(workdir):
    """What was logged of training, by step."""
    return [(row["step"], row["loss"]) for row in metric_rows(workdir) if row["split"] == "train"]


def stage(workdir, before):
    """What a run was doing, as far as its folder tells; `before` is how many bytes of log it began with."""
    file = Path(workdir) / "metrics.jsonl"
    if not (Path(workdir) / "config.json").exists():
        return "starting"
    if writing(workdir):
        return "saving"
    if logged(file) > before:
        return "training"
    return "restoring or compiling" if saved(workdir) else "preparing or compiling"


def logged(file):
    return Path(file).stat().st_size if Path(file).exists() else 0


def wait(process, condition, seconds):
    """Waits until something holds, the process ends, or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.001)


def free_folder(folder):
    """The run to go on with: the first that has not come to its end."""
    numbered = (folder / f"run{number}" for number in itertools.count())
    return next(workdir for workdir in numbered if saved(workdir)[-1:] != [STEPS])


def at_a_moment(process, workdir, draw, length):
    """Waits for a moment of a run: any, or every other time one in which it writes a checkpoint.

    Writing takes little of the time and matters most. Before `EARLIEST` there is no run yet.
    """
    if draw.random() < 0.5:
        wait(process, lambda: False, EARLIEST + draw.random() * (length - EARLIEST))
    else:
        saves = len(saved(workdir)) + draw.randrange(1, 6)
        wait(process, lambda: len(saved(workdir)) >= saves and writing(workdir), 2 * length)
        time.sleep(draw.random() * 0.02)


def interrupted(folder, trials, draw, *, family="vision", by=signal.SIGKILL, length=None, say=print):
    """A run of `family` interrupted `trials` times by a signal, and then left to come to its end.

    Args:
      folder: an empty one.
      trials: how many signals meet a run that is going on.
      draw: a `random.Random`.
      family: of `tests.train.toy`.
      by: SIGKILL or SIGTERM.
      length: seconds of a whole run; it is measured where none is told.
      say: hears of every trial.
    """
    name = "kill -9" if by == signal.SIGKILL else "SIGTERM"
    code = 75 if by == signal.SIGTERM else -signal.SIGKILL
    figures = Figures(f"{name} of a {family} run at {trials} random moments")
    arguments = [CONFIG[family], *OFTEN]
    straight = folder / "straight"
    drive("train", *arguments, f"--workdir={straight}")
    expected = {step: manifest(straight, step) for step in saved(straight)}
    # What the straight run compiled; a copy, because a process may be killed while it writes there.
    programs = shutil.copytree(COMPILED, folder / "compiled")
    if length is None:
        began = time.monotonic()
        start("train", *arguments, f"--workdir={folder / 'timed'}", compiled=programs).communicate()
        length = time.monotonic() - began
    while sum(figures.outcomes.values()) < trials:
        workdir = free_folder(folder)
        had, before = saved(workdir), logged(workdir / "metrics.jsonl")
        process = start("train", *arguments, f"--workdir={workdir}", compiled=programs)
        at_a_moment(process, workdir, draw, length)
        doing, now = stage(workdir, before), saved(workdir)
        process.send_signal(by)
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors = f"nothing for 120 s after {name}"
        if process.returncode == 0:
            continue  # it had come to its end before
        figures.outcomes[doing] += 1
        left = saved(workdir)
        figures.expect(process.returncode == code, f"{doing}: it ended with {process.returncode}: {errors}")
        figures.expect(set(had) | set(now) <= set(left), f"{doing}: of the steps {now} only {left} are left")
        for step in set(left) & set(expected) - set(had):
            same = manifest(workdir, step) == expected[step]
            figures.expect(same, f"{doing}: the checkpoint of step {step} is not the straight run's")
        say(
            f"  {sum(figures.outcomes.values())}/{trials} {doing}; newest checkpoint {(left or ['none'])[-1]}"
        )
    for workdir in sorted(folder.glob("run*")):
        drive("train", *arguments, f"--workdir={workdir}")
        same = manifest(workdir, STEPS) == expected[STEPS]
        figures.expect(same, f"{workdir.name}: the last state is not the straight run's")
        same = rows(workdir) == rows(straight)
        figures.expect(same, f"{workdir.name}: lines of the log are lost or doubled")
    return figures
