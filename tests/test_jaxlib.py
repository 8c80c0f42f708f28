"""What jaxlib must get right for anything here to be right: pyproject leaves out the versions that do not."""

import os
import subprocess
import sys

# jaxlib 0.10.2 and 0.11.0 are off by 6.8 on x86 CPUs: a sum and what follows it are fused wrongly.
PROGRAM = """
import jax, numpy as np
y, w = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((48, 8), (384, 48, 8)))
found = jax.jit(lambda y, w: y[None] * (y[None] * w).mean(-1, keepdims=True))(y, w)
print(np.abs(found - y[None] * (y[None] * w).mean(-1, keepdims=True)).max())
"""


def test_a_mean_that_scales_what_it_was_taken_of():
    # In a process of its own: with the flags that everybody runs with, not those of tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert float(said.stdout) < 1e-5
