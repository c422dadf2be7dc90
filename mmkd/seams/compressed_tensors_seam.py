"""What mmkd uses of compressed-tensors, and of transformers with it, that neither documents."""

from typing import Any

import torch


def unpack_weights(model: Any, dtype: torch.dtype) -> None:
    """Unpacks the weights of a loaded model in compressed-tensors, in this type; any other model stays as it is.

    By itself this happens in the first forward pass, in which FP4 weights, that always come out in bfloat16, then meet
    states of another type. transformers refuses to change the type of a model that it loaded quantised.
    """
    if not hasattr(model, "ct_decompress_hook"):
        return
    model.hf_quantizer.compressor.decompress_model(model)
    torch.nn.Module.to(model, dtype=dtype)
