"""What the benchmarks compare: TRL's trainer, and ours with the fields of its config that leave work out.

A configuration is a line here, and a choice of `--configurations` in every benchmark of the update phase.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """
    Attributes:
        options: fields of LuffyConfig; None: TRL's GRPOTrainer.
        budget: `tokens_per_micro_batch` as a part of the workload's; 0: it is not set.
        attention: on a GPU. On a CPU it is `sdpa`, the only one of these that it has, or `flex_attention`.
    """

    options: dict[str, Any] | None
    budget: float = 0.0
    attention: str = "flash_attention_2"


CONFIGURATIONS = {
    "TRL": Configuration(None),
    "trimmed": Configuration({"packed_forward": False}),
    "packed": Configuration({"packed_forward": True}),
    "budget": Configuration({"share_prompts": False}, budget=1.0),
    "shared prompts": Configuration({"share_prompts": True}, budget=1.0, attention="sdpa"),
    # In no more memory than TRL's micro-batches
    "shared prompts, smaller budget": Configuration({"share_prompts": True}, budget=0.75, attention="sdpa"),
    "shared prompts, flex": Configuration({"share_prompts": True}, budget=1.0, attention="flex_attention"),
}
