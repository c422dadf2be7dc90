"""Runs llm-compressor on a student, by whichever Python has it: it imports nothing of mmkd.

    python llm_compressor_worker.py STUDENT OUTPUT ROWS.json SETTINGS.json

ROWS is a list of lists of token ids. SETTINGS has `modifier` (awq, gptq), `bits`, `group` (weights that share a scale,
or null) and `ignore` (names of layers).
"""

import json
import sys


def main() -> None:
    """Writes the quantised student."""
    student, output, rows_path, settings_path = sys.argv[1:]
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    with open(rows_path, encoding="utf-8") as file:
        rows = json.load(file)
    with open(settings_path, encoding="utf-8") as file:
        settings = json.load(file)
    if not torch.accelerator.is_available():
        without_pinning()
    vision = hasattr(AutoConfig.from_pretrained(student), "vision_config")
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = kind.from_pretrained(student, dtype="auto", use_safetensors=True)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(student),
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]),
        recipe=modifiers_of(settings),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        output_dir=output,
    )


def modifiers_of(settings: dict) -> list:
    """What llm-compressor does, in its own words."""
    from llmcompressor.modifiers import quantization  # pyright: ignore[reportMissingImports]

    weights = {"num_bits": settings["bits"], "type": "int", "symmetric": True, "strategy": "channel"}
    if settings["group"]:
        weights |= {"strategy": "group", "group_size": settings["group"]}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": settings["ignore"]}
    if settings["modifier"] == "gptq":
        return [quantization.GPTQModifier(**groups)]
    try:
        from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
    except ImportError:
        # Before 0.12 the modifier of AWQ quantised too.
        from llmcompressor.modifiers.awq import AWQModifier  # pyright: ignore[reportMissingImports]

        return [AWQModifier(**groups)]
    return [AWQModifier(), quantization.QuantizationModifier(**groups)]


def without_pinning() -> None:
    """AWQ pins activations in memory for a GPU, also where there is none, which then fails."""
    from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]

    IntermediatesCache.pin_memory = lambda self, *arguments, **options: None


if __name__ == "__main__":
    main()
