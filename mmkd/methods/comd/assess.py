"""Assessors: how good the answers of teacher and student to an instruction are."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mmkd.errors import UserError
from mmkd.generation.generator import Sampling

from .comd_prompts import Prompts
from .instructions import Instruction, answered
from .reply_record import Advance, Engine, Question, Record, Reply
from .select import Score, both_orders
from .text import normalised, rouge_l, words

ASSESSORS = {"judge": 1.0, "exact": 1.0, "rouge": 0.3, "likelihood": 0.5, "agreement": 0.5}
"""Name of an assessor -> the gap from which it calls an instruction hard: points of 10, matches, ROUGE-L, nats."""

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")
# Fewer opinions than this are no ground to call a judge one-sided.
_ENOUGH = 8


@dataclass(frozen=True)
class AnswerPair:
    """An instruction with the answers of teacher and student."""

    instruction: Instruction
    teacher: str
    student: str


@dataclass
class Assessment:
    """The scores of what could be scored, and what became of the rest."""

    scores: list[Score]
    dropped: int = 0
    """Unparsable after all tries."""
    asked_again: int = 0
    first_preferred: float | None = None
    """Share of a judge's contradictory pairs in which it preferred what was shown first."""
    facts: dict[str, str] = field(default_factory=dict)


class Assessor(ABC):
    """Scores answers, in the order of the pairs."""

    @abstractmethod
    def assess(self, pairs: Sequence[AnswerPair], phase: str, advance: Advance) -> Assessment:
        """The scores of all pairs. Raises UserError for an assessor that cannot be trusted."""


class ReferenceAssessor(Assessor):
    """Compares each answer with the data's own: equal word for word (`exact`), or by ROUGE-L (`rouge`).

    Instructions without a reference are left out: those made in the loop have none.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def assess(self, pairs: Sequence[AnswerPair], phase: str, advance: Advance) -> Assessment:
        scores = []
        for pair in pairs:
            reference = pair.instruction.reference
            if reference is not None:
                teacher, student = (match(self.kind, answer, reference) for answer in (pair.teacher, pair.student))
                scores.append(Score(pair.instruction.key, teacher, student))
        advance(len(pairs), 0)
        if not scores:
            raise UserError(
                f"assessor: {self.kind} compares with the data's own answers, but no instruction has one. Choose "
                "assessor: judge, likelihood or agreement.",
                because="meaning",
            )
        return Assessment(scores)


class AgreementAssessor(Assessor):
    """How much the student says what the teacher says: 1 where the answers are equal, else their ROUGE-L."""

    def assess(self, pairs: Sequence[AnswerPair], phase: str, advance: Advance) -> Assessment:
        scores = [Score(pair.instruction.key, 1.0, match("rouge", pair.student, pair.teacher)) for pair in pairs]
        advance(len(pairs), 0)
        return Assessment(scores)


class LikelihoodAssessor(Assessor):
    """The mean log-prob of the teacher's answer by teacher and by student, in nats per token of the teacher.

    Both sums are divided by the teacher's count, so that the two may have different tokenizers.
    """

    def __init__(self, record: Record, teacher: Engine, student: Engine):
        self.record, self.teacher, self.student = record, teacher, student

    def assess(self, pairs: Sequence[AnswerPair], phase: str, advance: Advance) -> Assessment:
        questions = [question_of(pair.instruction, answer=pair.teacher) for pair in pairs]
        replies: list[list[Reply]] = []
        for engine in (self.teacher, self.student):
            replies.append(self.record.ask(engine, questions, Sampling(1), phase, advance))
            engine.close()
        scores = []
        for pair, ours, theirs in zip(pairs, *replies, strict=True):
            assert ours.log_prob is not None
            assert theirs.log_prob is not None
            count = max(1, ours.tokens)
            scores.append(Score(pair.instruction.key, ours.log_prob / count, theirs.log_prob / count))
        return Assessment(scores)


class JudgeAssessor(Assessor):
    """A language model that rates both answers from 1 to 10, asked in both orders.

    A reply without two such numbers is asked again, `retries` times, then dropped with its pair. Raises UserError
    when more than `max_dropped` of the pairs are lost, and when the judge goes by the order and not by the answers:
    more than `max_one_sided` of its preferences are for one place.
    """

    def __init__(
        self,
        record: Record,
        engine: Engine,
        prompts: Prompts,
        sampling: Sampling,
        retries: int = 2,
        max_dropped: float = 0.5,
        max_one_sided: float = 0.9,
    ):
        self.record, self.engine, self.prompts, self.sampling = record, engine, prompts, sampling
        self.retries, self.max_dropped, self.max_one_sided = retries, max_dropped, max_one_sided

    def assess(self, pairs: Sequence[AnswerPair], phase: str, advance: Advance) -> Assessment:
        questions = [self.question(pair, swapped) for pair in pairs for swapped in (False, True)]
        opinions: list[tuple[float, float] | None] = [None] * len(questions)
        missing, again, example = list(range(len(questions))), 0, ""
        for attempt in range(1 + self.retries):
            again_asked = [
                self._again(questions[place], attempt) if attempt else questions[place] for place in missing
            ]
            replies = self.record.ask(
                self.engine, again_asked, self.sampling, phase, advance if not attempt else _nothing
            )
            for place, reply in zip(missing, replies, strict=True):
                opinions[place] = parse_scores(reply.text)
                example = reply.text if opinions[place] is None else example
            missing = [place for place in missing if opinions[place] is None]
            if not missing:
                break
            again += len(missing) if attempt < self.retries else 0
        scores = [
            both_orders(pair.instruction.key, first, second)
            for pair, first, second in zip(pairs, opinions[::2], opinions[1::2], strict=True)
            if first is not None and second is not None
        ]
        assessment = Assessment(scores, len(pairs) - len(scores), again)
        if assessment.dropped > self.max_dropped * len(pairs):
            raise UserError(
                f"The judge answers nonsense: {assessment.dropped} of {len(pairs)} pairs have no two scores from 1 to "
                f"10 after {1 + self.retries} tries, as in {example[:200]!r}. Use a stronger assessor_model, edit the "
                "prompt judge.txt, or choose assessor: likelihood, agreement, exact or rouge."
            )
        assessment.first_preferred = self._first_preferred(scores)
        return assessment

    def question(self, pair: AnswerPair, swapped: bool) -> Question:
        """What the judge is asked about a pair, with the student's answer first where swapped."""
        answers = (pair.student, pair.teacher) if swapped else (pair.teacher, pair.student)
        text = self.prompts.fill(
            "judge",
            instruction=pair.instruction.text,
            answer_1=answers[0],
            answer_2=answers[1],
            reference=pair.instruction.reference or "",
        )
        return asked_about(pair.instruction, text)

    def _again(self, question: Question, attempt: int) -> Question:
        reminder = {"role": "user", "content": self.prompts.fill("judge_again")}
        # Two messages of the user in a row are refused by many chat templates.
        messages = answered(question.messages, "...")
        return replace(question, messages=(*messages, _like(reminder, question)), sample=attempt)

    def _first_preferred(self, scores: Sequence[Score]) -> float | None:
        """The share of preferences that are for what is shown first."""
        first = [(a[0] > a[1]) + (b[1] > b[0]) for a, b in (score.orders for score in scores)]
        second = [(a[0] < a[1]) + (b[1] < b[0]) for a, b in (score.orders for score in scores)]
        preferences = sum(first) + sum(second)
        if preferences == 0:
            return None
        share = sum(first) / preferences
        side = "first" if share > 0.5 else "second"
        if preferences >= _ENOUGH and max(share, 1 - share) > self.max_one_sided:
            raise UserError(
                f"The judge goes by the order: {max(share, 1 - share):.0%} of its {preferences} preferences are for "
                f"the answer shown {side}, whoever gave it. Its scores say nothing. Use a stronger assessor_model, "
                "edit the prompt judge.txt, or choose assessor: likelihood, agreement, exact or rouge."
            )
        return round(share, 4)


