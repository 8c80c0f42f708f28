"""A plan in a process of its own, and what becomes of it."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from effjax.errors import RunError, UsageError
from effjax.plan.topology import Topology
from experiments.cli import LoadedConfig
from experiments.run.files import to_json


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
      loaded: the config.
      topology: of which chips.
      step: a name in `effjax.plan.steps.KINDS`.
      batch: pictures or sequences at a time, for the steps of a trained model.
      context: tokens of a sequence.
      sampler: by name; None means the usual one.
      sampler_steps: None means the sampler's own number.
      guidance: scale of classifier-free guidance.
      timeout: seconds.
    """

    loaded: LoadedConfig
    topology: str
    step: str = "train"
    batch: int | None = None
    context: int | None = None
    sampler: str | None = None
    sampler_steps: int | None = None
    guidance: float = 1.0
    timeout: int = 1800

    def record(self, config: Any = None) -> dict[str, Any]:
        """Plain data, with the config as it is or another in its place."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del said["loaded"], said["timeout"]
        return said | {"config": (self.loaded.config if config is None else config).to_dict()}


def run(request: Request, config: Any = None) -> dict[str, Any]:
    """Makes the plan of a request, or of the same with another config, in a new process.

    Raises:
      UsageError: where what was asked cannot be.
      RunError: where it does not compile, or the compiler ends the process or takes too long.
    """
    topology = Topology.parse(request.topology)
    topology.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        asked.write_text(to_json(request.record(config)))
        command = [sys.executable, "-m", "experiments.run.plan_worker", str(asked), str(answered)]
        with log.open("wb") as output:
            # Compilers write to the standard error what no flag keeps them from writing.
            worker = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | topology.environment()
            )
            try:
                code = worker.wait(request.timeout)
            except subprocess.TimeoutExpired:
                raise RunError(
                    f"compiling for {topology} took more than {request.timeout} s and was given up: "
                    f"set --timeout."
                ) from None
            finally:
                worker.kill()
                worker.wait()
        if not answered.is_file():
            raise RunError(
                f"the compiler for {topology} ended its process ({_ending(code)}). Its last words: "
                f"{_last_words(log.read_text(errors='replace'))}"
            )
        answer = json.loads(answered.read_text())
    if "error" in answer:
        raise (UsageError if answer["usage"] else RunError)(answer["error"])
    return answer["plan"]


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_words(log: str) -> str:
    """The line that says what is wrong, as well as that can be told."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "Check failed" in line or "Error" in line or "error:" in line]
    return (telling or lines or ["none"])[-1][:400]
