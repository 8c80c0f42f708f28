"""One architecture compared with the library it comes from, on shared random weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from effjax.interop import export, load_variables

FIXTURES = Path(__file__).resolve().parents[1] / "interop" / "fixtures"


Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
      source: name of the family here, `timm:vit_tiny_patch16_224`.
      config: the library's own configuration, given to `load_pretrained`.
      module: makes the original, with any weights.
      inputs: makes the inputs of our model from a generator.
      call: calls the original with our inputs as torch tensors, changing their layout where it differs, and
        returns the output in our layout.
      gradient: whether train-mode gradients are compared too.
      fixture: whether the case is small enough to be recorded, at most 200 KB.
      published: names and cuts the library's tensors in memory as its checkpoints have them, where the two
        differ.
    """

    source: str
    config: dict[str, Any]
    module: Callable[[], torch.nn.Module]
    inputs: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    call: Callable[..., torch.Tensor]
    gradient: bool = False
    fixture: bool = False
    published: Callable[[Tensors], Tensors] = lambda tensors: tensors
    gain: float = 1.0

    def tensors(self, module: torch.nn.Module) -> Tensors:
        """The original's tensors by their names in a checkpoint."""
        return self.published(state(module))


def images(side: int, batch: int = 2) -> Callable[[np.random.Generator], tuple[np.ndarray, ...]]:
    """Inputs: a batch of square pictures."""
    return lambda rng: (rng.standard_normal((batch, side, side, 3), dtype=np.float32),)


def channels_first(module: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """The call of a classifier of pictures."""
    return module(pictures.permute(0, 3, 1, 2))


def original(case: Case, seed: int = 0) -> torch.nn.Module:
    """The original with all parameters and averages drawn anew: no initial zero or one hides a mistake."""
    module = case.module().float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
            centre = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            gain = case.gain if tensor.ndim > 1 else 1.0
            tensor.copy_(centre + torch.randn(tensor.shape, generator=generator) * gain * fan_in**-0.5)
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its tensors as numpy arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def compare_outputs(case: Case) -> float:
    """Largest difference of outputs over the largest output, on random inputs."""
    module = original(case)
    inputs = case.inputs(np.random.default_rng(1))
    with torch.no_grad():
        theirs = case.call(module, *map(torch.from_numpy, inputs)).numpy()
    tensors = case.tensors(module)
    del module
    model, variables = load_variables(case.source, tensors, case.config)
    del tensors  # a billion parameters are not held three times
    ours = np.asarray(jax.jit(model.apply)(variables, *inputs))
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare_round_trip(case: Case) -> list[str]:
    """Names whose tensors do not come back bit by bit; tensors left out on loading are not expected back."""
    tensors = case.tensors(original(case))
    model, variables = load_variables(case.source, tensors, case.config)
    back = export(model, variables, case.source, like=tensors)
    return [
        name
        for name, array in back.items()
        if array.dtype != tensors[name].dtype
        or array.tobytes() != np.ascontiguousarray(tensors[name]).tobytes()
    ]


def compare_gradients(case: Case) -> dict[str, float]:
    """For each of their parameters, the largest difference of gradients over the largest gradient.

    The loss is the mean of outputs times fixed random numbers, in train mode; theirs is computed in float64.
    Gradients are laid out as parameters are, so `export` names ours as theirs. A bias in front of a batch
    norm has no gradient, and what rounding leaves of ours is compared with the largest of all.
    """
    module = original(case).train().double()
    inputs = case.inputs(np.random.default_rng(1))
    outputs = case.call(module, *map(_double, inputs))
    weights = np.random.default_rng(2).standard_normal(outputs.shape, dtype=np.float32)
    (outputs * torch.from_numpy(weights)).mean().backward()
    theirs = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    theirs = case.published(theirs)
    model, variables = load_variables(case.source, case.tensors(original(case)), case.config)

    ours_in = tuple(map(jnp.asarray, inputs))

    @jax.jit
    def gradient(params):
        def loss(params):
            given = {**variables, "params": params}
            outputs, _ = model.apply(given, *ours_in, train=True, mutable=["batch_stats"])
            return jnp.mean(outputs * weights)

        return jax.grad(loss)(params)

    gradients = {**variables, "params": gradient(variables["params"])}
    ours = export(model, gradients, case.source, like=theirs)
    tops = {name: float(np.abs(g).max()) for name, g in theirs.items()}
    largest = max(tops.values())
    scale = {name: top if top > 1e-9 * largest else largest for name, top in tops.items()}
    return {
        name: float(np.abs(ours[name] - g).max()) / scale[name] for name, g in theirs.items() if name in ours
    }


def _double(array: np.ndarray) -> torch.Tensor:
    """An input in float64, where it holds real numbers."""
    tensor = torch.from_numpy(array)
    return tensor.double() if tensor.is_floating_point() else tensor


def record(name: str, case: Case) -> Path:
    """Writes the case's weights, inputs and outputs for the ordinary tests, which have no torch."""
    module = original(case)
    inputs = case.inputs(np.random.default_rng(1))
    with torch.no_grad():
        output = case.call(module, *map(torch.from_numpy, inputs)).numpy()
    path = FIXTURES / f"{name}.npz"
    np.savez_compressed(
        path,
        source=np.array(case.source),
        config=np.array(json.dumps(case.config)),
        output=output,
        **{f"input/{i}": array for i, array in enumerate(inputs)},
        **{f"weight/{key}": array for key, array in case.tensors(module).items()},
    )
    size = path.stat().st_size
    if size > 200_000:
        path.unlink()
        raise ValueError(f"{name} takes {size} bytes; a fixture has 200,000 at most: make the toy smaller")
    return path
