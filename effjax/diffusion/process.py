"""Processes by the name a config gives them.

A process is a frozen dataclass of pure functions; `t [B]` is its own time, an index or a number in [0, 1]:

    times(uniform) -> t                    training times, from uniform numbers in [0, 1)
    network_time(t) -> number              what the network is told, in the range 0 to 1000
    noise(x0, eps, t) -> x_t               the noisy picture
    target(x0, eps, t)                     what the network should predict
    split(prediction, channels)            its mean and its variance share, None where there is none
    to_x0_eps(mean, x_t, t) -> (x0, eps)   a prediction read as picture and as noise
    to_eps(x0, x_t, t) -> eps              the noise that leads from one to the other
    loss(prediction, x0, eps, t, noised)   {"loss": [B], "mse": [B], ...}, over the noised parts or over all
    learned_sigma                          whether predictions have twice the channels
    latest                                 the noisiest time
"""

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.rectified_flow import RectifiedFlow

Process = DDPM | RectifiedFlow

KINDS = {"ddpm": DDPM, "rectified_flow": RectifiedFlow}


def kind_of(process: Process) -> str:
    """The name of a process in `KINDS`, for messages."""
    return next(kind for kind, known in KINDS.items() if isinstance(process, known))
