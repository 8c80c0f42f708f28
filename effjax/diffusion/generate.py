"""Pictures of asked-for classes from a trained task."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int, Key

from effjax.diffusion.guidance import guided
from effjax.diffusion.samplers import Sampler, sample
from effjax.errors import UsageError
from effjax.train.tasks.diffusion import Diffusion


def check_request(task: Diffusion, sampler: Sampler, classes: Sequence[int], guidance: float) -> None:
    """Refuses what cannot be sampled, before anything is compiled.

    Raises:
      UsageError: for a class that the model does not have, guidance of a model that was never trained
        without labels, a sampler that does not fit the process, or too many steps.
    """
    known = task.model.classes
    for number in classes:
        if not 0 <= number < known:
            raise UsageError(f"class {number} does not exist: the model knows classes 0 to {known - 1}.")
    if guidance < 0:
        raise UsageError(f"guidance={guidance:g} must not be negative: 1 is none, 0 ignores the class.")
    if guidance != 1.0 and task.null is None:
        raise UsageError(
            f"guidance={guidance:g} needs a model trained with dropped labels, and this one was trained with "
            f"label_dropout=0: sample with guidance=1."
        )
    sampler.plan(task.process)


def sample_classes(
    task: Diffusion,
    variables: Any,
    label: Int[Array, " b"],
    shape: Sequence[int],
    sampler: Sampler,
    guidance: float,
    keys: Key[Array, " b"],
) -> Float[Array, "b *shape"]:
    """Draws one picture for each label; `check_request` says what is refused.

    Args:
      task: holds the model and the process it was trained on.
      variables: the model's, or their moving average.
      label: class of each picture.
      shape: of one picture, `(H, W, C)`.
      sampler: how to walk from noise to picture.
      guidance: scale of classifier-free guidance; 1 samples the conditional model at half the cost.
      keys: one for each picture; a picture depends on its key alone, not on its batch.
    """
    denoiser = task.denoiser(variables)
    if guidance != 1.0:
        if task.null is None:
            raise UsageError("guidance needs a model that was trained with dropped labels.")
        denoiser = guided(denoiser, guidance, task.null)
    return sample(sampler, denoiser, task.process, label, shape, keys)
