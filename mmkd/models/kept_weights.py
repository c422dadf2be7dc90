"""A second set of the weights that a training changes, which the same model can compute with for a while."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mmkd.errors import UserError

_SAMPLE = 16


class KeptWeights:
    """Copies of a model's trained weights; each rank has those of its own shards. No second model is in memory."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._kept: dict[str, Tensor] = {}

    @property
    def kept(self) -> bool:
        """Whether there are any."""
        return bool(self._kept)

    def keep(self, summed: bool = False) -> None:
        """Keeps the weights of now; in float32 where they are to be `summed` up and are in a shorter type."""
        self._kept = {
            name: weight.to(torch.promote_types(weight.dtype, torch.float32) if summed else weight.dtype, copy=True)
            for name, weight in self._local()
        }

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves them towards the weights of now: `decay * kept + (1 - decay) * weight`."""
        for name, weight in self._local():
            kept = self._kept[name]
            kept.lerp_(weight.to(kept.dtype), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_use(self) -> Iterator[None]:
        """In it the model computes with the kept weights; with its own where none are kept."""
        own: list[tuple[Tensor, Tensor]] = []
        try:
            for name, parameter in self._trained() if self.kept else ():
                if isinstance(parameter, DTensor):
                    # FSDP2 gathers from this very memory.
                    shard = parameter.to_local()
                    own.append((parameter, shard.clone()))
                    shard.copy_(self._kept[name])
                else:
                    own.append((parameter, parameter.data))
                    parameter.data = self._kept[name].to(parameter.dtype)
            yield
        finally:
            for parameter, weight in own:
                if isinstance(parameter, DTensor):
                    parameter.to_local().copy_(weight)
                else:
                    parameter.data = weight

    def save(self, path: Path, writes: bool) -> None:
        """Writes them whole to a file, on the rank that `writes`; all ranks must call it together."""
        whole: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            kept = self._kept[name]
            if isinstance(parameter, DTensor):
                placed = (parameter.device_mesh, parameter.placements)
                kept = DTensor.from_local(kept, *placed, shape=parameter.shape, stride=parameter.stride())
                kept = kept.full_tensor()
            if writes:
                whole[name] = kept.to("cpu").contiguous()
        if writes:
            # A checkpoint counts once its state stands beside this.
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(whole, path, metadata={"format": "pt"})

    def load(self, path: Path) -> None:
        """Takes them from a file that `save` wrote. Raises UserError where that is of other weights."""
        with safe_open(path, framework="pt") as file:
            trained = dict(self._trained())
            if set(file.keys()) != set(trained):
                raise UserError(
                    f"{path} holds the averaged weights of another student: "
                    f"{sorted(set(file.keys()) ^ set(trained))[0]} is on one side only. Resume the run with the keys "
                    "that it was started with."
                )
            self._kept = {name: _as_placed(file.get_tensor(name), parameter) for name, parameter in trained.items()}

    def sample(self) -> str:
        """The sha256 of some of the trained weights of now, by which others of the same names are told from them."""
        digest = hashlib.sha256()
        for name, parameter in self._trained():
            flat = parameter.detach().reshape(-1)
            places = torch.arange(min(_SAMPLE, len(flat)), device=flat.device) * (len(flat) // _SAMPLE or 1)
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(flat[places].to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()

    def _trained(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                # As FSDP2 names layers whose activations it checkpoints.
                yield name.replace("_checkpoint_wrapped_module.", ""), parameter

    def _local(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            weight = parameter.detach()
            yield name, weight.to_local() if isinstance(weight, DTensor) else weight


def _as_placed(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    mesh = parameter.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements).to_local()
