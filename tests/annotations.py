"""Every annotation of the library is checked on every call, as cheaply as it can be."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype

JAXTYPED = jaxtyping.jaxtyped


def install(modules: list[str]) -> None:
    """Checks the functions of these modules, which are not imported yet."""
    # The hook writes this name above every function and class.
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What jaxtyping does, where shapes are named; elsewhere nothing is to be remembered for a call.

    Binding arguments and keeping the sizes of named axes takes a quarter of the time in which a model is
    traced, and most functions name none.
    """
    whole = JAXTYPED(typechecker=typechecker)

    def checked(made):
        if not inspect.isfunction(made) or inspect.isgeneratorfunction(made):
            return whole(made)
        shaped = any(map(_names_shapes, made.__annotations__.values()))
        if shaped:
            return whole(made)
        return made if "<locals>" in made.__qualname__ else beartype(made)

    return checked


def _names_shapes(annotation: Any) -> bool:
    """Whether it holds a type of jaxtyping; one that is a string may."""
    if isinstance(annotation, str) or getattr(annotation, "__module__", "").startswith("jaxtyping"):
        return True
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    return any(map(_names_shapes, parts))
