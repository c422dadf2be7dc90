"""The formats that students are exported to, and in which quantisations. Imports nothing that is heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmkd.errors import UserError


@dataclass(frozen=True)
class ExportFormat:
    """A format of exported students."""

    name: str
    quantizations: tuple[str, ...]
    """The first is the default."""
    title: str
    read_by: str
    """The runtimes that read it, for users."""
    calibrates: bool = False
    """Whether rows of training data decide what is written."""
    served: bool = True
    """Whether vLLM reads it."""


_GGUF = ("q4_k_m", "q8_0", "f16", "bf16", "f32", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_s", "q4_0")
_GGUF += ("q3_k_m", "q2_k", "iq4_nl", "iq4_xs")

FORMATS = {
    each.name: each
    for each in (
        ExportFormat("gguf", _GGUF, "GGUF", "llama.cpp, Ollama, LM Studio", served=False),
        ExportFormat(
            "compressed-tensors", ("int4", "int8", "fp8", "mxfp4"), "compressed-tensors", "vLLM, transformers"
        ),
        ExportFormat("nvfp4", ("nvfp4",), "NVFP4 in compressed-tensors", "vLLM, transformers", calibrates=True),
        ExportFormat("awq", ("int4",), "AWQ in compressed-tensors", "vLLM, transformers", calibrates=True),
        ExportFormat("gptq", ("int4", "int8"), "GPTQ in compressed-tensors", "vLLM, transformers", calibrates=True),
        ExportFormat("onnx", ("fp32", "int8", "int4"), "ONNX", "ONNX Runtime", served=False),
    )
}


@dataclass(frozen=True)
class ExportSpec:
    """A format with a quantisation."""

    format: str
    quantization: str

    @property
    def name(self) -> str:
        """The name of its folder in that of a run."""
        return self.format if self.format == self.quantization else f"{self.format}-{self.quantization}"

    @property
    def facts(self) -> ExportFormat:
        return FORMATS[self.format]


def spec_of(words: str, quantization: str | None = None) -> ExportSpec:
    """What `FORMAT` or `FORMAT:QUANTIZATION` names; `quantization` is for the first. Raises UserError."""
    name, _, own = words.replace("_", "-").lower().partition(":")
    own = own.replace("-", "_")
    if name not in FORMATS:
        raise UserError(f"There is no format {name!r}; choose some of {', '.join(FORMATS)}.")
    choices = FORMATS[name].quantizations
    chosen = (own or quantization or choices[0]).lower()
    if chosen not in choices:
        raise UserError(f"Format {name} has no quantisation {chosen!r}; choose one of {', '.join(choices)}.")
    return ExportSpec(name, chosen)


def specs_of(words: Sequence[str], quantizations: Sequence[str]) -> list[ExportSpec]:
    """All that are named, each format with each of the quantisations unless it names its own."""
    asked = [spec_of(word, own) for word in words for own in ([None] if ":" in word else quantizations or [None])]
    return list(dict.fromkeys(asked))
