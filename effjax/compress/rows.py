"""The matrices of sparse perceptrons turned so that a neuron's weights lie side by side, for decoding."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from effjax.errors import UsageError
from effjax.ffn.active import Implementation
from effjax.ffn.cats import CATS
from effjax.ffn.spark import SparkFFN
from effjax.models.lm import LM


def by_rows(
    model: LM, variables: Mapping[str, Any], implementation: Implementation = "plain"
) -> tuple[LM, dict[str, Any]]:
    """Returns the same function with a row a neuron in every matrix of its perceptrons, for decoding.

    Args:
      model: whose perceptrons leave neurons out: CATS or Spark.
      variables: of it.
      implementation: of the step, see `effjax.ffn.active`.

    Raises:
      UsageError: for other perceptrons, or such as are stored by rows already.
    """
    ffn = model.block.ffn
    if not isinstance(ffn, CATS | SparkFFN) or ffn.by_rows:
        raise UsageError(
            "only perceptrons that leave neurons out, and are not stored by rows yet, can be stored by rows."
        )
    params = variables["params"]
    held = params["blocks"]["ffn"]
    turned = {name: {"kernel": jnp.swapaxes(held[name]["kernel"], -1, -2)} for name in ("gate", "expand")}
    blocks = {**params["blocks"], "ffn": {**held, **turned}}
    fast = model.clone(block=model.block.clone(ffn=ffn.clone(by_rows=True, implementation=implementation)))
    return fast, {**variables, "params": {**params, "blocks": blocks}}
