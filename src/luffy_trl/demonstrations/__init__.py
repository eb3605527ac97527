"""Demonstrations: where they come from, their token ids, and their places in the groups."""

from .encoding import Demonstration
from .sources import DemonstrationSource


__all__ = ["Demonstration", "DemonstrationSource"]
