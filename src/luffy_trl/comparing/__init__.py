"""Methods side by side: the same data, base and steps, each run a directory of its own, one table at the end."""


class ComparisonError(ValueError):
    """What the person who started a comparison can put right."""
