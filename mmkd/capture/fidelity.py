"""How near a cache is to the teacher it was made of."""

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float

from mmkd.cache.codec import TokenScores
from mmkd.cache.manifest import differences
from mmkd.cache.side_files import read_head
from mmkd.cache.state_codec import StateCodec, StoredStates, TokenStates
from mmkd.cache.store import Cache
from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.models.heads import LMHead
from mmkd.recipe.recipe import Run
from mmkd.teachers.signals import DenseSignal

from .build_plan import ScorePlan, make_plan
from .sequences import TokenSequence, usable

# Of an identity: what has to be equal for the same questions to be asked.
_COMPARED = ("signal", "preparation", "data")
# Whole distributions at a time.
_CHUNK = 256


def measure_fidelity(run: Run, cache: Cache, rows: int) -> dict[str, float]:
    """KL(live || cache) in nats per token, on sequences spread over the data.

    Of a top-k it is over the tokens that the cache lists and the tail, of hidden states over the whole vocabulary.
    """
    if rows < 1:
        raise UserError(f"--rows is {rows}; give the number of sequences to ask the live teacher about, 1 or more.")
    plan = make_plan(run)
    if not isinstance(plan, ScorePlan) or not (isinstance(plan.codec, StateCodec) or _is_exact(plan)):
        raise UserError(
            "The distance to the live teacher is measured on hidden states or on the exact part of a top-k, which "
            "this cache has not.",
            because="not built",
        )
    ours, theirs = (
        {name: manifest.identity[name] for name in _COMPARED} for manifest in (plan.manifest, cache.manifest)
    )
    different = differences(ours, theirs)
    if different:
        raise UserError(f"{cache.folder} is not the cache of this recipe: {'; '.join(different)}.")
    sequences = plan.prepared.splits["train"]
    places = sorted({index * len(sequences) // rows for index in range(rows)})
    results = [result for place in places for _, result in usable(sequences, range(place, place + 1))]
    asked = [result for result in results if isinstance(result, TokenSequence)]
    head = None
    if isinstance(plan.codec, StateCodec):
        head = read_head(cache.folder, cache.manifest, Accelerator().device)
    divergences = []
    for sequence, live in zip(asked, plan.scorer.score(asked, lambda tokens: None), strict=True):
        row = cache.find(sequence.key)
        if row is None:
            continue
        if isinstance(live, TokenStates):
            assert head is not None
            divergences.append(divergence_of_states(live, cache.states(row), head))
        elif isinstance(live, TokenScores):
            divergences.append(divergence(live, cache.scores(row)))
    if not divergences:
        raise UserError(f"Of the {len(asked)} sampled sequences, none is in {cache.folder} and read by the teacher.")
    values = np.concatenate(divergences)
    return {
        "rows": len(divergences),
        "tokens": len(values),
        "kl_live_cache": float(values.mean()),
        "kl_live_cache_max": float(values.max()),
    }


def _is_exact(plan: ScorePlan) -> bool:
    """Whether a cache lists tokens with their own probabilities."""
    return plan.codec.kind == "top_k" and plan.score_format.k > 0


@torch.no_grad()
def divergence_of_states(live: TokenStates, cached: StoredStates, head: LMHead) -> Float[np.ndarray, "token"]:
    """KL(live || cached) per supervised token in nats, over all tokens that the head has."""
    signals = (
        DenseSignal(states.hidden[: len(live)].to(head.weight.device), head).chunks(_CHUNK)
        for states in (live, cached)
    )
    values = []
    for chunks in zip(*signals, strict=True):
        ours, theirs = (chunk.head.finish(chunk.logits.float()).log_softmax(-1) for chunk in chunks)
        values.append(forward_kl(theirs, ours).cpu().numpy())
    return np.concatenate(values)


def divergence(live: TokenScores, cached: TokenScores) -> np.ndarray:
    """KL(live || cached) per token in nats, over the tokens that the cache lists and one outcome for all others.

    What the cache lists and the live teacher does not has less than its k-th probability there, and counts as other.
    """
    values = []
    for place in range(len(cached)):
        _, ours, theirs = np.intersect1d(live.ids[place], cached.ids[place], return_indices=True)
        q = np.exp(cached.log_probs[place].astype(np.float64))
        p = np.zeros_like(q)
        p[theirs] = np.exp(live.log_probs[place][ours].astype(np.float64))
        p, q = (np.append(mass, max(1 - mass.sum(), 1e-12)) for mass in (p, q))
        positive = p > 0
        values.append(float((p[positive] * np.log(p[positive] / q[positive])).sum()))
    return np.array(values)
