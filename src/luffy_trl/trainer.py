"""LuffyTrainer: GRPOTrainer with demonstrations in the groups. Overrides only; the math is in `objective.py`."""

import inspect
import math
import os
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from .config import LuffyConfig
from .demonstrations.agreement import beyond_window, disagreements
from .demonstrations.encoding import (
    DROPPED_COLUMN,
    ENCODED_COLUMNS,
    IDS_COLUMN,
    LOGPS_COLUMN,
    ROW_COLUMN,
    SOURCE_COLUMNS,
    TRUNCATED_COLUMN,
    USABLE_COLUMN,
    Demonstration,
    DemonstrationEncoder,
)
from .demonstrations.replay import ReplayBuffer
from .demonstrations.schedules import demonstration_weight, prefix_ratio
from .demonstrations.sources import (
    DatasetSource,
    DemonstrationSource,
    FunctionSource,
    Placement,
    ReplaySource,
    get_source_function,
)
from .hub.mixin import HubTrainer
from .metrics import timed
from .objective import off_policy_loss, token_denominator
from .padding.micro_batches import drop_zero_advantages, optimizer_steps, order_by_length, pack, trim, unpack
from .rewards.checked import checked
from .runs.checkpoints import NEWEST, UNFINISHED_DIR, find_checkpoint, publish


if TYPE_CHECKING:
    import requests

logger = get_logger(__name__)

# TRL hands each dataset column to the reward functions by name, beside these arguments of its own
RESERVED_COLUMNS = ("prompts", "completions")

# Below the log-prob of any token: exp(this - logp) does not overflow
LEAST_LOGP = -1e4

# Rows tokenized together: 100 long traces are some 10 MB of tokens
ENCODED_AT_ONCE = 100

# Rows whose prompts and demonstrations are compared before training
LOOKED_AT = 100

# A rollout with this reward counts as solved in `groups/*`, as in the paper's released code
SOLVED_REWARD = 1.0 - 1e-6  # float32 sums of weights that make 1 can be a little less


