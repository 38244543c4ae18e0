"""The Hugging Face hub where there is no network: only the cache is looked at, without a minute of retries."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from functools import cache
from urllib.parse import urlsplit

ENDPOINT = "https://huggingface.co"
"""Where the hub is unless the environment variable HF_ENDPOINT says otherwise."""
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@cache
def unreachable() -> str | None:
    """The host of the hub when its name cannot be resolved, else None; asked once.

    None as well where the user has decided (HF_HUB_OFFLINE and its like are set), and behind a proxy, which resolves
    names itself.
    """
    if any(os.environ.get(name) for name in _OFFLINE):
        return None
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT)
    if parts.hostname is None or {parts.scheme, "all"} & set(urllib.request.getproxies()):
        return None
    try:
        socket.getaddrinfo(parts.hostname, None)
    except OSError:
        return parts.hostname
    return None


def prefer_cache() -> None:
    """Go offline when the hub cannot be reached; to be called before transformers or datasets is imported."""
    if unreachable() is None:
        return
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    # Whoever imported it earlier has it from the environment of that time.
    loaded = sys.modules.get("huggingface_hub.constants")
    if loaded is not None:
        loaded.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def words() -> str:
    """What a message about something that the hub did not give adds; empty when the hub was asked."""
    host = unreachable()
    return "" if host is None else f"; {host} cannot be resolved, so only the cache was looked at"
