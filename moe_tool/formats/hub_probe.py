"""Quick probe of the Hugging Face hub, whose libraries retry for up to 47 s."""

import os
import queue
import socket
import threading
import urllib.request
from urllib.parse import urlsplit

_DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE_WORDS = frozenset({"1", "ON", "YES", "TRUE"})
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_DEFAULT_PORTS = {"https": 443, "http": 80}


def hub_is_reachable(timeout_s: float = 1.0) -> bool:
    """Return whether a TCP connection to the hub (HF_ENDPOINT, through the proxy if one is set)
    opens within `timeout_s`.

    Returns False at once if HF_HUB_OFFLINE or its siblings forbid the network. A name lookup cannot
    be interrupted, so the attempt runs on a daemon thread, which is abandoned on timeout.
    """
    if hub_is_forbidden():
        return False
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    endpoint = hub_endpoint()
    threading.Thread(
        target=lambda: answers.put(_connects(endpoint, timeout_s)), name="hub-probe", daemon=True
    ).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return False


def hub_is_forbidden() -> bool:
    """Return whether the environment forbids the network to the Hugging Face libraries."""
    return any(os.environ.get(name, "").upper() in _TRUE_WORDS for name in _OFFLINE_VARIABLES)


def hub_endpoint() -> str:
    """Return the address of the hub or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT


def _connects(endpoint: str, timeout_s: float) -> bool:
    try:
        address = urlsplit(endpoint)
        host, port = address.hostname or "", address.port or _DEFAULT_PORTS.get(address.scheme, 443)
        proxy = urllib.request.getproxies().get(address.scheme)
        if proxy is None or urllib.request.proxy_bypass(host):
            with socket.create_connection((host, port), timeout=timeout_s):
                return True
        gate = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        with socket.create_connection(
            (gate.hostname or "", gate.port or 3128), timeout=timeout_s
        ) as connection:
            if gate.scheme != "http":  # a SOCKS or TLS proxy has another handshake
                return True
            connection.sendall(
                f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
            )
            status = connection.recv(64).split(maxsplit=2)[1:2]
            return status == [b"200"] or status == [
                b"407"
            ]  # 407: the proxy wants the password, which the libraries send
    except (OSError, ValueError):
        return False
