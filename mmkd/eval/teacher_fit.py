"""How well a teacher and a student go together: on the data's answers and on the student's own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.alignment.vocab import shared_tokens
from mmkd.errors import UserError
from mmkd.generation.thoughts import OPEN, template_thinks
from mmkd.losses.divergences import entropy, reverse_kl

from .acceptance import acceptance, measured_tokens_per_pass, tokens_per_pass
from .answer_readings import AnsweredPrompt, AnswerReader

TOP_K = 64
"""As many tokens as a cache keeps by default."""

Advance = Callable[[], None]


class Means:
    """Means of named values, each over its own items."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._items: dict[str, int] = {}

    def add(self, items: int, **totals: Tensor | float) -> None:
        """Adds sums over so many items."""
        for name, total in totals.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(total)
            self._items[name] = self._items.get(name, 0) + items

    def result(self) -> dict[str, float]:
        """The means; names without items are left out."""
        return {name: total / self._items[name] for name, total in self._sums.items() if self._items[name]}


@dataclass(frozen=True)
class Pair:
    """A student and a teacher, loaded."""

    student: AnswerReader
    teacher: AnswerReader

    @cached_property
    def vocabulary(self) -> int | None:
        """The first tokens that mean the same to both; None for two tokenizers."""
        try:
            return shared_tokens(self.student.tokenizer, self.teacher.tokenizer)
        except UserError:
            return None

    def tokenizers(self, texts: Sequence[AnsweredPrompt]) -> dict[str, float]:
        """The share of the student's vocabulary that the teacher has too, and of its tokens' ends in the texts."""
        ours, theirs = (set(side.tokenizer.get_vocab()) for side in (self.student, self.teacher))
        ends = Means()
        for text in texts:
            own, other = self.student.ends_of(text.answer), set(self.teacher.ends_of(text.answer))
            ends.add(len(own), shared_ends=sum(end in other for end in own))
        return {"shared_vocabulary": len(ours & theirs) / len(ours), **ends.result()}

    def compared(self, texts: Sequence[AnsweredPrompt], advance: Advance) -> dict[str, float]:
        """Means over the answers of texts; where tokenizers differ, of what does not depend on tokens."""
        vocabulary, means, read = self.vocabulary, Means(), 0
        for text in texts:
            advance()
            if vocabulary is None:
                ours, theirs = (side.ids_of(text.answer) for side in (self.student, self.teacher))
            else:
                ours = theirs = list(text.ids or self.student.ids_of(text.answer))
            if not ours or not theirs or max(ours) >= (vocabulary or math.inf):
                continue
            student, teacher = self.student.log_probs(text, ours), self.teacher.log_probs(text, theirs)
            if student is None or teacher is None:
                continue
            read += 1
            # Over all rows of a model's head, as it is used.
            bits = (-_of_labels(side, ids) / math.log(2) for side, ids in ((student, ours), (teacher, theirs)))
            means.add(text.size, **dict(zip(("student_bits_per_byte", "teacher_bits_per_byte"), bits, strict=True)))
            if vocabulary is not None:
                sides = (side[:, :vocabulary].log_softmax(-1) for side in (student, teacher))
                means.add(len(ours), **_token_sums(*sides))
            else:
                places, alike = self._agreement_of_words(text.answer, student, teacher)
                means.add(places, agreement=alike)
        return {**means.result(), "texts": read, "left_out": len(texts) - read}

    def _agreement_of_words(self, answer: str, student: Tensor, teacher: Tensor) -> tuple[int, float]:
        """Where a token of both sides begins at the same character: how many places, and at how many both go on alike.

        Alike are tokens of which one begins with the other.
        """
        starts = [
            {place: number for number, place in enumerate([0, *side.ends_of(answer)])}
            for side in (self.student, self.teacher)
        ]
        places = [place for place in starts[0] if place in starts[1] and place < len(answer)]
        alike = 0
        for place in places:
            words = [
                side.tokenizer.decode([int(log_probs[own[place]].argmax())])
                for side, log_probs, own in zip((self.student, self.teacher), (student, teacher), starts, strict=True)
            ]
            alike += bool(words[0] and words[1]) and (words[0].startswith(words[1]) or words[1].startswith(words[0]))
        return len(places), alike

    def accepted(
        self,
        sampled: Sequence[AnsweredPrompt],
        greedy: Sequence[AnsweredPrompt],
        draft_tokens: int,
        advance: Advance = lambda: None,
    ) -> dict[str, float]:
        """How many drafted tokens of the student the teacher keeps, on what the teacher itself writes in both ways.

        Raises UserError for two tokenizers.
        """
        if self.vocabulary is None:
            raise UserError(
                "acceptance: a draft model speaks the tokens of its target, and these two have different tokenizers.",
                because="meaning",
            )
        rates, ratios = Means(), list[Tensor]()
        for student, teacher, labels in self._both(sampled, advance):
            rates.add(len(labels), acceptance=acceptance(student, teacher).sum())
            ratios.append((student - teacher).gather(-1, labels)[:, 0].clamp(max=0).exp())
        alike = [
            (student.argmax(-1) == teacher.argmax(-1)).float() for student, teacher, _ in self._both(greedy, advance)
        ]
        rate = rates.result().get("acceptance", math.nan)
        return {
            "acceptance": rate,
            "tokens_per_pass": measured_tokens_per_pass(ratios, draft_tokens),
            "tokens_per_pass_if_independent": tokens_per_pass(rate, draft_tokens),
            "tokens_per_pass_greedy": measured_tokens_per_pass(alike, draft_tokens),
            "draft_tokens": draft_tokens,
            "texts": len(ratios),
        }

    def _both(
        self, texts: Sequence[AnsweredPrompt], advance: Advance
    ) -> Iterator[tuple[Float[Tensor, "token vocab"], Float[Tensor, "token vocab"], Int[Tensor, "token 1"]]]:
        """Log-probs of the student and the teacher over what both know, and the tokens, of what they have room for."""
        for text in texts:
            advance()
            ids = list(text.ids or ())
            sides = [side.log_probs(text, ids) if ids else None for side in (self.student, self.teacher)]
            if sides[0] is not None and sides[1] is not None:
                student, teacher = (side[:, : self.vocabulary].log_softmax(-1) for side in (sides[0], sides[1]))
                yield student, teacher, torch.tensor(ids, device=student.device)[:, None]


