"""What notebooks need of the drivers: to run one and see what it says, and to show what it drew.

from experiments.notebook import run, show

run("train", "--config=configs/vision/vit.py:digits", "--workdir=runs/vit")
show("runs/vit/plots/accuracy.png")
"""

import os
import subprocess
import sys

from effjax.errors import RunError


def run(driver: str, *flags: str) -> None:
    """Runs `python -m experiments.DRIVER FLAGS`, and prints what it says while it says it.

    A notebook's own process would keep the memory of every model, and shows nothing of a process beside it.

    Raises:
      RunError: where it failed; what it said stands above.
    """
    command = [sys.executable, "-m", f"experiments.{driver}", *flags]
    print("python -m", *command[2:])
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise RunError(f"experiments.{driver} ended with exit code {process.returncode}.")


def show(*pictures: str) -> None:
    """Shows PNG files below a cell."""
    from IPython.display import Image, display

    for picture in pictures:
        display(Image(filename=picture))
