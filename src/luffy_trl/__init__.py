"""LUFFY (Learning to Reason under Off-Policy Guidance, arXiv 2504.14945) on TRL."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet


__version__ = "0.1.0"
__all__ = ["LuffyConfig", "LuffyTrainer", "__version__"]

# The trainer overrides methods that TRL may change in any minor release
SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

if version("trl") not in SUPPORTED_TRL:
    raise ImportError(
        f"luffy_trl {__version__} works with trl {SUPPORTED_TRL}, but trl {version('trl')} is installed: "
        f"pip install 'trl{SUPPORTED_TRL}'."
    )

if TYPE_CHECKING:
    from .config import LuffyConfig
    from .trainer import LuffyTrainer


def __getattr__(name: str) -> Any:
    """Import TRL only when the trainer is asked for: the pure-torch modules and `--help` do not need it."""
    if name == "LuffyConfig":
        from .config import LuffyConfig

        return LuffyConfig
    if name == "LuffyTrainer":
        from .trainer import LuffyTrainer

        return LuffyTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
