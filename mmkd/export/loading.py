"""The runtime of an exported student."""

from mmkd.errors import UserError

from .exported import Exported
from .llama_runtime import GgufInTransformers, LlamaRuntime, has_llama_cpp
from .onnx_runtime import OnnxRuntime
from .runtimes import Runtime
from .transformers_runtime import TransformersRuntime


def runtime_of(exported: Exported, device: str = "cpu", context: int = 512) -> Runtime:
    """What reads an exported student, loaded: llama.cpp, ONNX Runtime or transformers. Raises UserError."""
    try:
        if exported.spec.format == "gguf":
            return LlamaRuntime(exported.path, context) if has_llama_cpp() else GgufInTransformers(exported.path)
        if exported.spec.format == "onnx":
            return OnnxRuntime(exported.path)
        return TransformersRuntime(str(exported.path), device)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{exported.path} cannot be loaded by its runtime: {error}") from error