class LuffyTrainer(HubTrainer):
    """
    GRPO with demonstrations in each group (LUFFY, arXiv 2504.14945). With `num_demonstrations=0` it is `GRPOTrainer`.

    What differs from [`~trl.GRPOTrainer`], override by override:

    - `_generate_and_score_completions`: chooses the demonstrations of each group before, marks their tokens after;
    - `_generate_single_turn`: samples the other rows only, and puts the demonstrations' tokens in place;
    - `_calculate_rewards`: nothing; keeps the rewards for the metrics;
    - `_prepare_inputs`: orders the rows of each optimizer step by length, and trims the micro-batches;
    - `_get_per_token_logps_and_entropies`: packs the forward pass, leaves demonstrations out where nobody needs them,
      and keeps the last result for the off-policy term;
    - `_compute_loss`: shows TRL the rollouts' tokens alone and adds the off-policy term;
    - `log`: adds `on_policy/*`, `off_policy/*` and `groups/*`;
    - `train`, `_save_checkpoint`: checkpoints that are whole or not there, and the newest of them to resume from;
    - what is pushed to the Hub, and the model card: see [`~luffy_trl.hub.mixin.HubTrainer`], its parent.

    Takes the arguments of `GRPOTrainer`, with `args` a [`LuffyConfig`]. The data contract of `train_dataset` is in
    `luffy_trl.demonstrations.encoding`. Evaluation has no demonstrations.

    Raises:
        TypeError: if `args` is no `LuffyConfig`.
        ValueError: for data or options that cannot work with demonstrations, before any training step. A streamed
            dataset is checked as it is read.
    """

    _tag_names = ["trl", "grpo", "luffy"]
    _name = "LUFFY"
    _paper = {
        "title": "Learning to Reason under Off-Policy Guidance",
        "id": "2504.14945",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yan2025luffy,
                title        = {{Learning to Reason under Off-Policy Guidance}},
                author       = {Jianhao Yan and Yafu Li and Zican Hu and Zhi Wang and Ganqu Cui and Xiaoye Qu and
                                Yu Cheng and Yue Zhang},
                year         = 2025,
                eprint       = {arXiv:2504.14945},
            }"""),
    }
    # TRL looks for its template in a folder of its own
    _template_file = os.path.relpath(
        str(files("luffy_trl") / "hub" / "model_card.md"), str(files("trl") / "templates")
    )

    args: LuffyConfig
    reward_funcs: list[Callable]
    train_dataset: Dataset | IterableDataset
    _buffered_inputs: list[dict[str, Any]] | None
    # Kept from the overridden methods of the same call
    _completion_ids: list[list[int]]
    _rewards_per_func: torch.Tensor  # (rows of all processes, reward functions)
    _forward_outputs: tuple[torch.Tensor, torch.Tensor]  # logps and entropies, (B, T)

    def __init__(self, model, reward_funcs=None, args: LuffyConfig | None = None, *trl_args, **trl_kwargs):
        if args is None:
            args = LuffyConfig()
        if not isinstance(args, LuffyConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LuffyTrainer takes a LuffyConfig.")
        self.num_demonstrations = args.num_demonstrations
        given = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *trl_args, **trl_kwargs)
        _check_options(given.arguments, args)

        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        if args.skip_zero_advantages and self.aux_loss_enabled:
            raise ValueError(
                "skip_zero_advantages=True cannot be combined with the auxiliary loss of this mixture of experts, "
                "which is over all rows. Set one of skip_zero_advantages and router_aux_loss_coef to False or 0."
            )
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else checked(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            bound_waiting(self.vllm_generation.vllm_client.session, args.ddp_timeout)
        for message in beyond_window(self.model.config, args.max_completion_length):
            logger.warning(message)
        self._phase_seconds: dict[str, float] = defaultdict(float)  # since the last log, on this process
        self._saving_checkpoint = False
        self._has_behavior_logps = False
        self._source: DemonstrationSource | None = None
        if self.num_demonstrations > 0:
            _check_eos(self._tokenizer)
            self._source = self._make_source()
        self._learning_source = self._source if self._source is not None and self._source.uses_rollouts else None
        self._process = self.accelerator.process_index, self.accelerator.num_processes
        # Demonstration of each row of the training batch being generated, None where the policy samples
        self._placed: list[Demonstration | None] = []
        self._packs = self._packing_is_on()
        # Where the optimizer step under way began, and how many of its micro-batches were taken: see `_prepare_inputs`
        self._step_under_way, self._micro_batches_taken = -1, 0
        # Metrics that are means over tokens or rows: name -> [sum, count] since the last log
        self._sums: dict[str, tuple[float, float]] = {}

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's, and with `resume_from_checkpoint="auto"` from the newest complete checkpoint, if there is one."""
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self.accelerator.print(f"Resuming from {checkpoint}")
            if self._learning_source is not None:
                self._learning_source.load(Path(checkpoint), *self._process)
        elif resume_from_checkpoint in NEWEST:
            self.accelerator.print(f"{self.args.output_dir} has no complete checkpoint: starting anew")
        return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, final = run_dir / UNFINISHED_DIR / name, run_dir / name
        if self.is_local_process_zero():
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # what a killed run has left
        self.accelerator.wait_for_everyone()
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            if self._learning_source is not None and not self.args.save_only_model:
                self._learning_source.save(unfinished, *self._process)
        except Exception as error:
            error.add_note(f"Raised while {name} was saved. Earlier checkpoints are as they were.")
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise
        finally:
            self._saving_checkpoint = False
        if Path(self.state.best_model_checkpoint or "") == unfinished:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and unfinished.exists():  # another machine with a disk of its own
            publish(unfinished, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED_DIR) if self._saving_checkpoint else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._saving_checkpoint:  # only under its final name
            super()._push_from_checkpoint(checkpoint_folder)

    # Data

    def _make_source(self) -> DemonstrationSource:
        """Where demonstrations come from. Gives the training dataset the columns that the source needs."""
        name, dataset = self.args.demonstration_source, self.train_dataset
        columns = _column_names(dataset)
        if name == "dataset":
            self._has_behavior_logps = "completion_logps" in columns
            self.train_dataset = self._encode_demonstrations(dataset)  # checks the rows
            looked_at = dataset.take(LOOKED_AT)
            for message in disagreements(
                self.processing_class, self.eos_token_ids, looked_at, self.chat_template_kwargs
            ):
                logger.warning(message)
            return DatasetSource()

        self._has_behavior_logps = True
        if name != "replay":
            return FunctionSource(get_source_function(name), name, self._encoder())
        unused = [column for column in SOURCE_COLUMNS if column in columns]
        if unused:
            logger.warning(f"demonstration_source='replay' does not use the column {unused[0]!r} of `train_dataset`.")
        self.train_dataset = dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
        capacity = math.ceil(self.args.replay_capacity / self.accelerator.num_processes)
        buffer = ReplayBuffer(capacity, self.args.replay_start, self.num_generations, self.max_completion_length)
        return ReplaySource(self.train_dataset, buffer, self.args.replay_ratio)

    def _encoder(self) -> DemonstrationEncoder:
        return DemonstrationEncoder(
            self.processing_class,
            self.eos_token_ids,
            self.max_completion_length,
            self.args.demonstration_overflow,
            self.chat_template_kwargs,
        )

    def _encode_demonstrations(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Replace the columns of the data contract with token ids, and say what was too long."""
        columns = _column_names(dataset)
        encoder = self._encoder()
        used = [column for column in SOURCE_COLUMNS if column in columns]
        if isinstance(dataset, IterableDataset):
            return dataset.map(
                encoder, batched=True, batch_size=ENCODED_AT_ONCE, with_indices=True, remove_columns=used
            )

        features = {name: feature for name, feature in dataset.features.items() if name not in used}
        features |= {
            IDS_COLUMN: List(Value("binary")),
            USABLE_COLUMN: Value("int32"),
            DROPPED_COLUMN: Value("int32"),
            TRUNCATED_COLUMN: Value("int32"),
        }
        if "completion_logps" in used:
            features[LOGPS_COLUMN] = List(Value("binary"))
        with self.accelerator.main_process_first():  # the others read its cache, if the dataset is on disk
            dataset = dataset.map(
                encoder,
                batched=True,
                batch_size=ENCODED_AT_ONCE,
                writer_batch_size=ENCODED_AT_ONCE,
                with_indices=True,
                remove_columns=used,
                features=Features(features),
                desc="Encoding demonstrations",
            )
        self._report_encoding(dataset)
        return dataset

    def _report_encoding(self, dataset: Dataset) -> None:
        guided = sum(usable > 0 for usable in dataset[USABLE_COLUMN])
        dropped, truncated = sum(dataset[DROPPED_COLUMN]), sum(dataset[TRUNCATED_COLUMN])
        too_long = (
            f"{dropped} demonstrations dropped and {truncated} truncated for having more than max_completion_length="
            f"{self.max_completion_length} tokens (demonstration_overflow={self.args.demonstration_overflow!r})"
        )
        if guided == 0:
            raise ValueError(
                f"None of the {len(dataset)} prompts has a usable demonstration; {too_long}. Give the dataset "
                "demonstrations that fit, or set num_demonstrations=0 for plain GRPO."
            )
        message = f"{guided} of {len(dataset)} prompts have a demonstration; {too_long}."
        if dropped or truncated:
            logger.warning(message)
        else:
            logger.info(message)

    # Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            self._placed = []  # an interrupted training step may have left some
            rows = _without_demonstrations(inputs) if self.num_demonstrations > 0 else inputs
            return super()._generate_and_score_completions(rows)

        placement = Placement(inputs, [None] * len(inputs))
        rows = inputs
        if self._source is not None:
            placement = self._source.place(inputs, self.num_generations, self.num_demonstrations)
            rows = _without_demonstrations(placement.rows)
        self._placed = self._cut(placement.demonstrations)
        output = super()._generate_and_score_completions(rows)

        # Of a row with a prefix the rest is the policy's, but it is no rollout of the prompt alone
        is_demonstration = torch.tensor([d is not None for d in self._placed], device=self.accelerator.device)  # (B,)
        all_is_demonstration = self.accelerator.gather(is_demonstration)  # (rows of all processes,)
        rewards = self._total_rewards()  # (rows of all processes,)
        if self.num_demonstrations > 0:
            mask = output["completion_mask"].bool()  # (B, T)
            given = torch.tensor([len(d.token_ids) if d else 0 for d in self._placed], device=mask.device)  # (B,)
            counts = is_demonstration & self._gate_is_open(rewards, all_is_demonstration)  # (B,)
            output["demonstration_weight"] = counts.float() * demonstration_weight(
                self.args.demonstration_weight_schedule, self._progress()
            )
            on_policy_baseline = self.args.advantage_baseline == "on_policy"
            if on_policy_baseline or self.args.success_gate is not None:
                in_baseline = ~is_demonstration if on_policy_baseline else ~is_demonstration | counts
                # The loss looks at the reward of a demonstration, or of what the policy made of its beginning
                graded = (given < mask.sum(1)) | (self.args.demonstration_loss != "sft")
                output["advantages"] = self._rebased(
                    output["advantages"], in_baseline, ~is_demonstration | (counts & graded), rewards
                )
            output["off_policy_mask"] = mask & (torch.arange(mask.size(1), device=mask.device) < given.unsqueeze(1))
            if self._has_behavior_logps:
                output["behavior_logps"] = self._behavior_logps(mask)
        if self._learning_source is not None:
            output["remembered_row"] = self._record(
                self._learning_source, placement.rows, rewards, all_is_demonstration
            )
            for name, value in self._learning_source.metrics().items():
                mean = self.accelerator.reduce(torch.tensor(value, device=rewards.device), "mean").item()
                self._metrics["train"][name].append(mean)
        self._log_rollouts(is_demonstration, placement)
        self._log_groups(rewards, all_is_demonstration)
        self._placed = []
        return output

    def _record(
        self,
        source: DemonstrationSource,
        rows: list[dict[str, Any]],
        rewards: torch.Tensor,
        is_demonstration: torch.Tensor,
    ) -> torch.Tensor:
        """Tell the source what the prompts' rollouts were worth; which rows it should remember, once scored.

        Args:
            rows: of this process.
            rewards, is_demonstration: (rows of all processes,).

        Returns:
            `(B,)`: the row in the dataset of a solved rollout, -1 elsewhere.
        """
        own = torch.tensor([row[ROW_COLUMN] for row in rows], device=rewards.device)  # (B,)
        rollouts = ~is_demonstration.view(-1, self.num_generations)  # (groups, G)
        solved = (rewards >= SOLVED_REWARD).view_as(rollouts) & rollouts
        source.record(
            self.accelerator.gather(own)[:: self.num_generations].tolist(),
            solved.sum(1).tolist(),
            rollouts.sum(1).tolist(),
        )
        return own.masked_fill(~self._own(solved.flatten()), -1)

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _cut(self, placed: list[Demonstration | None]) -> list[Demonstration | None]:
        """The demonstrations, cut to the prefixes that `prefix_strategy` gives now."""
        args = self.args

        def ratio() -> float:
            return prefix_ratio(args.prefix_strategy, self._progress(), args.prefix_min, args.prefix_max)

        cut: list[Demonstration | None] = []
        for start in range(0, len(placed), self.num_generations):
            group = placed[start : start + self.num_generations]
            shared = ratio() if args.prefix_shared else None
            cut += [d and d.prefix(ratio() if shared is None else shared) for d in group]
        return cut

    def _gate_is_open(self, rewards: torch.Tensor, is_demonstration: torch.Tensor) -> torch.Tensor:
        """Whether demonstrations count, for this process's rows `(B,)`; the arguments are (rows of all processes,)."""
        rollouts = ~is_demonstration.view(-1, self.num_generations)  # (groups, G)
        solved = (rewards >= SOLVED_REWARD).view_as(rollouts) & rollouts
        success = solved.sum(1) / rollouts.sum(1)  # (groups,)
        gate = 1.0 if self.args.success_gate is None else self.args.success_gate
        is_open = (success <= gate).repeat_interleave(self.num_generations)
        if self.args.success_gate is not None:
            guided = is_demonstration.view_as(rollouts).any(1)
            self._metrics["train"]["groups/gate_open"].append((guided & (success <= gate)).float().mean().item())
        return self._own(is_open)

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part of one value a row of all processes."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    @timed("generation")
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not self._placed or self.num_demonstrations == 0:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )

        sampled = [
            i for i, demonstration in enumerate(self._placed) if demonstration is None or not demonstration.whole
        ]
        asked = sampled
        if self.use_vllm:  # hands each process a slice of one width; the surplus is left out below
            asked = self._as_many_everywhere(sampled)
        given = [demonstration.token_ids if demonstration else [] for demonstration in self._placed]
        sampled_ids, sampled_logps = super()._generate_single_turn(
            [prompt_ids[i] + given[i] for i in asked],
            images,
            {key: [value[i] for i in asked] for key, value in multimodal_fields.items()},
            num_generations=1,  # groups are ragged now: each row is a request of its own
        )

        completion_ids = list(given)
        # NaN: not sampled. TRL takes it as an importance ratio of 1 in the correction for vLLM.
        logps = [[float("nan")] * len(ids) for ids in given]
        for k, i in enumerate(sampled):
            completion_ids[i] = (given[i] + sampled_ids[k])[: self.max_completion_length]
            if sampled_logps is not None:
                logps[i] = (logps[i] + sampled_logps[k])[: self.max_completion_length]
        return completion_ids, logps if sampled_logps is not None else None

    @timed("rewards")
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.num_demonstrations > 0:  # a column of the completions table; evaluation has none
            placed = self._placed or [None] * len(prompts)
            self._log_completion_extra("demonstration", [d is not None for d in placed])
        self._completion_ids = completion_ids_list
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _total_rewards(self) -> torch.Tensor:
        """Weighted reward of every row of all processes, `(rows,)`; NaN where no reward function applied."""
        rewards = (self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)).nansum(dim=1)
        return rewards.masked_fill(self._rewards_per_func.isnan().all(dim=1), torch.nan)

    def _rebased(
        self, advantages: torch.Tensor, in_baseline: torch.Tensor, has_advantage: torch.Tensor, rewards: torch.Tensor
    ) -> torch.Tensor:
        """TRL's advantages `(B,)` from another baseline and, where it scales them, on another scale.

        Args:
            in_baseline: (B,), the rows whose mean reward is the baseline.
            has_advantage: (B,), the rows whose rewards make the scale. The others have no advantage.
            rewards: (rows of all processes,).
        """
        scorable = ~self._own(rewards).isnan()  # (B,)
        advantages = advantages.view(-1, self.num_generations)
        counted = (scorable & in_baseline).view_as(advantages)
        # An advantage is (reward - mean) / scale, so taking these rows' mean of it out moves the baseline to them
        baseline = (advantages * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        advantages = (advantages - baseline).flatten() * self._rescaling(has_advantage, rewards)
        advantages = advantages * (scorable & has_advantage)
        self._logs["advantages"].extend(self.accelerator.gather(advantages).tolist())  # pushes TRL's out of the table
        return advantages

    def _rescaling(self, has_advantage: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor | float:
        """What to multiply advantages `(B,)` by, for TRL's scale to be that of the rows `(B,)` that have one."""
        if self.scale_rewards == "none" or self.multi_objective_aggregation != "sum_then_normalize":
            return 1.0
        grouped = rewards.view(-1, self.num_generations)
        kept = grouped.masked_fill(~self.accelerator.gather(has_advantage).view_as(grouped), torch.nan)
        dim = 1 if self.scale_rewards == "group" else (0, 1)
        before, after = (nanstd(values, dim=dim, keepdim=True) + 1e-4 for values in (grouped, kept))  # 1e-4 is TRL's
        # NaN: of a single row, which is its own baseline
        return self._own((before / after).nan_to_num(1.0).expand_as(grouped).flatten())

    def _behavior_logps(self, mask: torch.Tensor) -> torch.Tensor:
        """Log-probs of the behavior policy, `(B, T)`: 0, certainty, wherever the data does not say."""
        behavior_logps = torch.zeros(mask.shape, device=mask.device)
        for row, demonstration in zip(behavior_logps, self._placed, strict=True):
            if demonstration is not None and demonstration.logps is not None:
                row[: len(demonstration.logps)] = torch.tensor(demonstration.logps, device=mask.device)
        return behavior_logps

    # Micro-batches

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self.state.global_step != self._step_under_way:
            self._step_under_way, self._micro_batches_taken = self.state.global_step, 0
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.trim_padding and self._buffered_inputs is not None and self._buffered_inputs is not before:
            self._buffered_inputs = self._arrange(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._micro_batches_taken += 1
        return inputs

    def _arrange(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of a generation, without wasted padding. No row leaves its optimizer step."""
        if "pixel_values" in batches[0]:  # rows of different numbers of image tensors
            return batches
        per_generation, per_step = len(batches), self.args.gradient_accumulation_steps
        aligned = per_generation % per_step == 0 or per_step % per_generation == 0
        arranged = []
        if aligned or self.num_iterations == 1:
            # the last step of an epoch can be shorter; one that was interrupted is counted from its start again
            current = self.current_gradient_accumulation_steps
            left = current - self._micro_batches_taken % current
            for step in optimizer_steps(per_generation, left, per_step):
                rows = order_by_length([batches[i] for i in step])
                if self.args.skip_zero_advantages:  # after the order: its advantages are those of a micro-batch's size
                    rows = drop_zero_advantages(rows, rows_count=self.loss_type not in ("dapo", "cispo", "vespo"))
                arranged += rows
        else:  # later iterations cut the same micro-batches into other steps
            arranged = batches
        return [trim(batch, self.pad_to_multiple_of) for batch in arranged]

    def _packing_is_on(self) -> bool:
        implementation = self.model.config.get_text_config()._attn_implementation
        if self.args.packed_forward is None:
            return "flash" in implementation
        if self.args.packed_forward and self._is_vlm:
            raise ValueError("packed_forward=True works for text models only, not with a processor for images.")
        return self.args.packed_forward

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        forward = super()._get_per_token_logps_and_entropies
        if all(value is None for value in images.values()):
            if self._packs:
                forward = self._packed_forward
            if self.args.trim_padding and self._placed and batch_size is not None:
                # Old or reference policy, during generation: TRL takes the log-probs alone
                return self._score_rollouts(forward, model, input_ids, attention_mask, logits_to_keep, batch_size)
        logps, entropies, aux_loss = forward(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **images,
        )
        self._forward_outputs = (logps, entropies)
        return logps, entropies, aux_loss

    def _score_rollouts(self, forward, model, input_ids, attention_mask, logits_to_keep, batch_size):
        """Log-probs `(B, T)` of the rollouts, by rows of like length; 0 for demonstrations, which need none."""
        lengths = attention_mask[:, -logits_to_keep:].sum(1)  # (B,)
        rows = [i for i, demonstration in enumerate(self._placed) if not (demonstration and demonstration.whole)]
        rows.sort(key=lambda i: -int(lengths[i]))
        logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        rows = self._as_many_everywhere(rows)
        for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            part = {
                "prompt_ids": input_ids[chunk, :-logits_to_keep],
                "prompt_mask": attention_mask[chunk, :-logits_to_keep],
                "completion_ids": input_ids[chunk, -logits_to_keep:],
                "completion_mask": attention_mask[chunk, -logits_to_keep:],
            }
            part = trim(part, self.pad_to_multiple_of)
            width = part["completion_ids"].size(1)
            logps[chunk, :width] = forward(
                model,
                torch.cat([part["prompt_ids"], part["completion_ids"]], 1),
                torch.cat([part["prompt_mask"], part["completion_mask"]], 1),
                width,
            )[0].to(logps.dtype)
        return logps, None, None

    def _as_many_everywhere(self, rows: list[int]) -> list[int]:
        """The rows, with the last one again and again where another process has more. Collective."""
        return rows + rows[-1:] * (max(gather_object([len(rows)])) - len(rows))

    def _packed_forward(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **images,
    ):  # fmt: skip
        """What the method of TRL returns, from one row of sequences without padding per `batch_size` rows."""
        logps, entropies, aux_losses = [], [], []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            chunk = slice(start, start + (batch_size or len(input_ids)))
            mask = attention_mask[chunk].bool()  # (B, S)
            labels = input_ids[chunk].clone()
            labels[:, :-logits_to_keep] = -100  # only completion tokens are scored
            packed_ids, position_ids = pack(input_ids[chunk], mask)  # (1, N)
            options = {"output_router_logits": True} if compute_aux_loss else {}
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=packed_ids,
                    position_ids=position_ids,  # restart at each sequence, which keeps them apart
                    labels=labels[mask].unsqueeze(0),
                    fused_lm_head=True,
                    **options,
                )
            # The model's outputs begin with the second token, (1, N - 1)
            logps.append(unpack(pad(outputs.log_probs, (1, 0)), mask)[:, -logits_to_keep:])
            if compute_entropy:
                entropies.append(unpack(pad(outputs.entropy, (1, 0)), mask)[:, -logits_to_keep:])
            if compute_aux_loss:
                aux_losses.append(outputs.aux_loss)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    # Loss

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        mixed = "off_policy_mask" in inputs  # not with num_demonstrations=0
        loss = super()._compute_loss(model, self._rollouts_alone(inputs) if mixed else inputs)
        logps, entropies = self._forward_outputs
        del self._forward_outputs  # lets the graph go with the loss
        if mixed:
            off_policy_loss = self._off_policy_loss(logps, inputs)
            loss = loss + off_policy_loss / self.current_gradient_accumulation_steps
            self._add_means({"off_policy/loss": (off_policy_loss.detach(), 1)})
        self._log_tokens(logps.detach(), entropies.detach(), inputs)
        if self._learning_source is not None:
            self._remember(self._learning_source, logps.detach(), entropies.detach(), inputs)
        return loss

    def _remember(
        self, source: DemonstrationSource, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]
    ) -> None:
        """Hand the solved rollouts of a micro-batch to the source, the first time that they are seen."""
        # TRL leaves the sampling policy's log-probs out where the policy has not moved since: then they are `logps`
        sampled = inputs.get("old_per_token_logps", logps)
        for i in (inputs["remembered_row"] >= 0).nonzero().flatten().tolist():
            mask = inputs["completion_mask"][i].bool()  # (T,)
            if not mask.any():  # mask_truncated_completions: nothing of it is trained, now or later
                continue
            source.remember(
                int(inputs["remembered_row"][i]),
                inputs["completion_ids"][i][mask].cpu().numpy(),
                sampled[i][mask].float().cpu().numpy(),
                entropies[i][mask].float().mean().item(),
            )
        inputs["remembered_row"].fill_(-1)  # in the buffered batch itself: with num_iterations it comes again

    def _rollouts_alone(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The micro-batch as TRL's loss should see it: demonstrations are context, nothing of them is trained.

        TRL's `tool_mask` means just that: tokens the policy did not sample. Clipping, KL, entropy bonus and quantile,
        sequence-level ratios and TRL's own metrics all respect it.
        """
        off_policy_mask = inputs["off_policy_mask"]  # (B, T)
        rollouts = {**inputs, "tool_mask": (~off_policy_mask).long()}
        # Where TRL averages over the tokens it sees (a row's, a micro-batch's), bring its mean to all tokens. All its
        # loss types are linear in the advantages.
        seen = self._denominator(inputs, inputs["completion_mask"].bool() & ~off_policy_mask)  # (B, 1)
        whole = self._denominator(inputs, inputs["completion_mask"].bool())  # (B, 1)
        rollouts["advantages"] = inputs["advantages"].unsqueeze(1) * (seen / whole)  # (B, 1)
        # Keep ratio and KL of tokens that do not count finite, however improbable they are: inf * 0 is NaN
        for key, neutral in (("old_per_token_logps", 0.0), ("ref_per_token_logps", LEAST_LOGP)):
            if key in inputs:
                rollouts[key] = inputs[key].masked_fill(off_policy_mask, neutral)
        return rollouts

    def _off_policy_loss(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The demonstrations' part of a micro-batch's loss, a scalar; exactly 0 where it holds none."""
        off_policy_mask = inputs["off_policy_mask"]  # (B, T)
        logps = logps.masked_fill(~off_policy_mask, 0.0)
        if self.args.demonstration_loss == "sft":
            per_token_loss = -logps  # (B, T)
        else:
            per_token_loss = off_policy_loss(
                logps,
                inputs["advantages"],
                shaping=self.args.shaping,
                gamma=self.args.shaping_gamma,
                exponent=self.args.shaping_exponent,
                behavior_logps=inputs.get("behavior_logps"),
            )  # (B, T)
        weight = self.args.demonstration_weight * inputs["demonstration_weight"].unsqueeze(1)  # (B, 1)
        per_token_loss = (weight * per_token_loss).masked_fill(~off_policy_mask, 0.0)
        denominator = self._denominator(inputs, inputs["completion_mask"].bool())  # (B, 1)
        return (per_token_loss / denominator).sum()

    def _denominator(self, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        # `num_items_in_batch` counts the tokens of all micro-batches and processes of a generation
        micro_batches = self.accelerator.num_processes * self.args.steps_per_generation
        tokens_per_micro_batch = inputs["num_items_in_batch"].clamp(min=1.0) / micro_batches
        return token_denominator(self.loss_type, mask, self.max_completion_length, tokens_per_micro_batch)

    # Metrics

    def _log_rollouts(self, is_demonstration: torch.Tensor, placement: Placement) -> None:
        """Lengths, truncation and overflow of a generation batch; `is_demonstration` is (B,)."""
        device = is_demonstration.device
        on_policy, off_policy = (~is_demonstration).float(), is_demonstration.float()
        lengths = torch.tensor([float(len(ids)) for ids in self._completion_ids], device=device)
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        clipped = torch.tensor([float(ids[-1] not in ends) for ids in self._completion_ids], device=device)
        self._add_means(
            {
                "on_policy/length": ((lengths * on_policy).sum(), on_policy.sum()),
                "off_policy/length": ((lengths * off_policy).sum(), off_policy.sum()),
                "on_policy/clipped_ratio": ((clipped * on_policy).sum(), on_policy.sum()),
            }
        )
        if self.num_demonstrations > 0:
            # Demonstrations of this batch's prompts that were too long
            overflow = [placement.dropped, placement.truncated]
            dropped, truncated = self.accelerator.reduce(torch.tensor(overflow, device=device), "sum").tolist()
            self._metrics["train"]["off_policy/dropped"].append(dropped)
            self._metrics["train"]["off_policy/truncated"].append(truncated)
            counted_before = isinstance(self._source, DatasetSource) and isinstance(self.train_dataset, Dataset)
            if dropped and not is_demonstration.any() and not counted_before:
                logger.warning_once(
                    f"All demonstrations of a generation were dropped for having more than max_completion_length="
                    f"{self.max_completion_length} tokens."
                )

    def _log_groups(self, rewards: torch.Tensor, is_demonstration: torch.Tensor) -> None:
        """Rewards and what groups hold; both arguments are (rows of all processes,), the same on each of them."""
        metrics = self._metrics["train"]
        for name, rows in (("on_policy/reward", ~is_demonstration), ("off_policy/reward", is_demonstration)):
            scored = rewards[rows & ~rewards.isnan()]
            if scored.numel() > 0:
                metrics[name].append(scored.mean().item())
        if self.state.global_step == 0 and rewards.isnan().all():
            logger.warning_once(
                "No reward function had a reward for any completion of the first generation (all None), so nothing is "
                "learned from it. TRL's accuracy rewards give None for a `solution` that they cannot read: it must be "
                "text that holds the answer alone."
            )
        graded = rewards[is_demonstration & ~rewards.isnan()]
        if self.state.global_step == 0 and graded.numel() > 0 and (graded <= 0).all():
            logger.warning_once(
                "No demonstration of the first generation earned a reward, so nothing is learned from them. Most "
                "often the reward looks for something that they do not have (such as '</think>' or \\boxed{}), or "
                "`solution` is not their answer: grade one by hand."
            )
        by_group = is_demonstration.view(-1, self.num_generations)  # (groups, G)
        solved = (rewards >= SOLVED_REWARD).view_as(by_group)
        metrics["groups/solve_none"].append((~(solved & ~by_group).any(1)).float().mean().item())
        metrics["groups/solve_all"].append((solved | by_group).all(1).float().mean().item())
        metrics["groups/guided"].append(by_group.any(1).float().mean().item())

    def _log_tokens(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: dict[str, Any]) -> None:
        """What the policy makes of the micro-batch's tokens; `logps` and `entropies` are (B, T)."""
        mask = inputs["completion_mask"].bool()  # (B, T)
        if "tool_mask" in inputs:  # what tools have answered is nobody's policy
            mask = mask & inputs["tool_mask"].bool()
        off_policy = inputs.get("off_policy_mask", torch.zeros_like(mask))
        on_policy = mask & ~off_policy
        probs = logps.exp()
        ratio = probs
        if "behavior_logps" in inputs:  # clamped, for the mean to stay finite: e^20 is as telling as more
            ratio = (logps - inputs["behavior_logps"]).clamp(max=20.0).exp()
        on_count, off_count = on_policy.sum(), off_policy.sum()
        self._add_means(
            {
                "on_policy/entropy": (entropies[on_policy].sum(), on_count),
                "on_policy/prob": (probs[on_policy].sum(), on_count),
                "off_policy/entropy": (entropies[off_policy].sum(), off_count),
                "off_policy/prob": (probs[off_policy].sum(), off_count),
                "off_policy/ratio": (ratio[off_policy].sum(), off_count),
                "off_policy/token_fraction": (off_count, on_count + off_count),
            }
        )

    def _add_means(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor | int]]) -> None:
        """Add (sum, count) pairs, over all processes, to the means since the last log. Collective: the same names
        everywhere, whatever rows a process holds."""
        local = torch.tensor([[float(x) for x in pair] for pair in sums.values()], device=self.accelerator.device)
        for name, pair in zip(sums, self.accelerator.reduce(local, "sum").tolist(), strict=True):
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + pair[0], count + pair[1])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for name, (total, count) in self._sums.items():
                if count > 0:  # a name with nothing to report is left out
                    self._metrics["train"][name] = [total / count]
            self._sums.clear()
            metrics = self._metrics["train"]
            steps = len(metrics.get("step_time", []))  # TRL adds one for each optimizer step
            if steps > 0:
                metrics |= {f"time/{phase}": [seconds / steps] for phase, seconds in self._phase_seconds.items()}
                self._phase_seconds.clear()
            for name in [name for name, values in metrics.items() if all(math.isnan(value) for value in values)]:
                del metrics[name]  # TRL would log None: a step without rollouts of its kind
        super().log(logs, start_time)


def bound_waiting(session: "requests.Session", seconds: float) -> None:
    """Let every request of the session fail that gets no answer for so long, as collectives do. TRL's client waits."""
    session.request = partial(session.request, timeout=seconds)  # type: ignore[method-assign]


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; those of a stream that does not know them are read off its first row, none if it is empty."""
    return dataset.column_names or list(next(iter(dataset), {}))


def _without_demonstrations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the reward functions get them, in training and evaluation alike."""
    ours = (*SOURCE_COLUMNS, *ENCODED_COLUMNS)
    return [{key: value for key, value in row.items() if key not in ours} for row in rows]


def _check_options(arguments: dict[str, Any], args: LuffyConfig) -> None:
    """Refuse, by name, data and options that would fail later or silently do something else."""
    train_dataset, eval_dataset = arguments.get("train_dataset"), arguments.get("eval_dataset")
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        named["eval_dataset"] = eval_dataset
    for name, dataset in named.items():
        if isinstance(dataset, Dataset | IterableDataset):
            _check_columns(name, _column_names(dataset), arguments.get("environment_factory") is not None)
    if isinstance(train_dataset, Dataset):
        prompts = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} rows, fewer than the {prompts} prompts of one generation "
                f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}), "
                "so no step would be taken. Add rows, or lower gradient_accumulation_steps or "
                "per_device_train_batch_size."
            )
    if args.skip_zero_advantages and isinstance(train_dataset, Dataset | IterableDataset):
        images = [column for column in _column_names(train_dataset) if column in ("image", "images")]
        if images:
            raise ValueError(
                f"skip_zero_advantages=True cannot be combined with images, and `train_dataset` has a column "
                f"{images[0]!r}: rows with images stay in their micro-batches. Set it to False."
            )
    if args.num_demonstrations == 0:
        return

    for option in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(option):
            raise ValueError(
                f"`{option}` cannot be combined with demonstrations: what a tool or an environment would have "
                f"answered to them is not known. Set num_demonstrations=0, or leave `{option}` out."
            )
    if args.demonstration_source == "replay" and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "demonstration_source='replay' needs a dataset whose rows can be read again, and `train_dataset` is a "
            "stream. Load it without dataset_streaming (streaming=False)."
        )
    if isinstance(train_dataset, Dataset | IterableDataset):
        columns = _column_names(train_dataset)
        if args.demonstration_source == "dataset":
            _check_demonstration_columns(columns)
        _check_columns_beside_demonstrations(columns)


