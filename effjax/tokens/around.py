"""Merge before a mixer, restore behind it: for networks whose every layer needs every token."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.stats import Stats
from effjax.tokens.assignment import apply
from effjax.tokens.point import Method, Where
from effjax.tokens.tokens import Tokens


def around(
    method: Method,
    h: Float[Array, "b n c"],
    mix: Callable[[Float[Array, "b m c"], Context], Float[Array, "b m c"]],
    context: Context,
) -> Float[Array, "b n c"]:
    """Mixes fewer tokens, and gives each what the token that holds it became.

    The plan is made of what goes into the mixer, alike in every layer, so that depth stays one scan. Bolya
    and Hoffman, "Token Merging for Fast Stable Diffusion", 2023, section 3.

    Raises:
      UsageError: for a method that reads more than features, or drops tokens.
    """
    if method.needs:
        raise UsageError(
            f"{type(method).__name__} reads {' and '.join(method.needs)} of the mixer, and here tokens merge "
            f"before it: set metric='features', or use a method that reads features alone."
        )
    tokens = Tokens.of(h, grid=context.grid)
    plan = method.plan(tokens, Stats(h), Where(0, 1))
    if plan is None:
        return mix(h, context)
    fewer = apply(plan, tokens, method.proportional)
    return dataclasses.replace(fewer, x=mix(fewer.x, fewer.context(context))).restored().x
