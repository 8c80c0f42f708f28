"""What a language model is called with."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def token_inputs(model: Any, config: Mapping[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A batch of one text of one token: parameters do not depend on either."""
    del model, config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
