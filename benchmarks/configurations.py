"""What the benchmarks compare: TRL's trainer, and ours with the fields of its config that leave work out.

A configuration is a line here, and a choice of `--configurations` in every benchmark of the update phase.
"""

from typing import Any


# None is TRL's GRPOTrainer
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "TRL": None,
    "trimmed": {"packed_forward": False},
    "packed": {"packed_forward": True},
}
