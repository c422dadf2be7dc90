"""Settings of method clip_kd about orders of wrong answers: ranking, its teacher, and hard negatives."""

from dataclasses import dataclass, field
from typing import ClassVar

from mmkd.errors import UserError
from mmkd.field_docs import DocumentedFields
from mmkd.schema import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass
class RankingConfig(DocumentedFields):
    """Settings of the terms that learn from how a teacher orders wrong answers."""

    scored_least: ClassVar[float] = 0.1
    """The probability from which a score of ranking_teacher says something, where ranking_min is not set."""

    ranking: str = field(
        default="none",
        metadata={
            "help": "Learn in which order the teacher puts the other texts of an image, and the other images of a "
            "text. cprd: the order of hard negatives, up to the first that ranking_min makes worthless. pld: the "
            "right answer first and the others by the teacher's score, each weighted by its probability. none "
            "(default): neither.",
            "choices": ["none", "cprd", "pld"],
        },
    )
    ranking_weight: NonNegativeFloat = field(
        default=1.0, metadata={"help": "Weight of ranking, for which ranking is set. Default: 1."}
    )
    ranking_teacher: str | None = field(
        default=None,
        metadata={
            "help": "For ranking. The model whose order is learnt: a reranker (a cross-encoder with one logit), or a "
            "VLM or LLM that is asked whether the two belong together. A Hub id or a folder. A reranker reads the "
            "caption of a picture in the picture's place. Default: the cosines of `teacher`."
        },
    )
    ranking_server: str | None = field(
        default=None,
        metadata={
            "help": "For ranking, in place of ranking_teacher. The URL of a chat server (vLLM, SGLang) whose VLM or "
            "LLM is asked whether the two belong together. It must tell log-probs of its answers. Default: not set."
        },
    )
    ranking_server_model: str | None = field(
        default=None, metadata={"help": "For ranking_server. The model to ask, where the server offers several."}
    )
    ranking_question: str | None = field(
        default=None,
        metadata={
            "help": "For a ranking_server, or a ranking_teacher that answers in words. The question, with {text} for "
            "the caption, and {first} where both sides are texts. It must be answered with yes or no. Default: "
            "whether the text describes the picture, or whether the two texts belong together."
        },
    )
    ranking_negatives: PositiveInt = field(
        default=16,
        metadata={
            "help": "For ranking. Wrong answers per image and per text whose order is learnt: those that the student "
            "finds nearest. ranking_teacher is asked about these only."
        },
    )
    ranking_temperature: PositiveFloat = field(
        default=1.0,
        metadata={"help": "For ranking: pld. Divides the teacher's logits in the weights of the places. Default: 1."},
    )
    ranking_min: float | None = field(
        default=None,
        metadata={
            "help": "For ranking: cprd. The teacher's score from which the order of a wrong answer is worth learning: "
            "a probability of ranking_teacher or ranking_server, else a cosine of `teacher`. Default: a probability "
            "of 0.1; all cosines count. How this is decided is not published."
        },
    )
    ranking_batch_size: PositiveInt = field(
        default=32,
        metadata={"help": "Pairs that ranking_teacher reads, or ranking_server is sent, at a time. Default: 32."},
    )
    ranking_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder to keep the scores of ranking_teacher or ranking_server in, so that a pair is scored "
            "once in all runs. Default: in memory only."
        },
    )
    hard_negatives: str = field(
        default="none",
        metadata={
            "help": "teacher: losses on the wrong answers that the teacher finds nearest, with more weight for pairs "
            "on which the student errs. It follows Dynamic Contrastive Distillation, of which only the abstract is "
            "public: its formulas here are inferred. none (default): none.",
            "choices": ["none", "teacher"],
        },
    )
    hard_negatives_weight: NonNegativeFloat = field(
        default=1.0, metadata={"help": "Weight of hard_negatives, for which hard_negatives is set. Default: 1."}
    )
    hard_negatives_count: PositiveInt = field(
        default=8, metadata={"help": "For hard_negatives. Wrong answers that the teacher chooses per image and text."}
    )
    hard_contrast_weight: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "For hard_negatives. Weight of finding the teacher's feature of a pair among those of the wrong "
            "ones, beside the loss on the wrong answers, which has 1. Inferred, as its default 1."
        },
    )
    hard_kl_weight: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "For hard_negatives. Weight of the KL divergence from the teacher's distribution over the right "
            "and the wrong answers. Inferred, as its default 1."
        },
    )
    hard_temperature: PositiveFloat = field(
        default=0.07,
        metadata={"help": "For hard_contrast_weight. Divides the cosines of features of pairs. Inferred: 0.07."},
    )
    hard_exponent: float = field(
        default=1.0,
        metadata={
            "help": "For hard_negatives. A pair's weight is its loss to this power, over the mean. 0 weighs all "
            "equally, a negative number prefers easy pairs. Inferred, as its default 1."
        },
    )

    def check_ranking(self) -> None:
        """Raises UserError for settings that nothing reads, or that contradict each other."""
        for name in ("ranking_teacher", "ranking_server", "ranking_question", "ranking_cache", "ranking_min"):
            if self.ranking == "none" and getattr(self, name) is not None:
                raise UserError(
                    f"{name} is for `ranking`, which is none. Set ranking to cprd or pld, or remove {name}.",
                    because="meaning",
                )
        for name in ("ranking_question", "ranking_cache"):
            if not self.has_scorer and getattr(self, name) is not None:
                raise UserError(
                    f"{name} is for scores of a ranking_teacher or ranking_server, and there is none. Name one, or "
                    f"remove {name}.",
                    because="meaning",
                )
        if self.ranking_server is not None and self.ranking_teacher is not None:
            raise UserError(
                "ranking_teacher and ranking_server both say whose order is learnt. Remove one of the two.",
                because="meaning",
            )
        if self.ranking_server is None and self.ranking_server_model is not None:
            raise UserError("ranking_server_model is for a ranking_server, and there is none.", because="meaning")
        if self.ranking == "pld" and self.ranking_min is not None:
            raise UserError(
                "ranking_min is for ranking: cprd; pld weighs each place by its probability. Remove it.",
                because="meaning",
            )
        if self.ranking_question is not None and "{text}" not in self.ranking_question:
            raise UserError(f"ranking_question {self.ranking_question!r} has no {{text}}, where the caption goes.")

    def ranking_weights(self, teacher: bool) -> dict[str, float]:
        """Term -> its weight, of terms of the teacher's. Raises UserError for one that has nobody to learn from."""
        needed = {
            "ranking": self.ranking != "none" and not self.has_scorer,
            "hard_negatives": self.hard_negatives != "none",
        }
        for term, is_set in needed.items():
            if is_set and not teacher:
                also = ", a ranking_teacher or a ranking_server" if term == "ranking" else ""
                raise UserError(
                    f"{term} is set, and there is no teacher to learn from. Name a teacher{also}, or remove it.",
                    because="meaning",
                )
        return {term: getattr(self, f"{term}_weight") if is_set else 0.0 for term, is_set in needed.items()}

    @property
    def has_scorer(self) -> bool:
        """Whether the order is that of a model which reads both sides of a pair at once."""
        return self.ranking_teacher is not None or self.ranking_server is not None

    @property
    def scored_weight(self) -> float:
        """The weight of ranking by such a model; 0 without."""
        return self.ranking_weight if self.ranking != "none" and self.has_scorer else 0.0
