"""Samplers of flows.

    euler   x' = x + (t' - t) v(x, t)                                                 Liu et al. 2023
    heun    x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v(x, t), t')) / 2

A prime marks the next step; time runs from 1, noise, to 0, the picture.
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Key

from effjax.diffusion.process import Process
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers.state import Denoise, Plan, State, even, everywhere, flow


@dataclasses.dataclass(frozen=True)
class EulerSampler:
    """Straight steps along the velocity of a rectified flow, from t = 1 to t = 0.

    Attributes:
      steps: equal steps, one evaluation each.
    """

    remembered: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1

    steps: int = 50

    def plan(self, process: Process) -> Plan:
        """Where each step starts and ends."""
        flow(process, "euler")
        t = even(self.steps)
        return {"t": t[:-1], "after": t[1:]}

    def step(
        self, denoise: Denoise, process: RectifiedFlow, state: State, at: Any, keys: Key[Array, " b"]
    ) -> State:
        """One step, one evaluation."""
        v, memory = denoise(state.x, everywhere(at["t"], state.x), state.memory)
        move = at["after"] - at["t"]
        return State(state.x + move * v, state.x - at["t"] * v, state.earlier, memory)


@dataclasses.dataclass(frozen=True)
class HeunSampler:
    """Euler's step corrected by the velocity where it arrives: second order.

    Attributes:
      steps: equal steps, two evaluations each.
    """

    remembered: ClassVar[int] = 0
    evaluations: ClassVar[int] = 2

    steps: int = 25

    def plan(self, process: Process) -> Plan:
        """Where each step starts and ends."""
        flow(process, "heun")
        t = even(self.steps)
        return {"t": t[:-1], "after": t[1:]}

    def step(
        self, denoise: Denoise, process: RectifiedFlow, state: State, at: Any, keys: Key[Array, " b"]
    ) -> State:
        """One step, two evaluations."""
        move = at["after"] - at["t"]
        v, memory = denoise(state.x, everywhere(at["t"], state.x), state.memory)
        there, memory = denoise(state.x + move * v, everywhere(at["after"], state.x), memory)
        v = 0.5 * (v + there)
        return State(state.x + move * v, state.x - at["t"] * v, state.earlier, memory)
