"""Exported students that answer: prompts of rows and conversations go on by their own runtime."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mmkd.data.prompts import model_inputs, pictures_of
from mmkd.errors import UserError
from mmkd.generation.generator import Advance, Answer, Generator, RowError, Sampling
from mmkd.generation.row_answers import PromptWithTools
from mmkd.models.load import tokenizer_of

from .exported import Exported
from .loading import runtime_of
from .runtimes import Runtime


class ExportedGenerator(Generator[PromptWithTools]):
    """Answers prompts of text, one by one."""

    def __init__(self, runtime: Runtime, processing_class: Any, stops: Sequence[int]):
        self.runtime, self.processing_class, self.stops = runtime, processing_class, list(stops)

    @classmethod
    def of(cls, exported: Exported, processing_class: Any) -> "ExportedGenerator":
        """That of an exported student, loaded."""
        return cls(runtime_of(exported), processing_class, stops_of(exported, tokenizer_of(processing_class)))

    def generate(
        self,
        prompts: Sequence[PromptWithTools],
        sampling: Sampling,
        samples: int = 1,
        advance: Advance = lambda _: None,
    ) -> list[list[Answer] | RowError]:
        answers: list[list[Answer] | RowError] = []
        for number, asked in enumerate(prompts):
            ids = self._ids(asked)
            own = []
            for sample in range(samples):
                drawn = Sampling(**{**vars(sampling), "seed": sampling.seed + number * samples + sample})
                tokens = list(self.runtime.tokens(ids, drawn, self.stops))
                ended = bool(tokens) and tokens[-1] in self.stops
                own.append(Answer(self._text(tokens), tokens, "stop" if ended else "length"))
                advance(len(tokens))
            answers.append(own)
        return answers

    def stream(self, prompt: PromptWithTools, sampling: Sampling) -> Iterator[str]:
        said, tokens = "", []
        for token in self.runtime.tokens(self._ids(prompt), sampling, self.stops):
            tokens.append(token)
            text = self._text(tokens)
            # A character of several tokens is there with the last of them.
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text

    def _ids(self, asked: PromptWithTools) -> list[int]:
        prompt, tools = asked
        if pictures_of(prompt):
            raise UserError(
                f"{self.runtime.name} is not given images here. Ask without an image.", because="not built"
            )
        return model_inputs(self.processing_class, [prompt], [tools])["input_ids"][0].tolist()

    def _text(self, tokens: Sequence[int]) -> str:
        return str(tokenizer_of(self.processing_class).decode(list(tokens), skip_special_tokens=True))


def stops_of(exported: Exported, tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: by the generation settings beside an exported student, and the tokenizer."""
    path = exported.folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [*([stops] if isinstance(stops, int) else stops or []), tokenizer.eos_token_id]
