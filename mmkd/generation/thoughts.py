"""Thoughts before an answer, between <think> and </think>: told apart, and kept within a budget of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mmkd.models.load import tokenizer_of
from mmkd.teachers.vllm_client import Ids

from .generator import Advance, Answer, Generator, RowError, Sampling
from .local_generation import seed_of

OPEN, CLOSE = "<think>", "</think>"
FORCED_END = f"\n{CLOSE}\n\n"
"""What is written where thoughts reach their budget."""

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Thought:
    """An answer in its two parts; `thoughts` is None where there are none."""

    thoughts: str | None
    answer: str
    ends: bool = True
    """Whether the thoughts come to an end; without one there is no answer."""


def thought_of(text: str, opened: bool = False) -> Thought:
    """The thoughts and the answer of a text; `opened` says that its prompt has opened the thoughts already."""
    thoughts, end, answer = text.rpartition(CLOSE)
    if end:
        return Thought(thoughts.strip().removeprefix(OPEN).strip(), answer.strip())
    before, opening, after = text.partition(OPEN)
    if opening or opened:
        return Thought((after if opening else before).strip(), "", ends=False)
    return Thought(None, text.strip())


def template_thinks(processing_class: Any) -> bool:
    """Whether the chat template of a tokenizer or processor has a place for thoughts."""
    template = getattr(processing_class, "chat_template", None) or tokenizer_of(processing_class).chat_template
    return OPEN in str(template)


def with_thoughts(thoughts: str | None, answer: str) -> str:
    """A text with thoughts before its answer."""
    return answer if not thoughts else f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n{answer.strip()}"


def opens_thoughts(tokenizer: Any, ids: Ids) -> bool:
    """Whether a prompt ends with the opening of thoughts, as the chat templates of some thinking models write it."""
    tail = str(tokenizer.decode([int(i) for i in ids[-8:]], skip_special_tokens=False))
    return tail.rstrip().endswith(OPEN)


@dataclass(frozen=True)
class BudgetedAnswer(Answer):
    """An answer whose thoughts are within the budget; `thoughts_cut` where they had to be ended for that."""

    thoughts_cut: bool = False


class BudgetedGenerator(Generator[Asked]):
    """Answers whose thoughts take at most so many tokens.

    Each answer is first generated up to the budget. One that is still thinking then gets the end of its thoughts and
    goes on with its answer; any other goes on as it was. The tokens so far are part of the next prompt as they are,
    so that an answer within the budget is a sample of the same distribution as without one.

    Args:
        inner: who generates.
        tokenizer: of the model that generates.
        ids_of: the tokens of a prompt.
        continued: a prompt with these tokens instead, which end with those that were generated.
        budget: tokens of thoughts, the opening included.
    """

    def __init__(
        self,
        inner: Generator[Asked],
        tokenizer: Any,
        ids_of: Callable[[Asked], Ids],
        continued: Callable[[Asked, list[int]], Asked],
        budget: int,
    ):
        self.inner, self.tokenizer, self.ids_of, self.continued = inner, tokenizer, ids_of, continued
        self.budget = budget
        self._forced = list(tokenizer(FORCED_END, add_special_tokens=False)["input_ids"])

    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        first = replace(sampling, max_new_tokens=min(self.budget, sampling.max_new_tokens))
        begun = self.inner.generate(prompts, first, samples, advance)
        answers: list[list[Answer] | RowError] = list(begun)
        places, ids, cut = [], [], []
        for number, own in enumerate(begun):
            for sample, answer in enumerate([] if isinstance(own, RowError) else own):
                is_cut = self._thinks(prompts[number], answer)
                so_far = [*answer.ids, *(self._forced if is_cut else [])]
                if answer.finish_reason == "length" and len(so_far) < sampling.max_new_tokens:
                    places.append((number, sample))
                    ids.append(so_far)
                    cut.append(is_cut)
        # The longest room is that of the shortest beginning; what goes over the limit of its own answer is cut off.
        rooms = [sampling.max_new_tokens - len(so_far) for so_far in ids]
        for room in sorted(set(rooms)):
            chosen = [place for place, own in enumerate(rooms) if own == room]
            asked = [
                self.continued(prompts[places[p][0]], [*self._prompt(prompts[places[p][0]]), *ids[p]]) for p in chosen
            ]
            rest = replace(sampling, max_new_tokens=room, seed=seed_of(f"{sampling.seed} after thoughts {room}"))
            for place, own in zip(chosen, self.inner.generate(asked, rest, 1, advance), strict=True):
                number, sample = places[place]
                earlier = answers[number]
                if isinstance(earlier, RowError):
                    continue
                if isinstance(own, RowError):
                    answers[number] = own
                    continue
                earlier[sample] = self._joined(ids[place], own[0], cut[place])
        return answers

    def _prompt(self, prompt: Asked) -> list[int]:
        return [int(i) for i in self.ids_of(prompt)]

    def _thinks(self, prompt: Asked, answer: Answer) -> bool:
        """Whether an answer that reached the budget has not come to the end of its thoughts."""
        opened = opens_thoughts(self.tokenizer, self.ids_of(prompt))
        return answer.finish_reason == "length" and not thought_of(self._text(answer.ids), opened).ends

    def _joined(self, so_far: list[int], rest: Answer, cut: bool) -> BudgetedAnswer:
        ids = [*so_far, *rest.ids]
        return BudgetedAnswer(self._text(ids), ids, rest.finish_reason, thoughts_cut=cut)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
