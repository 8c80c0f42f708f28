"""`pydocs`: the English of Python's own documentation, from the interpreter that is running.

The language reference's topics (`pydoc_data.topics`) and the docstrings of the standard library's modules,
classes and functions. The source files are parsed, never imported.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

SHORTEST = 64  # characters; what is shorter is a phrase, not a document
TEST_SHARE = 0.05
# Tests are code, vendored wheels are other people's, and the rest are tables or games.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "_vendor"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Pydocs(tfds.core.GeneratorBasedBuilder):
    """Documents of Python's documentation: `text` (UTF-8) and `name`, such as `asyncio.runners.run`.

    The version of the data set is the version of Python it was read from. A document goes to `test` by the
    hash of its text (5 in 100), so the same text is on the same side under every Python.
    """

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))
    url_infos = None  # nothing is downloaded; TFDS's own look-up wants a package it does not require

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documentation topics and standard library docstrings of Python.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()}),
            homepage="https://docs.python.org",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        found = documents()
        return {
            "train": self._generate_examples({n: t for n, t in found.items() if not in_test(t)}),
            "test": self._generate_examples({n: t for n, t in found.items() if in_test(t)}),
        }

    def _generate_examples(self, found: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in found.items():
            yield name, {"text": text, "name": name}


def documents() -> dict[str, str]:
    """Returns `{name: text}`, sorted by name, each text once."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = dict(_topics(library / "pydoc_data" / "topics.py"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not LEFT_OUT.intersection(parts) and parts[0] != "pydoc_data":
            found.update(_docstrings(path, ".".join(parts).removesuffix(".__init__")))
    # Which of two names keeps a text must not depend on the order of the walk.
    first = {text: name for name, text in sorted(found.items(), reverse=True)}
    return {name: text for text, name in sorted(first.items(), key=lambda item: item[1])}


def in_test(text: str) -> bool:
    """Whether a document is held out: decided by its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the reference's topics, which stand in their file as one literal dictionary."""
    if not path.exists():  # some distributions split it off
        return
    for statement in _parse(path).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in ast.literal_eval(statement.value).items():
                yield f"topics.{topic}", inspect.cleandoc(text)


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yields the docstrings of a file under their qualified names."""
    waiting: list[tuple[str, _Documented]] = [(module, _parse(path))]
    while waiting:
        name, node = waiting.pop()
        text = ast.get_docstring(node, clean=True)
        if text and len(text) >= SHORTEST:
            yield name, text.encode(errors="replace").decode()
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append((f"{name}.{child.name}", child))


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old string escapes in the library are not our users' concern
        return ast.parse(path.read_bytes())
