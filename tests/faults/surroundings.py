"""What happens around a run: disks, clocks, other runs, other processes."""

import contextlib
import os
import resource
import signal
import time

from tests.experiments.driver import drive, manifest, start
from tests.experiments.several import children, launched, trained_rows
from tests.faults.figures import Figures
from tests.faults.moments import CONFIG, OFTEN, rows, saved, wait


def full_disk(folder, say=print):
    """From some save on no file may grow past a few bytes, which is how a writer meets a full disk."""
    figures = Figures("a disk that is full from some save on")
    arguments = [CONFIG["vision"], *OFTEN, f"--workdir={folder / 'run'}"]
    process = start("train", *arguments)
    wait(process, lambda: len(saved(folder / "run")) >= 2, 120)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
    _, errors = process.communicate(timeout=120)
    figures.expect(process.returncode == 1, f"it ended with {process.returncode}: {errors}")
    figures.expect(errors.startswith("error: ") and "Traceback" not in errors, f"it said: {errors}")
    kept = saved(folder / "run")
    output, _ = drive("train", *arguments)
    figures.expect(f"resuming at step {kept[-1]}" in output, f"{kept} were saved, and it said {output}")
    figures.outcomes["named, and resumed from the newest checkpoint"] += 1
    return figures


def no_place(folder, say=print):
    """A folder in which nothing can be made, also for the superuser."""
    figures = Figures("a work folder that cannot be written")
    _, errors = drive("train", CONFIG["vision"], "--workdir=/proc/effjax-run", code=1)
    figures.expect("/proc/effjax-run" in errors, f"the folder is not named: {errors}")
    figures.outcomes["named"] += 1
    return figures


def two_in_one_folder(folder, say=print):
    """The second is refused while the first runs, and not after it was killed."""
    figures = Figures("two runs in one folder")
    arguments = [CONFIG["vision"], "--config.train.steps=100k steps", f"--workdir={folder / 'run'}"]
    first = start("train", *arguments)
    try:
        wait(first, lambda: saved(folder / "run"), 120)
        _, errors = drive("train", *arguments, code=2)
        figures.expect(f"Process {first.pid} is running in" in errors, f"it said: {errors}")
        figures.outcomes["the second refused"] += 1
    finally:
        first.kill()
        first.communicate()
    again = start("train", *arguments)
    reached = saved(folder / "run")[-1]
    wait(again, lambda: saved(folder / "run")[-1] > reached, 120)
    again.send_signal(signal.SIGTERM)
    _, errors = again.communicate(timeout=120)
    figures.expect(again.returncode == 75, f"a lock was left behind: {errors}")
    figures.expect(saved(folder / "run")[-1] > reached, "it did not go on")
    figures.outcomes["resumed after kill -9"] += 1
    return figures


@contextlib.contextmanager
def hooked(folder, code):
    """Processes that are started within run `code` before anything else."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(code)
    held = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "hook"), held]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if held is None else os.environ.update(PYTHONPATH=held)


JUMPING = """
import time
real, began = time.time, time.monotonic()
time.time = lambda: real() + (0, -86400, 86400 * 400)[int((time.monotonic() - began) / 2) % 3]
"""


def jumping_clock(folder, say=print):
    """The clock on the wall jumps by a day back and a year ahead, every other second."""
    figures = Figures("a clock that jumps")
    drive("train", CONFIG["vision"], *OFTEN, f"--workdir={folder / 'straight'}")
    with hooked(folder, JUMPING):
        process = start("train", CONFIG["vision"], *OFTEN, f"--workdir={folder / 'run'}")
    _, errors = process.communicate(timeout=300)
    figures.expect(process.returncode == 0, f"it ended with {process.returncode}: {errors}")
    if figures.failures:
        return figures
    same = manifest(folder / "run") == manifest(folder / "straight")
    figures.expect(same and rows(folder / "run") == rows(folder / "straight"), "the run is another one")
    figures.outcomes["the same run bit by bit"] += 1
    return figures


def dead_worker(folder, processes=4, say=print):
    """One of several processes is killed: the others stop with the reason, and the same command resumes."""
    figures = Figures(f"one of {processes} processes killed")
    run = folder / "run"
    arguments = ["--config.train.steps=100 steps", "--config.train.checkpoint_every=5 steps"]
    running = launched(*arguments, f"--workdir={run}", processes=processes)
    wait(running, lambda: saved(run), 400)
    began = time.monotonic()
    os.kill(children(running)[processes - 1], signal.SIGKILL)
    output, errors = running.communicate(timeout=300)
    took = time.monotonic() - began
    figures.expect(took < 60, f"the others stopped after {took:.0f} s")
    reason = f"process {processes - 1} was killed by signal 9"
    figures.expect(reason in errors, f"the reason is not said: {errors}")
    figures.expect("another" in output, f"no other says that one is gone: {output}")
    figures.outcomes[f"the others stopped after {took:.0f} s"] += 1
    kept = saved(run)[-1]
    again = launched(*arguments, f"--workdir={run}", processes=processes)
    output, errors = again.communicate(timeout=600)
    figures.expect(again.returncode == 0, f"it did not go on: {output}{errors}")
    figures.expect(f"resuming at step {kept}" in output, f"{kept} was saved, and it said {output}")
    whole = list(trained_rows(run)) == list(range(1, 101))
    figures.expect(whole, "lines of the log are lost or doubled")
    figures.outcomes["resumed"] += 1
    return figures


STILL = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(90))
"""


def hanging_step(folder, say=print):
    """The main thread of one of two processes stands still: both say where they wait, and go on with it."""
    figures = Figures("one of two processes stands still for 90 s")
    run = folder / "run"
    with hooked(folder, STILL):
        running = launched("--config.train.steps=300 steps", f"--workdir={run}")
    wait(running, lambda: (run / "metrics.jsonl").is_file() and len(trained_rows(run)) > 20, 400)
    os.kill(children(running)[1], signal.SIGUSR1)
    output, errors = running.communicate(timeout=600)
    figures.expect(running.returncode == 0, f"it did not go on: {errors}")
    everything = output + errors
    figures.expect(everything.count("no step for") == 2, f"not both said that there is no step: {everything}")
    figures.expect("effjax/train/loop.py" in everything, f"there are no stacks: {everything}")
    figures.outcomes["said by both with their stacks, and gone on with"] += 1
    return figures
