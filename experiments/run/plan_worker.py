"""The process that compiles a plan: `python -m experiments.run.plan_worker REQUEST.json ANSWER.json`.

Compilers for absent chips read their environment once and may end the process, so each plan is made in one of
its own. The request holds the config and what is asked; the answer a plan, or an error in words.
"""

import json
import sys
from pathlib import Path
from typing import Any

from effjax.errors import EffjaxError, UsageError
from experiments.run.files import to_json, write_atomic


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Makes the plan of a request."""
    from ml_collections import ConfigDict

    from effjax.experiment import resolve
    from effjax.plan import steps
    from effjax.plan.compiled import compile_step
    from effjax.plan.plan import chip_of, make_plan
    from effjax.plan.topology import Topology
    from effjax.train.program import build_program

    topology = Topology.parse(request["topology"])
    experiment = resolve(ConfigDict(request["config"]))
    devices = topology.open()
    if request["step"] not in ("train", "evaluate"):
        request["batch"] = request["batch"] or experiment.data.batch_size
        experiment = untrained(experiment, devices)
    program = build_program(experiment, experiment.data.described(), devices)
    step = steps.build(request["step"], program, serving_of(request, program.task))
    chip = chip_of(topology)
    return make_plan(step, program, compile_step(step, program, topology), topology, chip).to_dict()


def untrained(experiment: Any, devices: list[Any]) -> Any:
    """The experiment with a batch of training that always divides: a trained model is asked in another."""
    import dataclasses

    from effjax.parallel.mesh import make_mesh
    from effjax.parallel.sharding import batch_parts, merge_rules

    parts = batch_parts(make_mesh(experiment.mesh, devices), merge_rules(experiment.sharding))
    data = dataclasses.replace(experiment.data, batch_size=parts)
    return dataclasses.replace(
        experiment, data=data, train=dataclasses.replace(experiment.train, accumulate=1)
    )


def serving_of(request: dict[str, Any], task: Any) -> Any:
    """What is asked of the trained model."""
    from effjax.plan.steps import Serving
    from effjax.train.tasks.diffusion import Diffusion

    sampler = None
    if isinstance(task, Diffusion):
        from experiments.run.sampling import build_sampler

        sampler = build_sampler(task, request["sampler"], request["sampler_steps"])
    return Serving(request["batch"], request["context"], sampler, request["guidance"])


def main() -> None:
    """Reads the request, writes the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any]
    try:
        result = {"plan": answer(request)}
    except EffjaxError as error:
        result = {"error": str(error), "usage": isinstance(error, UsageError)}
    write_atomic(sys.argv[2], to_json(result))


if __name__ == "__main__":
    main()
