"""What models are worth after `mmkd trim-vocabulary`, on texts that were not counted.

    python -m scripts.trimmed_vocabularies lm MODEL FOLDER ...        # bits per byte
    python -m scripts.trimmed_vocabularies encoder MODEL FOLDER ...   # embeddings against those of MODEL

MODEL is the original, FOLDERs are what the command wrote. Texts are the held-out rows of python_docs.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mmkd.data.load_data import load_data

WINDOW = 512


def texts() -> list[str]:
    """The held-out rows of python_docs."""
    rows: Any = load_data("python_docs")["eval"]
    return [row["text"] for row in rows]


@torch.no_grad()
def bits_per_byte(name: str) -> float:
    """The cross-entropy of a language model, which may be compared between vocabularies."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    bits, count = 0.0, 0
    for text in texts():
        # After the end of a text, so that all of its tokens are predicted, in whatever vocabulary.
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        for start in range(0, ids.shape[1] - 1, WINDOW):
            part = ids[:, start : start + WINDOW + 1]
            log_probs = model(part[:, :-1]).logits.float().log_softmax(-1)
            bits -= float(log_probs.gather(-1, part[:, 1:, None]).sum()) / math.log(2)
        count += len(text.encode())
    return bits / count


@torch.no_grad()
def embeddings(name: str, sentences: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised embeddings, as of MiniLM."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, dtype="float32").eval()
    rows = []
    for sentence in sentences:
        given = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
        rows.append(model(**given).last_hidden_state.mean(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def main() -> None:
    """Prints a line per folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lm", "encoder"])
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    sentences = [line for text in texts() for line in text.split("\n\n") if len(line.split()) >= 5]
    first: torch.Tensor | None = None
    for name in options.models:
        line: dict[str, Any] = {"model": name}
        report = Path(name) / "trim_report.json"
        if report.is_file():
            line |= json.loads(report.read_text())
        if options.kind == "lm":
            line["bits_per_byte"] = bits_per_byte(name)
        else:
            rows = embeddings(name, sentences)
            first = rows if first is None else first
            own, original = (torch.tril(table @ table.T, -1).flatten() for table in (rows, first))
            chosen = torch.tril(torch.ones(len(rows), len(rows)), -1).flatten() > 0
            line |= {"sentences": len(sentences), "cosine": float((rows * first).sum(-1).mean())}
            result: Any = spearmanr(own[chosen], original[chosen])
            line["spearman"] = float(result.statistic)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
