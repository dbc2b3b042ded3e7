"""Pretrained weights on timm's hub: where they lie on this machine, and whether the hub can be asked for them at all.

The hub's client tries for a minute where there is no network. So weights that this machine has are read without asking
anybody, and where it has not, a connection is tried first.
"""

import os
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import timm
from huggingface_hub import constants

WEIGHTS_FILE = "model.safetensors"  # of timm's repositories
PLAIN_FORM = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}  # which timm looks for first
SECONDS_TO_CONNECT = 2.0


@dataclass(frozen=True)
class HubFile:
    """The file with a network's pretrained weights.

    Attributes:
        repository: on the hub, e.g. timm/resnet50.a1_in1k; None where timm names only an address.
        name: of the file.
        url: where it is.
        revision: of the repository; None for the newest.
        is_foreign: whether timm converts it from another library's format.
    """

    repository: str | None
    name: str
    url: str
    revision: str | None = None
    is_foreign: bool = False

    def cached(self) -> Path | None:
        """The file in the local cache of the hub (HF_HUB_CACHE) or of torch (TORCH_HOME); None where it is not."""
        if self.repository is None:
            path = Path(_torch_cache(), self.name)
            return path if path.is_file() else None
        found = huggingface_hub.try_to_load_from_cache(self.repository, self.name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def __str__(self) -> str:
        where = f"file {self.name} of hub repository {self.repository}" if self.repository else self.name
        return f"{where} ({self.url})"


def hub_file(network: str) -> HubFile | None:
    """The file that timm takes a network's weights from; None where it has none.

    Args:
        network: as timm knows it.
    """
    try:
        settings = timm.get_pretrained_cfg(network, allow_unregistered=True)
    except RuntimeError:  # the network exists, but not with these weights
        return None
    if settings is None or not settings.has_weights:
        return None
    if settings.hf_hub_id is None:
        address = settings.url if isinstance(settings.url, str) else (settings.url or ("",))[0]
        return HubFile(None, Path(urlsplit(address).path).name, address, is_foreign=bool(settings.custom_load))
    repository, _, revision = settings.hf_hub_id.partition("@")
    name = settings.hf_hub_filename or WEIGHTS_FILE
    name = PLAIN_FORM.get(name, name)
    url = f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{name}"
    return HubFile(repository, name, url, revision or None, bool(settings.custom_load))


def reason_not_to_ask(file: HubFile) -> str | None:
    """Why a file cannot be fetched, found out in at most two seconds; None where its server can be reached.

    A server that can be reached may still refuse: only the client tells that.
    """
    if file.repository is not None and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    address = urlsplit(file.url)
    proxies = {} if urllib.request.proxy_bypass(address.hostname or "") else urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    server = address if not proxy else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = server.hostname or "", server.port or (80 if server.scheme == "http" else 443)
    return None if _accepts_connections(host, port) else f"{host} cannot be reached"


def _accepts_connections(host: str, port: int) -> bool:
    """Whether a server accepts a connection within two seconds; finding its address can take longer by itself."""
    accepted = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS_TO_CONNECT).close()
        except OSError:
            return
        accepted.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    return accepted.is_set()


def _torch_cache() -> str:
    """torch.hub's own folder of downloaded weights."""
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
    return os.path.join(os.path.expanduser(home), "hub", "checkpoints")