def pattern_of(reader: AnswerReader, answers: Sequence[AnsweredPrompt]) -> dict[str, float]:
    """How a model answers: in how many tokens, and whether it thinks first. Its template says so, too."""
    means = Means()
    for answer in answers:
        means.add(1, tokens=len(answer.ids or ()), characters=len(answer.answer), thinks=OPEN in answer.answer)
    return {**means.result(), "template_thinks": float(template_thinks(reader.processing_class))}


def _of_labels(log_probs: Float[Tensor, "token vocab"], ids: Sequence[int]) -> float:
    labels = torch.tensor(ids, device=log_probs.device)[:, None]
    return log_probs.gather(-1, labels).double().sum().item()


def _token_sums(
    student: Float[Tensor, "token vocab"], teacher: Float[Tensor, "token vocab"]
) -> Mapping[str, Tensor | float]:
    """Sums over tokens of how alike two distributions are."""
    size = min(TOP_K, student.shape[-1])
    ours, theirs = student.topk(size).indices, teacher.topk(size).indices
    shared = torch.zeros_like(student, dtype=torch.bool).scatter_(-1, ours, True).gather(-1, theirs)
    return {
        "agreement": (ours[:, 0] == theirs[:, 0]).sum(),
        "top_k_overlap": shared.double().sum() / size,
        "student_mass_on_student_top_k": student.gather(-1, ours).exp().double().sum(),
        "teacher_mass_on_student_top_k": teacher.gather(-1, ours).exp().double().sum(),
        "student_mass_on_teacher_top_k": student.gather(-1, theirs).exp().double().sum(),
        "kl_to_teacher": reverse_kl(student, teacher).double().sum(),
        "student_entropy": entropy(student).double().sum(),
        "teacher_entropy": entropy(teacher).double().sum(),
    }


def weight_facts(reader: AnswerReader) -> dict[str, float]:
    """Parameters of a model, and bytes of its weights as they are loaded; nothing of one that is not loaded here."""
    model = reader.model
    if model is None:
        return {}
    sizes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {"parameters": model.num_parameters(), "weight_bytes": sizes}
