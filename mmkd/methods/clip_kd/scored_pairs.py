"""What a ranking_teacher, which reads both sides of a pair at once, says of the wrong answers in a batch."""

import copy
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.cache.embedding_codec import text_key
from mmkd.cache.pair_scores import PairScores
from mmkd.cache.sequence_keys import KEY_BYTES, image_hash
from mmkd.losses.hard_negatives import hardest
from mmkd.preparation.pair_batches import PairRows
from mmkd.teachers.chat_api import ChatClient
from mmkd.teachers.pair_scorers import PairScorer, load_pair_scorer
from mmkd.teachers.served_scorer import ServedScorer
from mmkd.training.gathering import ranks

from .pair_terms import PairFacts, StudentSays
from .ranking_config import RankingConfig
from .ranking_terms import Scored

logger = logging.getLogger(__name__)


class ScoredPairs:
    """Scores of pairs of the training data, asked for as they are needed and kept."""

    def __init__(self, scorer: PairScorer, rows: PairRows, settings: RankingConfig, rank: int = 0):
        self.scorer, self.rows, self.settings = scorer, rows, settings
        folder = settings.ranking_cache
        self.scores = PairScores(folder, None if folder is None else scorer.identity, rank)
        self.shows_pictures = rows.has_images and scorer.reads_images
        self._first_keys: dict[int, bytes] = {}
        self.divides = False
        """Whether all ranks ask about the same pairs."""
        self.asked = 0
        """Pairs that the scorer has read."""

    @classmethod
    def of(cls, scorer: PairScorer | None, rows: PairRows, settings: Any) -> "ScoredPairs | None":
        """Those of a scorer, or of what settings name; None where there is neither."""
        if not settings.scored_weight:
            return None
        scorer = scorer or _scorer_of(settings)
        if rows.has_images and not scorer.reads_images:
            logger.warning(
                "ranking_teacher %s reads texts: the caption of a picture stands for the picture.", scorer.name
            )
        return cls(scorer, rows, settings, settings.process_index)

    def held_out(self, rows: PairRows) -> "ScoredPairs":
        """Those of other rows, of which every rank compares all; scores are kept with those of training."""
        other = copy.copy(self)
        other.rows, other._first_keys, other.divides = rows, {}, True
        return other

    def term(
        self, student: StudentSays, facts: PairFacts, numbers: Int[Tensor, "all"], rows: Int[Tensor, "all"]
    ) -> Float[Tensor, "pair"]:
        """The ranking loss of each pair of this rank; numbers of captions and rows are those of all ranks."""
        same = facts.numbers[:, None] == numbers
        captions = [
            self.rows.caption_of(row, number) for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)
        ]
        losses = []
        for of_images, cosines in ((True, student.view.cosines.images), (False, student.view.cosines.texts)):
            chosen = hardest(cosines.detach(), same, self.settings.ranking_negatives)
            columns = torch.cat([student.view.cosines.own[:, None], chosen.items], -1).tolist()
            present = torch.cat([torch.ones_like(chosen.present[:, :1]), chosen.present], -1)
            logits = self._logits(facts, rows.tolist(), captions, columns, present, of_images).to(cosines.device)
            least = self.settings.scored_least if self.settings.ranking_min is None else self.settings.ranking_min
            valid = logits[:, 1:].sigmoid() >= least
            losses.append(Scored(chosen, logits[:, 0]).loss(student, cosines, logits[:, 1:], valid, self.settings))
        return torch.stack(losses).mean(0)

    def _logits(
        self,
        facts: PairFacts,
        rows: Sequence[int],
        captions: Sequence[str],
        columns: Sequence[Sequence[int]],
        present: Bool[Tensor, "pair candidate"],
        of_images: bool,
    ) -> Float[Tensor, "pair candidate"]:
        """The scorer's logits of every pair with each of its candidates; -inf where it has none."""
        own = list(zip(facts.rows.tolist(), facts.captions, strict=True))
        wanted: list[list[tuple[int, str, str]]] = []
        for (row, caption), places, shown in zip(own, columns, present.tolist(), strict=True):
            others = [
                (rows[place], captions[place]) for place, is_there in zip(places, shown, strict=True) if is_there
            ]
            wanted.append([(row, caption, text) if of_images else (place, text, caption) for place, text in others])
        keys = [[self._key(*pair) for pair in pairs] for pairs in wanted]
        self._ask(
            {key: pair for own, pairs in zip(keys, wanted, strict=True) for key, pair in zip(own, pairs, strict=True)}
        )
        logits = torch.full(present.shape, -torch.inf)
        for number, own_keys in enumerate(keys):
            logits[number, present[number].cpu()] = torch.tensor([self.scores[key] for key in own_keys])
        return logits

    def _ask(self, wanted: dict[bytes, tuple[int, str, str]]) -> None:
        """Scores the pairs that are not known: a row, the caption in the place of its picture, and a text."""
        if self.divides and ranks() > 1:
            # What a rank knows already differs, and all must come to the exchange.
            own = dict(list(wanted.items())[dist.get_rank() :: ranks()])
            self._ask_here(own)
            told: list[Any] = [None] * ranks()
            dist.all_gather_object(told, {key: self.scores[key] for key in own})
            for scores in told:
                self.scores.known |= scores
        self._ask_here(wanted)

    def _ask_here(self, wanted: dict[bytes, tuple[int, str, str]]) -> None:
        missing = {key: pair for key, pair in wanted.items() if key not in self.scores}
        if not missing:
            return
        keys, size = list(missing), self.scorer.batch_size
        for first in range(0, len(keys), size):
            # Each part is kept before the next is asked for, in which a server may fail.
            some = keys[first : first + size]
            pairs = [(self._first(row, caption), text) for row, caption, text in (missing[key] for key in some)]
            self.asked += len(pairs)
            self.scores.add(dict(zip(some, self.scorer.score(pairs).tolist(), strict=True)))

    def _first(self, row: int, caption: str) -> Any:
        if self.rows.has_images and not self.shows_pictures:
            return caption
        return self.rows.split[row][0]

    def _key(self, row: int, caption: str, text: str) -> bytes:
        if self.rows.has_images and not self.shows_pictures:
            first = text_key(caption)
        else:
            first = self._first_keys.get(row) or self._first_keys.setdefault(row, _side_key(self._first(row, caption)))
        return hashlib.blake2b(first + text_key(text), digest_size=KEY_BYTES).digest()


def _scorer_of(settings: Any) -> PairScorer:
    question, batch_size = settings.ranking_question, settings.ranking_batch_size
    if settings.ranking_server is not None:
        client = ChatClient([settings.ranking_server], settings.ranking_server_model, model_key="ranking_server_model")
        return ServedScorer(client, question, batch_size)
    return load_pair_scorer(
        settings.ranking_teacher,
        question=question,
        batch_size=batch_size,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )


def _side_key(side: Any) -> bytes:
    return text_key(side) if isinstance(side, str) else bytes.fromhex(image_hash(side))
