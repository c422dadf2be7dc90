"""How near a cache is to the teacher it was made of."""

import numpy as np

from mmkd.cache.codec import TokenScores
from mmkd.cache.manifest import differences
from mmkd.cache.store import Cache
from mmkd.errors import UserError
from mmkd.recipe.recipe import Run

from .build_plan import ScorePlan, make_plan
from .sequences import TokenSequence, UnusableRow, usable

# Of an identity: what has to be equal for the same questions to be asked.
_COMPARED = ("signal", "preparation", "data")


def measure_fidelity(run: Run, cache: Cache, rows: int) -> dict[str, float]:
    """KL(live || cache) over the cached top-k and the tail, in nats per token, on sequences spread over the data."""
    if rows < 1:
        raise UserError(f"--rows is {rows}; give the number of sequences to ask the live teacher about, 1 or more.")
    plan = make_plan(run)
    if not isinstance(plan, ScorePlan) or plan.codec.kind != "top_k" or not plan.codec.k:
        raise UserError(
            "The distance to the live teacher is measured on the exact part of a top-k, which this cache has not.",
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
    divergences = []
    for sequence, live in zip(asked, plan.scorer.score(asked, lambda tokens: None), strict=True):
        row = cache.find(sequence.key)
        if row is not None and not isinstance(live, UnusableRow):
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
