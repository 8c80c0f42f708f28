"""Who proposes tokens to a model that writes: a run, the model's own layers, or the text."""

import dataclasses
from typing import Any

from effjax.data.text import Tokenizer
from effjax.decoding.drafts import Draft, ModelDraft, PromptLookup
from effjax.decoding.layer_plan import keeping, planned
from effjax.errors import UsageError
from effjax.models.lm import LM
from experiments.run.restore import load_run


@dataclasses.dataclass(frozen=True)
class Drafting:
    """What --draft, --draft_layers, --draft_words and --draft_tokens say; one of the first three.

    Attributes:
      run: folder of a run with a smaller model of the same tokenizer.
      layers: of the model itself, that are kept.
      words: the most last tokens of the text that are looked up in it.
      tokens: that are proposed at a time.
    """

    run: str | None = None
    layers: tuple[int, ...] | None = None
    words: int | None = None
    tokens: int = 4

    def __post_init__(self) -> None:
        given = {"--draft": self.run, "--draft_layers": self.layers, "--draft_words": self.words}
        named = [flag for flag, value in given.items() if value is not None]
        if len(named) != 1:
            told = f"{' and '.join(named)} are given" if named else f"none of {', '.join(given)} is given"
            raise UsageError(f"{told}: say by one of them who proposes tokens.")
        for flag, value in (("--draft_tokens", self.tokens), ("--draft_words", self.words)):
            if value is not None and value < 1:
                raise UsageError(f"{flag}={value}: give 1 or more.")

    def made(self, model: Any, variables: Any, tokenizer: Tokenizer) -> tuple[Draft, Any]:
        """The draft for a model, and the draft's variables.

        Args:
          model: that writes.
          variables: of it, with the layers apart.
          tokenizer: of it.

        Raises:
          UsageError: for a run that reads another text or none, and for layers that are not there.
        """
        if self.words is not None:
            return PromptLookup(self.words, self.tokens), None
        if self.layers is not None:
            if not isinstance(model, LM):
                raise UsageError(
                    f"--draft_layers: {type(model).__name__} has no stack to leave layers out of. "
                    f"Give --draft or --draft_words."
                )
            few, cut = planned(model, variables, keeping(model.depth, self.layers))
            return ModelDraft(few, self.tokens), cut
        assert self.run is not None
        program, held = load_run(self.run)
        if program.data.tokenizer is None:
            raise UsageError(f"--draft='{self.run}' holds no language model: its data has no tokenizer.")
        if program.data.tokenizer.identity != tokenizer.identity:
            raise UsageError(
                f"--draft='{self.run}' was trained with another tokenizer, whose tokens mean something "
                f"else: name a run of the same."
            )
        small = program.task.model
        held = small.layers_apart(held) if hasattr(small, "layers_apart") else held
        return ModelDraft(small, self.tokens), held
