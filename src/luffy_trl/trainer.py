"""LuffyTrainer: GRPOTrainer with demonstrations in the groups. A step, in its order.

What is LUFFY's is here and in three modules of pure torch: `advantages.py` (which completions count, against what),
`objective.py` (the term that is added to TRL's loss) and `shaping.py` (f in it). Everything else is a room of its own.
"""

import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from .advantages import Outcome, credit, credit_each, deciding_reward, total_rewards
from .checks import (
    COLD_START,
    check_against_model,
    check_eos,
    check_options,
    check_rewards,
    first_generation_warnings,
    overflow_warnings,
    solved_warnings,
    source_warnings,
)
from .config import LuffyConfig
from .demonstrations.acting import TrajectoriesMixin
from .demonstrations.encoding import ROW_COLUMN, without_demonstrations
from .demonstrations.guidance import Guidance, progress
from .demonstrations.images import requests
from .demonstrations.placement import (
    Generation,
    behavior_logps,
    cut_to_prefixes,
    demonstration_lengths,
    merge_completions,
    off_policy_mask,
)
from .demonstrations.schedules import prefix_ratio
from .demonstrations.sources import DemonstrationSource, NoSource, open_source, remember_solved
from .hub.mixin import HubPushMixin
from .metrics import ColdStart, Means, Stopwatch, group_metrics, length_sums, objective_sums, source_sums, token_sums
from .objective import (
    IMITATIONS,
    ITEM_KEYS,
    are_imitated,
    counted,
    demonstration_term,
    denominators,
    hide_demonstrations,
    items_in_batch,
    off_policy_loss,
)
from .padding.micro_batches import TRAINED_KEY
from .padding.mixin import PaddingFreeMixin
from .rewards.checked import checked
from .runs.best import BestByRewardMixin
from .runs.budget import TokenBudgetMixin
from .runs.evaluations import EvaluationSetsMixin
from .runs.mixin import WholeCheckpointMixin
from .runs.stopping import bound_waiting
from .temperature import DemonstrationsAtOne


logger = get_logger(__name__)


