"""Trainers that are fed recorded completions instead of sampling, demonstrations included: the same groups for all.

TRL's GRPOTrainer by a minimal subclass that only injects them, LuffyTrainer by the same subclass under it. What is
left of a step is everything after sampling: scoring, advantages, forward and backward passes, optimizer.

Completion lengths follow the paper's: rollouts with a mean of 2,832 tokens, demonstrations with a mean of 4,500, none
above 8,192. Or prompts are long, 4,096 tokens, and completions of about 1,000, or all completions are of one length. A
workload can divide all lengths, so that they take a CPU seconds.
"""

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from configurations import CONFIGURATIONS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer


SPREAD = 0.6  # of the logarithm of a length
LONGEST, LONGEST_PROMPT = 8192, 1024
# Means of prompts, rollouts and demonstrations. "equal": all completions of half the longest
MEANS = {"paper": (160, 2832, 4500), "equal": (160, 4096, 4096), "long_prompt": (4096, 1000, 1000)}
VOCABULARY = 1000
BUDGET = (
    43_200  # tokens beside 4 rows a micro-batch: the paper's lengths, 16 prompts of 8, then take ten micro-batches
)


@dataclass(frozen=True)
class Workload:
    """What one optimizer step is given.

    Attributes:
        prompts: groups.
        group_size: rows of a group.
        demonstrations: of them.
        micro_batch: rows, for a trainer that goes by rows.
        lengths: key of `MEANS`.
        divide: of all lengths.
    """

    prompts: int = 16
    group_size: int = 8
    demonstrations: int = 1
    micro_batch: int = 4
    lengths: str = "paper"
    divide: int = 16
    seed: int = 0

    @property
    def longest(self) -> int:
        return LONGEST // self.divide

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch, for a trainer that goes by them."""
        return BUDGET * self.micro_batch // 4 // self.divide

    def groups(self) -> list[dict[str, Any]]:
        """Prompts with their rollouts and demonstrations, as token ids. EOS is 0; rewards are in the first token."""
        rng, rng_of_more = random.Random(self.seed), random.Random(self.seed + 1)
        prompt_mean, rollout_mean, demonstration_mean = MEANS[self.lengths]

        def prompt(i: int) -> list[int]:
            if self.lengths == "long_prompt":
                n = prompt_mean // self.divide - 1
            else:
                n = length(rng, prompt_mean / self.divide, LONGEST_PROMPT // self.divide) + 3
            return [2 + i] + [rng.randrange(2, VOCABULARY) for _ in range(n)]

        def completion(mean: float, rng: random.Random = rng) -> list[int]:
            is_equal = self.lengths == "equal"
            n = mean // self.divide if is_equal else length(rng, mean / self.divide, self.longest)
            return [rng.randrange(2, VOCABULARY) for _ in range(n - 1)] + [0]

        return [
            {
                "prompt": prompt(i),
                "rollouts": [completion(rollout_mean) for _ in range(self.group_size - self.demonstrations)],
                "demonstrations": [completion(demonstration_mean) for _ in range(self.demonstrations)],
                # of the rollouts that TRL samples where LUFFY has demonstrations
                "more_lengths": [len(completion(rollout_mean, rng_of_more)) for _ in range(self.demonstrations)],
            }
            for i in range(self.prompts)
        ]


def length(rng: random.Random, mean: float, longest: int) -> int:
    """A log-normal length whose mean, but for the cut at `longest`, is `mean`."""
    return max(2, min(longest, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))


def reward(completion_ids, **kwargs) -> list[float]:
    """Of no meaning, but with advantages of every sign."""
    return [float(ids[0] % 2) for ids in completion_ids]


# The trainers


class Replay(GRPOTrainer):
    """GRPOTrainer that is given its completions: `recorded` maps a prompt to them, in order.

    With `sampled_lengths`, as many tokens are sampled for real before that.
    """

    recorded: dict[tuple[int, ...], list[list[int]]]
    sampled_lengths: dict[tuple[int, ...], list[int]] | None = None
    sampling_seconds = 0.0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        nth: dict[tuple[int, ...], int] = defaultdict(int)
        rows = []
        for ids in map(tuple, prompt_ids):
            rows.append((ids, nth[ids]))
            nth[ids] += 1
        if self.sampled_lengths is not None:
            synchronize(self)
            start = time.perf_counter()
            lengths = [self.sampled_lengths[ids][k] for ids, k in rows]
            end_at = EndAt(torch.tensor(lengths), longest_prompt=max(map(len, prompt_ids)))
            self.model.generate = partial(type(self.model).generate, self.model, logits_processor=[end_at])
            super()._generate_single_turn(prompt_ids, *args, **kwargs)
            synchronize(self)
            self.sampling_seconds += time.perf_counter() - start
        return [self.recorded[ids][k] for ids, k in rows], None


class EndAt(LogitsProcessor):
    """EOS exactly as the last of each row's `lengths` (B,) tokens."""

    def __init__(self, lengths: torch.Tensor, longest_prompt: int):
        self.lengths, self.longest_prompt = lengths, longest_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = (self.lengths.to(scores.device) <= input_ids.size(1) - self.longest_prompt + 1).unsqueeze(1)  # (B, 1)
        is_eos = torch.arange(scores.size(1), device=scores.device) == 0  # (V,)
        return scores.masked_fill(is_eos != ends, -torch.inf)


