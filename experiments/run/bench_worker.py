"""One side of a benchmark in a process of its own: `python -m experiments.run.bench_worker REQUEST`.

A peak of memory belongs to a process, and two frameworks in one process share threads and memory. The worker
answers each line of its input, the name of a step, by one line of JSON: what one run of it took by the clock
and of all its threads' work, in seconds, and the largest memory of the process until then.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from effjax.errors import EffjaxError
from experiments.run.bench_sides import Steps, effjax_steps, inputs, timm_steps


def peak_bytes() -> int:
    """The largest resident memory of this process so far; what a child inherits from `fork` is not in it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


def steps_of(request: dict[str, Any]) -> Steps:
    """Builds the side that is asked for."""
    shape, classes = tuple(request["shape"]), request["classes"]
    images, labels = inputs(request["batch"], shape, classes)
    if "timm" in request:
        return timm_steps(request["timm"], images, labels, classes)
    from ml_collections import ConfigDict

    from effjax.experiment import resolve

    return effjax_steps(resolve(ConfigDict(request["config"])).task.model, images, labels)


def main() -> None:
    """Serves until its input ends."""
    # Answers go to the real standard output, what libraries print to the standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=answers, flush=True)

    try:
        steps = steps_of(json.loads(sys.argv[1]))
        answer({"ready": True})
        for line in sys.stdin:
            began, worked = time.perf_counter(), time.process_time()
            steps[line.strip()]()
            seconds, cpu = time.perf_counter() - began, time.process_time() - worked
            answer({"seconds": seconds, "cpu": cpu, "peak": peak_bytes()})
    except EffjaxError as error:
        answer({"error": str(error)})


if __name__ == "__main__":
    main()
