"""What goes through the layers of a network when its task asks it something."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from effjax.compress.subject import Batch, Subject
from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.tokens.tokens import Tokens


def asked(
    subject: Subject, variables: Any, batch: Batch
) -> Callable[[Subject], tuple[Array, list[Float[Array, "b *places c"]]]]:
    """What the task asks of its network, as a question to others: their output, and the stream.

    The stream is what enters the first layer and what leaves each one, `depth + 1` in all.

    Args:
      subject: the network.
      variables: of it.
      batch: as `evaluated` gives it.

    Raises:
      UsageError: where the task asks in a way nobody can listen to, or a network has no stack of layers.
    """
    question: list[Any] = []

    def take(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        # Blocks of a stack are roots too, of what runs inside it.
        if isinstance(context.module, type(subject.model)) and context.method_name == "__call__":
            question.append((args, kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(take):
        subject.task.metrics(variables, batch)
    if not question:
        raise UsageError(f"{type(subject.task).__name__} asks its network in a way nobody can listen to.")
    args, kwargs = question[-1]

    def ask(network: Subject) -> tuple[Array, list[Array]]:
        output, told = network.model.apply(network.variables, *args, **kwargs, mutable=["intermediates"])
        sown = flatten_dict(told.get("intermediates", {}))
        found = [streams({"stream": value}) for path, value in sown.items() if path[-1] == "stream"]
        if not found:
            raise UsageError(f"{type(network.model).__name__} has no stack of layers to listen to.")
        stream = found[0] + [x for stack in found[1:] for x in stack[1:]]
        return output, [x.x if isinstance(x, Tokens) else x for x in stream]

    return ask