def parse_scores(reply: str) -> tuple[float, float] | None:
    """The two scores on the first line of a judge's reply, None where there are not two numbers from 1 to 10."""
    first = next((line for line in reply.splitlines() if line.strip()), "")
    # "8/10 and 6/10", "Assistant 1: 8, assistant 2: 6": what belongs to the labels is no score.
    line = re.sub(r"/\s*10(\.0)?\b", " ", re.sub(r"(?i)\b(assistant|answer|score|rating)\s*[12]\b", " ", first))
    numbers = [float(number) for number in _NUMBER.findall(line)]
    if len(numbers) != 2 or not all(1 <= number <= 10 for number in numbers):
        return None
    return numbers[0], numbers[1]


def match(kind: str, answer: str, reference: str) -> float:
    """How well an answer matches: 1 where it is equal but for case and spaces, else 0 (exact) or ROUGE-L (rouge)."""
    if normalised(answer) == normalised(reference):
        return 1.0
    return 0.0 if kind == "exact" else rouge_l(words(answer), words(reference))


def question_of(instruction: Instruction, answer: str | None = None) -> Question:
    """The instruction itself as a question, or how likely an answer to it is."""
    return Question(instruction.prompt, instruction.images, (instruction.key,), answer)


def asked_about(instruction: Instruction, text: str, sample: int = 0) -> Question:
    """A text about an instruction as a question, its images shown before it."""
    parts = [part for message in instruction.prompt for part in _images(message)]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return Question(({"role": "user", "content": content},), instruction.images, (instruction.key,), sample=sample)


def _images(message: object) -> list[dict[str, str]]:
    content = message["content"]  # pyright: ignore[reportIndexIssue]
    return [] if isinstance(content, str) else [{"type": "image"} for part in content if part["type"] == "image"]


def _like(message: dict[str, str], question: Question) -> dict[str, object]:
    """The message in parts where those of the question are."""
    if isinstance(question.messages[0]["content"], str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _nothing(questions: int, tokens: int) -> None:
    """Questions that are asked again were counted before."""
