"""What `bench models` times: one forward pass and one training step, here and in timm.

The training step is the same on both sides: the mean cross-entropy of one batch against fixed labels and its
gradient for every parameter, with batch statistics where the model has them, without dropout, stochastic
depth and optimiser. The forward pass is that of evaluation. Everything is float32, with random weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Each runs its step once, to the end.
Steps = Mapping[str, Callable[[], Any]]


def inputs(batch: int, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels, the same for both sides."""
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, *shape), dtype=np.float32)
    return images, random.integers(0, classes, batch, dtype=np.int64)


def effjax_steps(model: Any, images: np.ndarray, labels: np.ndarray) -> Steps:
    """Both steps of a model of effjax."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax.core import meta

    pixels, classes = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), pixels[:1]))
    params = variables.pop("params")

    @jax.jit
    def forward(params, collections, pixels):
        return model.apply({"params": params, **collections}, pixels)

    @jax.jit
    def train(params, collections, pixels, classes):
        def loss(params):
            both = {"params": params, **collections}
            logits, changed = model.apply(both, pixels, train=True, mutable=list(collections))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes)), changed

        return jax.value_and_grad(loss, has_aux=True)(params)

    return {
        "forward": lambda: jax.block_until_ready(forward(params, variables, pixels)),
        "train": lambda: jax.block_until_ready(train(params, variables, pixels, classes)),
    }


def timm_steps(architecture: str, images: np.ndarray, labels: np.ndarray, classes: int) -> Steps:
    """Both steps of a model of timm, eagerly."""
    import timm
    import torch

    model = timm.create_model(architecture, pretrained=False, in_chans=images.shape[-1], num_classes=classes)
    pixels, targets = torch.from_numpy(np.moveaxis(images, -1, 1).copy()), torch.from_numpy(labels)

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            model(pixels)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(pixels), targets).backward()

    return {"forward": forward, "train": train}
