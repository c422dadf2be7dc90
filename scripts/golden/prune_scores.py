"""Records tests/golden/PRUNE_scores.npz: importance scores of a tiny Llama in plain numpy, float64.

    python -m scripts.golden.prune_scores

The model, its scores and the gradients (central differences of the loss, weight by weight) are written out here with
numpy alone. Formulas: Minitron (2407.14679) as in NVIDIA's Model Optimizer, modelopt/torch/nas/plugins/megatron.py,
commit 050e1a59: mean of |activation| over a row's tokens, L2 over rows; of heads the L2 over their channels; of the
hidden state the sum over the layers' norms. Block influence: ShortGPT (2403.03853).
"""

from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, FFN, HEADS, GROUPS, WIDTH, VOCAB = 2, 8, 6, 4, 2, 4, 11
EPSILON, THETA = 1e-6, 10000.0
Weights = dict[str, np.ndarray]


def weights() -> Weights:
    """Random weights by their names in transformers, the head tied to the embeddings."""
    generator = np.random.default_rng(0)
    made: Weights = {"model.embed_tokens.weight": generator.normal(0, 0.5, (VOCAB, HIDDEN))}
    shapes = {
        "self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
        "self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
        "self_attn.v_proj": (GROUPS * WIDTH, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            made[f"model.layers.{layer}.{name}.weight"] = generator.normal(0, 0.5, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{name}.weight"] = generator.normal(1, 0.2, HIDDEN)
    made["model.norm.weight"] = generator.normal(1, 0.2, HIDDEN)
    return made


def norm(states: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm."""
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + EPSILON) * weight


def rotated(states: np.ndarray) -> np.ndarray:
    """Rotary positions, of [head, token, channel]."""
    tokens = states.shape[1]
    frequencies = THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)
    angles = np.concatenate([np.arange(tokens)[:, None] * frequencies] * 2, axis=-1)
    half = np.concatenate([-states[..., WIDTH // 2 :], states[..., : WIDTH // 2]], axis=-1)
    return states * np.cos(angles) + half * np.sin(angles)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def forward(made: Weights, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of one row without padding, and what modules read or write."""
    seen: dict[str, np.ndarray] = {}
    hidden = made["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        own = {name.split(f"layers.{layer}.")[1]: value for name, value in made.items() if f"layers.{layer}." in name}
        seen[f"in {layer}"] = hidden
        read = seen[f"norm {layer} 0"] = norm(hidden, own["input_layernorm.weight"])
        query, key, value = (
            (read @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, WIDTH).transpose(1, 0, 2)
            for name in "qkv"
        )
        key, value = (np.repeat(each, HEADS // GROUPS, axis=0) for each in (rotated(key), value))
        scores = rotated(query) @ key.transpose(0, 2, 1) / np.sqrt(WIDTH)
        scores = np.where(np.tril(np.ones((len(ids), len(ids)))) > 0, scores, -np.inf)
        heads = seen[f"heads {layer}"] = (softmax(scores) @ value).transpose(1, 0, 2).reshape(len(ids), -1)
        hidden = hidden + heads @ own["self_attn.o_proj.weight"].T
        read = seen[f"norm {layer} 1"] = norm(hidden, own["post_attention_layernorm.weight"])
        gate = read @ own["mlp.gate_proj.weight"].T
        neurons = seen[f"ffn {layer}"] = gate / (1 + np.exp(-gate)) * (read @ own["mlp.up_proj.weight"].T)
        hidden = hidden + neurons @ own["mlp.down_proj.weight"].T
        seen[f"out {layer}"] = hidden
    return norm(hidden, made["model.norm.weight"]) @ made["model.embed_tokens.weight"].T, seen


def loss(made: Weights, rows: list[np.ndarray]) -> float:
    """Nats per predicted token of all rows together."""
    total, tokens = 0.0, 0
    for ids in rows:
        logits, _ = forward(made, ids)
        total -= np.log(softmax(logits[:-1]))[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens += len(ids) - 1
    return total / tokens


def products(made: Weights, rows: list[np.ndarray]) -> Weights:
    """|weight * gradient| of every weight."""
    step, found = 1e-5, {}
    for name, values in made.items():
        found[name] = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            before = values[place]
            values[place] = before + step
            above = loss(made, rows)
            values[place] = before - step
            below = loss(made, rows)
            values[place] = before
            found[name][place] = abs(before * (above - below) / (2 * step))
    return found


def activation_scores(made: Weights, rows: list[np.ndarray]) -> Weights:
    """Of neurons, heads and channels, and block influence."""
    seen = [forward(made, ids)[1] for ids in rows]

    def score(name: str) -> np.ndarray:
        return np.sqrt(sum(np.abs(own[name]).mean(0) ** 2 for own in seen))

    scores: Weights = {}
    for layer in range(LAYERS):
        scores[f"ffn {layer}"] = score(f"ffn {layer}")
        scores[f"queries {layer}"] = np.sqrt((score(f"heads {layer}").reshape(HEADS, WIDTH) ** 2).sum(1))
    scores["hidden"] = sum((score(f"norm {i} {j}") for i in range(LAYERS) for j in range(2)), np.zeros(HIDDEN))
    influence = []
    for layer in range(LAYERS):
        before, after = (np.concatenate([own[f"{end} {layer}"] for own in seen]) for end in ("in", "out"))
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        influence.append((1 - (before * after).sum(1) / lengths).mean())
    scores["influence"] = np.array(influence)
    return scores


def gradient_scores(made: Weights, rows: list[np.ndarray]) -> Weights:
    """Of neurons, heads and channels: sums over their weights, of key/value heads in equal parts for their queries."""
    taylor, scores = products(made, rows), dict[str, np.ndarray]()
    hidden = np.zeros(HIDDEN)
    for layer in range(LAYERS):
        own: dict[str, Any] = {
            name.split(f"layers.{layer}.")[1].removesuffix(".weight"): value
            for name, value in taylor.items()
            if f"layers.{layer}." in name
        }
        gate, up, down = (own[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        scores[f"gradient ffn {layer}"] = gate.sum(1) + up.sum(1) + down.sum(0)
        query, key, value = (own[f"self_attn.{name}_proj"].sum(1).reshape(-1, WIDTH).sum(1) for name in "qkv")
        output = own["self_attn.o_proj"].sum(0).reshape(HEADS, WIDTH).sum(1)
        shared = np.repeat((key + value) / (HEADS // GROUPS), HEADS // GROUPS)
        scores[f"gradient queries {layer}"] = query + output + shared
        for name, each in own.items():
            rows_of_hidden = name.endswith(("o_proj", "down_proj", "layernorm"))
            hidden += each.sum(1) if rows_of_hidden and each.ndim == 2 else each if each.ndim == 1 else each.sum(0)
    hidden += taylor["model.norm.weight"] + taylor["model.embed_tokens.weight"].sum(0)
    scores["gradient hidden"] = hidden
    return scores


def main() -> None:
    """Writes the file."""
    made, generator = weights(), np.random.default_rng(1)
    rows = [generator.integers(0, VOCAB, length) for length in (7, 5, 6)]
    numbers = {f"weight {name}": value for name, value in made.items()}
    numbers |= {f"row {number}": ids for number, ids in enumerate(rows)}
    numbers |= activation_scores(made, rows) | gradient_scores(made, rows) | {"loss": np.array(loss(made, rows))}
    target = Path(__file__).parents[2] / "tests" / "golden" / "PRUNE_scores.npz"
    np.savez_compressed(target, **numbers)  # pyright: ignore[reportArgumentType]
    print(f"{target}: {len(numbers)} arrays")


if __name__ == "__main__":
    main()