class LuffyReplay(LuffyTrainer, Replay):
    """LuffyTrainer whose sampling is `Replay`'s."""


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
# Qwen2.5-1.5B's, but for its vocabulary
LARGE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}


def make_model(
    device: str, attention: str, shape: dict[str, int] | None = None, dtype: torch.dtype | None = None
) -> Qwen2ForCausalLM:
    """A small model in float32, or on a GPU a large one in bfloat16, where nothing else is said."""
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    config = make_config(shape or (LARGE if on_gpu else SMALL))
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config).to(device, dtype or (torch.bfloat16 if on_gpu else torch.float32))


def make_config(shape: dict[str, int]) -> Qwen2Config:
    return Qwen2Config(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1, bos_token_id=None, **shape)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th character of a private alphabet, so that ids survive the way through text."""
    vocabulary = {"<eos>": 0, "<pad>": 1, **{to_text([i]): i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def to_text(ids: list[int]) -> str:
    return "".join(chr(0x4E00 + i) for i in ids if i > 1)


def make_trainer(
    name: str, work: Workload, model: PreTrainedModel, directory: str, sample: bool = False, **options
) -> GRPOTrainer:
    """A trainer of this configuration, a key of `CONFIGURATIONS`, ready for `one_step`.

    Args:
        sample: whether it really samples as well.
        options: of its config.
    """
    groups, configuration = work.groups(), CONFIGURATIONS[name]
    on_gpu = model.device.type == "cuda"
    options = {
        "output_dir": directory,
        "num_generations": work.group_size,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.prompts * work.group_size // work.micro_batch,
        "max_completion_length": work.longest,
        "learning_rate": 1e-6,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "report_to": "none",
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,
        "shuffle_dataset": False,
        **options,
    }
    rows = [
        {"prompt": to_text(group["prompt"]), "demonstrations": [to_text(ids) for ids in group["demonstrations"]]}
        for group in groups
    ]
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": make_tokenizer()}
    if configuration.options is None:
        trainer = Replay(model, reward, GRPOConfig(**options), **given)
        recorded = [g["rollouts"] + g["demonstrations"] for g in groups]
    else:
        # `trim_padding` is the default with demonstrations; asked for where the curve has none
        ours = {"num_demonstrations": work.demonstrations, "trim_padding": True, **configuration.options}
        if configuration.budget:
            ours["tokens_per_micro_batch"] = round(configuration.budget * work.budget)
        trainer = LuffyReplay(model, reward, LuffyConfig(**ours, **options), **given)
        recorded = [g["rollouts"] for g in groups]
    trainer.recorded = {tuple(g["prompt"]): r for g, r in zip(groups, recorded, strict=True)}
    if sample:
        trainer.sampled_lengths = {tuple(g["prompt"]): [*map(len, g["rollouts"]), *g["more_lengths"]] for g in groups}
    if options["gradient_checkpointing"]:  # by `train()`, which does not run here
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def forward_and_backward(trainer: GRPOTrainer) -> None:
    """The micro-batches of one optimizer step."""
    rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(trainer.model, rows, None)


def one_step(trainer: GRPOTrainer) -> float:
    """Seconds of one optimizer step, from the prompts to the updated weights."""
    if trainer.optimizer is None:
        trainer.create_optimizer()
    synchronize(trainer)
    start = time.perf_counter()
    forward_and_backward(trainer)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    synchronize(trainer)
    return time.perf_counter() - start


def synchronize(trainer: GRPOTrainer) -> None:
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
