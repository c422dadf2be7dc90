"""New weights for a model that vLLM serves, handed over in a folder that both sides see."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mmkd.errors import UserError

from .endpoints import Endpoints, Refusal

# Seconds that a server may take to read the weights of a large model.
PATIENCE = 600.0


class ServedWeights:
    """Base URLs of vLLM servers, started with VLLM_SERVER_DEV_MODE=1, whose weights are replaced."""

    def __init__(self, base_urls: Sequence[str], api_key: str | None = None):
        self._endpoints = Endpoints(base_urls, api_key, len(base_urls), PATIENCE, retries=0)

    def load(self, folder: Path) -> None:
        """Has every server read the checkpoint of a folder and forget what it computed with other weights.

        Raises UserError when a server cannot do so.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        for url in self._endpoints.urls:
            self._post(url, "/collective_rpc", body)
            self._post(url, "/reset_prefix_cache", {})

    def _post(self, url: str, path: str, body: dict) -> None:
        try:
            self._endpoints.run(self._endpoints.request(path, msgspec.json.encode(body), url, retry=False))
        except (Refusal, ValueError) as error:
            raise UserError(
                f"{url} does not take new weights: {error} Start it with VLLM_SERVER_DEV_MODE=1 in its environment, "
                "on a machine that sees rollout_server_folder by the same path."
            ) from error