def _check_columns(name: str, columns: list[str], environment_makes_prompts: bool) -> None:
    if not columns:
        raise ValueError(f"`{name}` is empty.")
    if "prompt" not in columns and not environment_makes_prompts:
        raise ValueError(f"`{name}` has no `prompt` column, only {columns}.")
    for column in RESERVED_COLUMNS:
        if column in columns:
            raise ValueError(
                f"`{name}` has a column {column!r}, the name under which reward functions receive the trainer's own "
                f"{column}. Rename it: demonstrations are called 'completion' or 'demonstrations'."
            )


def _check_demonstration_columns(columns: list[str]) -> None:
    has_one, has_several = "completion" in columns, "demonstrations" in columns
    if not has_one and not has_several:
        raise ValueError(
            f"`train_dataset` has neither a `completion` nor a `demonstrations` column, only {columns}. Add one (see "
            "luffy_trl.demonstrations.encoding), or set num_demonstrations=0 for plain GRPO."
        )
    if has_one and has_several:
        raise ValueError("`train_dataset` has both `completion` and `demonstrations`. Remove one of them.")
    if has_several and "completion_logps" in columns:
        raise ValueError(
            "`train_dataset` has `completion_logps`, which go with `completion`, but its demonstrations are in "
            "`demonstrations`. Use `completion`, or remove the log-probs."
        )


def _check_columns_beside_demonstrations(columns: list[str]) -> None:
    if "image" in columns or "images" in columns:
        raise ValueError(
            "`train_dataset` has images, which are not supported together with demonstrations. Remove the column, or "
            "set num_demonstrations=0."
        )
    taken = [column for column in ENCODED_COLUMNS if column in columns]
    if taken:
        raise ValueError(f"`train_dataset` has a column {taken[0]!r}, a name LuffyTrainer uses itself. Rename it.")


def _check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so a demonstration cannot end. Set `tokenizer.eos_token` to the token "
            "that ends the model's answers and pass it as `processing_class`."
        )
