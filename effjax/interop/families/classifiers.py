"""What transformers' image classifiers have in common: how a configuration says what the classes are."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from effjax.config import build
from effjax.errors import UsageError

Schema = TypeVar("Schema")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """Keys of every configuration."""

    num_channels: int = 3
    image_size: int | tuple[int, int] = 224
    hidden_act: str = "gelu"
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None
    architectures: tuple[str, ...] | None = None

    @property
    def classes(self) -> int:
        """Outputs of the classifier; 0 for a bare model, whose output is the pooled vector.

        Raises:
          UsageError: for another class than these two.
        """
        architecture = self.architectures[0] if self.architectures else "ForImageClassification"
        if architecture.endswith("Model"):
            return 0
        if not architecture.endswith("ForImageClassification"):
            raise UsageError(
                f"config.architectures is {architecture!r}: a classifier or a bare model is read here."
            )
        labels = 2 if self.id2label is None else len(self.id2label)
        return labels if self.num_labels is None else self.num_labels


def read(schema: type[Schema], config: Mapping[str, Any]) -> Schema:
    """Reads the keys that a schema has; a configuration has many that do not matter."""
    keys = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    section = {key: config[key] for key in keys if config.get(key) is not None}
    if "id2label" in section:
        section["id2label"] = {str(key): value for key, value in section["id2label"].items()}
    return build(schema, section, "config")


def complete(config: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """Says which class the tensors belong to, where the configuration does not."""
    if config.get("architectures"):
        return config
    classifies = any(name.startswith("classifier.") for name in tensors)
    return {**config, "architectures": ("ForImageClassification" if classifies else "Model",)}