# For the model card
LUFFY_PAPER = {
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


class LuffyTrainer(
    PaddingFreeMixin,
    TrajectoriesMixin,
    EvaluationSetsMixin,
    BestByRewardMixin,
    WholeCheckpointMixin,
    TokenBudgetMixin,
    HubPushMixin,
):
    """
    GRPO with demonstrations in each group (LUFFY, arXiv 2504.14945). With `num_demonstrations=0` it is `GRPOTrainer`.

    What differs from [`~trl.GRPOTrainer`], override by override, in the order in which a step runs:

    - `_generate_and_score_completions`: chooses the demonstrations of each group before; after, moves the advantages
      to another baseline or scale where that is asked for, and adds the keys below to the batch;
    - `_generate_single_turn`: samples the other rows only, and puts the demonstrations' tokens in place;
    - `_rows_to_score`: leaves demonstrations out of the old and the reference policy's forward passes;
    - `_calculate_rewards`: grades demonstrations as rollouts are; keeps the rewards for what comes after;
    - `_compute_loss`: shows TRL the rollouts' tokens alone, and adds the demonstrations' term;
    - `_get_per_token_logps_and_entropies`: nothing; keeps the loss's forward pass for that term;
    - `log`: adds `on_policy/*`, `off_policy/*` and `groups/*`;
    - `_save_own_state`, `_load_own_state`: replay buffer and success rate go into checkpoints;
    - `_recipe`, `_resumed_with`: the model card gives the fields that were given, and what a resumption changed.

    Its parents know nothing of LUFFY, but for `TrajectoriesMixin`, which replays demonstrations of several turns:
    `PaddingFreeMixin` leaves out padding, `BestByRewardMixin` chooses the best model by the reward, `EvaluationSetsMixin`
    keeps the metrics of several evaluation sets apart, `WholeCheckpointMixin` writes checkpoints that are whole or not
    there, `TokenBudgetMixin` counts tokens, `HubPushMixin` pushes.

    What is added to TRL's batch, by `_generate_and_score_completions` (B rows, T completion tokens):

    | key | shape | what | read by |
    | --- | --- | --- | --- |
    | `off_policy_mask` | (B, T) bool | True on a demonstration's tokens, less what tools and users wrote. (TRL has a method's local of that name, which is True on tokens to keep.) | the loss, metrics |
    | `off_policy_weight`, `on_policy_weight` | (B,) | factors on demonstrations' loss (weight, schedule, gate), and rollouts' | the loss |
    | `is_trained` | (B,) bool | True on rows with a demonstration that needs no advantage; only with an SFT loss or CHORD's | `skip_zero_advantages` |
    | `is_cold` | (B,) bool | True in groups without a right rollout | metrics |
    | `behavior_logps` | (B, T) | log-probs of who wrote them, 0 where unknown; only where a source gives any | the loss, metrics |
    | `row_to_remember` | (B,) | the dataset's row of a solved rollout, else -1; only with replay | `remember_solved` |

    What everything rests on: with demonstrations each process holds whole groups, their rows one after another; each
    group has at least one rollout; each process runs the same collectives and as many forward passes as the others,
    whatever rows it holds.

    Takes the arguments of `GRPOTrainer`, with `args` a [`LuffyConfig`]. The data contract of `train_dataset` is in
    `luffy_trl.demonstrations.encoding`. Evaluation has no demonstrations.

    Raises:
        TypeError: if `args` is no `LuffyConfig`.
        ValueError: for data or options that cannot work with demonstrations, before any training step. A streamed
            dataset is checked as it is read.
    """  # noqa: E501 - a table

    _tag_names = ["trl", "grpo", "luffy"]
    _name = "LUFFY"
    _paper = LUFFY_PAPER
    # TRL looks for its template in a folder of its own
    _template_file = os.path.relpath(
        str(files("luffy_trl") / "hub" / "model_card.md"), str(files("trl") / "templates")
    )
    _card_curves = {"rollouts": "on_policy/", "demonstrations": "off_policy/"}
    _completion_keys = (*PaddingFreeMixin._completion_keys, "off_policy_mask", "behavior_logps")
    _count_keys = (*PaddingFreeMixin._count_keys, *ITEM_KEYS)

    args: LuffyConfig
    reward_funcs: list[Callable]
    train_dataset: Dataset | IterableDataset

    def __init__(self, model, reward_funcs=None, args: LuffyConfig | None = None, *trl_args, **trl_kwargs):
        if args is None:
            args = LuffyConfig()
        if not isinstance(args, LuffyConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LuffyTrainer takes a LuffyConfig.")
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *trl_args, **trl_kwargs)
        check_options(bound.arguments, args)
        check_rewards(bound.arguments, args)
        self.num_demonstrations = args.num_demonstrations
        # What is under way, None outside of it: see `_generating` and `_keeping_forward`
        self._generation: Generation | None = None
        self._forward: list[torch.Tensor] | None = None

        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else checked(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            bound_waiting(self.vllm_generation.vllm_client.session, args.ddp_timeout)
        # The reward function by which a completion is solved; None: the total
        self._deciding = deciding_reward(self.reward_func_names, args.solved_reward)
        messages = solved_warnings(self.reward_func_names, self.reward_weights.tolist(), args)
        reader = (self.processing_class, self.model.config, self.eos_token_ids)
        for message in messages + check_against_model(*reader, bound.arguments, args):
            logger.warning(message)
        self._means = Means(partial(self.accelerator.reduce, reduction="sum"), self.accelerator.device)
        self._stopwatch, self._cold_start = Stopwatch(), ColdStart()
        self._source: DemonstrationSource = NoSource()
        self._guidance = Guidance(args)
        if self.num_demonstrations > 0:
            check_eos(self._tokenizer)
            self._source, self.train_dataset = self._open_source(self.train_dataset)
            # Past solutions of the policy itself were sampled at this temperature
            temperature = 1.0 if self._source.uses_rollouts else self.temperature
            self._at_one = DemonstrationsAtOne(self.model, temperature, args.cast_lm_head_to_fp32, self._laid_out)

    # 1. Place demonstrations; let TRL sample and grade the rest; credit and annotate

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(self._rows_for_rewards(inputs))

        with self._generating(inputs) as generation:
            placed = generation.placement.demonstrations
            output = super()._generate_and_score_completions(self._rows_for_rewards(generation.placement.rows))

        mask = output["completion_mask"].bool()  # (B, T)
        lengths = demonstration_lengths(placed, mask.device)  # (B,)
        trained = counted(output)  # (B, T)
        off_policy = off_policy_mask(lengths, trained)  # (B, T)
        facts = torch.stack([lengths, mask.sum(1), off_policy.sum(1), trained.sum(1)], dim=1)  # (B, 4)
        given, written, off_tokens, tokens = self.accelerator.gather(facts).unbind(1)  # (N,), of all processes
        # Of a row with a prefix the rest is the policy's, but it is no rollout of the prompt alone
        has_demonstration, is_continued = given > 0, given < written
        per_func = generation.rewards_per_func  # (N, F)
        rewards = total_rewards(per_func, self.reward_weights)  # (N,)
        judged = rewards if self._deciding is None else per_func[:, self._deciding]  # (N,)
        args, group_size = self.args, self.num_generations
        outcome = Outcome.of(rewards, has_demonstration, group_size, args.success_gate, judged, args.solved_threshold)

        if self.num_demonstrations > 0:
            output["off_policy_mask"] = off_policy
            off, on = self._guidance.weigh(outcome.solved, has_demonstration, self.state)  # (N,)
            output["off_policy_weight"], output["on_policy_weight"] = self._own(outcome.counts * off), self._own(on)
            output |= items_in_batch(off_tokens, tokens, outcome.counts)
            output["is_cold"] = self._own(outcome.is_cold)
            if args.advantage_baseline == "on_policy" or args.success_gate is not None:
                output["advantages"] = self._credited(output["advantages"], per_func, outcome, is_continued)
            if args.demonstration_loss in IMITATIONS:
                output[TRAINED_KEY] = are_imitated(output)
            if self._source.gives_logps:
                output["behavior_logps"] = behavior_logps(placed, mask)
            if self._source.uses_rollouts:
                output["row_to_remember"] = self._tell_source(generation.placement.rows, outcome)
        self._log_generation(generation, outcome)
        return output

    @contextmanager
    def _generating(self, inputs: list[dict[str, Any]]) -> Iterator[Generation]:
        """The generation under way, with this process's demonstrations in their places."""
        args = self.args
        placement = self._source.place(inputs, self.num_generations, self.num_demonstrations)
        done = progress(self.state)
        ratio = partial(prefix_ratio, args.prefix_strategy, done, args.prefix_min, args.prefix_max)
        cut = cut_to_prefixes(placement.demonstrations, self.num_generations, ratio, args.prefix_shared)
        self._generation = Generation(dataclasses.replace(placement, demonstrations=cut))
        try:
            yield self._generation
        finally:
            self._generation = None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        sample = super()._generate_single_turn
        if self._generation is None:
            return sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        with self._stopwatch("generation"):
            if self.num_demonstrations == 0 or self._acts:  # behind a tool's answer each row is a rollout
                return sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
            generation, placement = self._generation, self._generation.placement
            to_sample = placement.rows_to_sample()
            # vLLM hands each process a slice of one width; the surplus is left out when the rows are merged
            asked = self._as_many_everywhere(to_sample) if self.use_vllm else to_sample
            prompts = requests(generation, asked, prompt_ids, images, multimodal_fields, self._tokenize_rows)
            # Groups are ragged now: each row is a request of its own
            sampled_ids, sampled_logps = sample(*prompts, num_generations=1)
            return merge_completions(
                placement.demonstrations, to_sample, sampled_ids, sampled_logps, self.max_completion_length
            )

    def _rows_to_score(self, rows: int) -> list[int]:
        return self._generation.placement.rows_to_sample() if self._generation else super()._rows_to_score(rows)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        generation = self._generation
        if self.num_demonstrations > 0:  # a column of the completions table; evaluation has no demonstrations
            placed = generation.placement.demonstrations if generation else [None] * len(prompts)
            self._log_completion_extra("demonstration", [d is not None for d in placed])
        if generation is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        with self._stopwatch("rewards"):
            generation.completion_ids = completion_ids_list
            generation.rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return generation.rewards_per_func

    def _credited(
        self, advantages: torch.Tensor, per_func: torch.Tensor, outcome: Outcome, is_continued: torch.Tensor
    ) -> torch.Tensor:
        """This process's advantages `(B,)`, on the baseline and the scale of the rows that count.

        Args:
            advantages: TRL's, `(B,)`.
            per_func: rewards, `(N, F)`.
            is_continued: `(N,)`, rows in which the policy wrote something.
        """
        # An SFT loss does not look at a demonstration's reward, but what the policy made of its beginning is graded
        args = self.args
        graded = is_continued | (args.demonstration_loss == "importance_sampling")
        if self.multi_objective_aggregation == "normalize_then_sum":
            credited = credit_each(per_func, self.reward_weights, outcome, args.advantage_baseline, graded)
        else:
            gathered = self.accelerator.gather(advantages)  # (N,)
            credited = credit(gathered, outcome, args.advantage_baseline, self.scale_rewards, graded)
        self._logs["advantages"].extend(credited.tolist())  # as many as the table holds: TRL's go out of it
        return self._own(credited)

    def _tell_source(self, rows: list[dict[str, Any]], outcome: Outcome) -> torch.Tensor:
        """Record what the prompts' rollouts were worth; which rows the source should remember once scored, `(B,)`."""
        own = torch.tensor([row[ROW_COLUMN] for row in rows], device=outcome.solved.device)  # (B,)
        rollouts = ~outcome.has_demonstration.view_as(outcome.solved)  # (groups, G)
        prompts = self.accelerator.gather(own)[:: self.num_generations]  # (groups,)
        self._source.record(prompts.tolist(), outcome.solved.sum(1).tolist(), rollouts.sum(1).tolist())
        return own.masked_fill(~self._own(outcome.solved.flatten()), -1)

    def _rows_for_rewards(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return without_demonstrations(rows) if self.num_demonstrations > 0 else rows

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """This process's part of one value a row of all processes: (N,) -> (B,)."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    # 2. The loss of a micro-batch: TRL's on the rollouts' tokens, and one term more

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        if "off_policy_mask" not in inputs:  # num_demonstrations=0
            with self._keeping_forward() as forward:
                loss = super()._compute_loss(model, inputs)
            self._log_tokens(inputs, {}, *forward)
            return loss

        off_policy = inputs["off_policy_mask"]  # (B, T)
        seen, on, off = self._denominators(inputs)  # (B, 1)
        factor = seen / on * inputs["on_policy_weight"].unsqueeze(1)  # (B, 1)
        with self._keeping_forward() as forward, self._at_one(inputs):
            loss = super()._compute_loss(model, hide_demonstrations(inputs, factor))
        logps, entropies = forward  # (B, T)
        shown = logps.masked_fill(~off_policy, 0.0)  # (B, T)
        per_token_loss = self._demonstration_loss(shown, inputs)  # (B, T)
        term = demonstration_term(per_token_loss, off_policy, inputs["off_policy_weight"], off)
        [gradient] = torch.autograd.grad(per_token_loss.sum(), shown, retain_graph=True)  # (B, T), of these alone
        sums = objective_sums(term.detach(), logps.detach(), -gradient, inputs, on, off)
        self._log_tokens(inputs, sums, logps, entropies)
        if self._source.uses_rollouts:
            remember_solved(self._source, inputs, logps.detach(), entropies.detach())
        return loss + term / self.current_gradient_accumulation_steps

    def _demonstration_loss(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of each token as if it were a demonstration's, `(B, T)`."""
        args = self.args
        if args.demonstration_loss in IMITATIONS:
            return IMITATIONS[args.demonstration_loss](logps)
        constants = (args.shaping, args.shaping_gamma, args.shaping_exponent)
        return off_policy_loss(logps, inputs["advantages"], *constants, inputs.get("behavior_logps"))

    def _denominators(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # TRL's `num_items_in_batch` counts the tokens of all micro-batches and processes of a generation
        micro_batches = self.accelerator.num_processes * self.args.steps_per_generation
        mean_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / micro_batches
        how = (self.loss_type, self.args.demonstration_average, self.max_completion_length)
        return denominators(inputs, *how, mean_tokens, micro_batches)

    @contextmanager
    def _keeping_forward(self) -> Iterator[list[torch.Tensor]]:
        """Log-probs and entropies `(B, T)` of the forward pass that TRL's loss makes in here, with their graph."""
        self._forward = []
        try:
            yield self._forward
        finally:
            self._forward = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._forward is not None:
            self._forward[:] = logps, entropies
        return logps, entropies, aux_loss

    # 3. What is logged

    def _log_generation(self, generation: Generation, outcome: Outcome) -> None:
        placement, processes = generation.placement, self.accelerator.num_processes
        sums = length_sums(generation, ends=[*self.eos_token_ids, self._tokenizer.pad_token_id])
        if self.num_demonstrations > 0:
            sums |= source_sums(placement, self._source.metrics(), processes)
        self._means.add(sums)
        for name, value in (group_metrics(outcome) | self._guidance.metrics).items():
            if name != "groups/gate_open" or self.args.success_gate is not None:
                self._metrics["train"][name].append(value)
        messages = first_generation_warnings(outcome) if self.state.global_step == 0 else []
        if not self._source.overflow_is_known:
            messages += overflow_warnings(placement, self.max_completion_length)
        for message in messages:
            logger.warning_once(message)

    def _log_tokens(self, inputs: dict[str, Any], sums: Mapping[str, tuple], logps, entropies) -> None:
        mask = counted(inputs)  # (B, T)
        off_policy = inputs.get("off_policy_mask", torch.zeros_like(mask))
        behavior = inputs.get("behavior_logps")
        gamma = self.args.shaping_gamma if self.args.shaping == "regularized" else None
        self._means.add({**sums} | token_sums(logps.detach(), entropies.detach(), mask, off_policy, behavior, gamma))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics, means = self._metrics["train"], self._means.take()
            if unsolved := metrics.get("groups/solve_none"):  # none where rollouts of an earlier log are trained on
                step, push_to_pull = self.state.global_step, means.get("groups/push_to_pull", 0.0)
                if self._cold_start.look(step, min(unsolved), push_to_pull):
                    logger.warning_once(COLD_START)
            if steps := len(metrics.get("step_time", [])):  # TRL adds one for each optimizer step
                means |= self._stopwatch.take(steps)
            metrics.update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    # Where demonstrations come from, and what of it goes into checkpoints and onto the card

    def _open_source(self, dataset):
        """The source of demonstrations, and the dataset with the columns that it needs."""
        args, accelerator, encoder = self.args, self.accelerator, self._encoder()
        first = accelerator.main_process_first()
        source, prepared = open_source(dataset, encoder, args, accelerator.num_processes, first)
        for message in source_warnings(dataset, prepared, encoder, args):
            logger.warning(message)
        return source, prepared

    def _save_own_state(self, checkpoint: Path) -> None:
        if self.is_world_process_zero():
            self._guidance.save(checkpoint)
        self._source.save(checkpoint, self.accelerator.process_index, self.accelerator.num_processes)

    def _load_own_state(self, checkpoint: Path) -> None:
        self._guidance.load(checkpoint)
        self._source.load(checkpoint, self.accelerator.process_index, self.accelerator.num_processes)

    def _resumed_with(self, overruled: Mapping[str, Any], told: list[str]) -> None:
        self.card_facts = self.card_facts.resumed(overruled, told)

    def _recipe(self) -> dict[str, Any]:
        return self.args.given
