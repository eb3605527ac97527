"""The HTTP client of huggingface_hub: httpx in its version 1; httpx2, which has the same names, in its version 2."""

from importlib import import_module

import huggingface_hub
from huggingface_hub import get_session
from packaging.version import Version


# Seconds without a byte after which a connection counts as lost. By default the Hub's client waits for ever.
SILENCE = 120.0

# Errors of the other package than the one huggingface_hub talks through would never be raised, nor caught
_client = import_module("httpx" if Version(huggingface_hub.__version__).major < 2 else "httpx2")
HTTPError: type[Exception] = _client.HTTPError
TransportError: type[Exception] = _client.TransportError


def bound_silence() -> None:
    """Let every request to the Hub fail after `SILENCE`."""
    get_session().timeout = _client.Timeout(SILENCE)
