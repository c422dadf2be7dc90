"""New weights for a model that vLLM serves, handed over in a folder that both sides see."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mmkd.errors import UserError

from .endpoints import Endpoints, Refusal

# Seconds that a server may take to read the weights of a large model.
PATIENCE = 600.0

_PATH = "on a machine that sees rollout_server_folder by the same path"
RELOADING = f"Start it with VLLM_SERVER_DEV_MODE=1 in its environment, {_PATH}."
ADAPTERS = (
    "Start it with --enable-lora, a --max-lora-rank of at least the adapter's, and "
    f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, {_PATH}. vLLM takes no DoRA, no modules_to_save and "
    "no biases: train without them, or generate in this process (remove rollout_server)."
)


class ServedWeights:
    """Base URLs of vLLM servers whose weights are replaced, or which take adapters beside their own weights."""

    def __init__(self, base_urls: Sequence[str], api_key: str | None = None):
        self._endpoints = Endpoints(
            base_urls,
            api_key,
            len(base_urls),
            PATIENCE,
            retries=0,
            server="The server of rollouts",
            advice="See that it runs and read its log.",
        )

    def load(self, folder: Path, images: bool = False) -> None:
        """Has every server read the checkpoint of a folder and forget what it computed with other weights.

        With `images` that is also what it made of images. Raises UserError when a server cannot do so.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        for url in self._endpoints.urls:
            self._post(url, "/collective_rpc", body, RELOADING)
            self._post(url, "/reset_prefix_cache", {}, RELOADING)
            if images:
                self._post(url, "/reset_encoder_cache", {}, RELOADING)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Has every server read the adapter of a folder under a new name. Raises UserError when one cannot do so."""
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        for url in self._endpoints.urls:
            self._post(url, "/v1/load_lora_adapter", body, ADAPTERS)

    def unload_adapter(self, name: str) -> None:
        """Has every server forget an adapter. Raises UserError when one cannot do so."""
        for url in self._endpoints.urls:
            self._post(url, "/v1/unload_lora_adapter", {"lora_name": name}, ADAPTERS)

    def _post(self, url: str, path: str, body: dict, advice: str) -> None:
        try:
            self._endpoints.run(self._endpoints.request(path, msgspec.json.encode(body), url, retry=False))
        except (Refusal, ValueError) as error:
            raise UserError(f"{url} does not take new weights: {error} {advice}") from error
