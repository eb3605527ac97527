"""HubPushMixin: pushes to the Hub, none of which can stop a run, and a fuller model card."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from trl import GRPOConfig, GRPOTrainer

from ..reporting.logs import COMPLETIONS
from ..runs.hub_client import bound_silence
from ..runs.recipe import as_yaml, given_fields
from ..runs.redaction import known_secrets
from .card import CardFacts, complete_card, prompting
from .errors import explain
from .queue import PushQueue, remove_held, what_is_missing
from .upload import MODEL, Push, branch_of


logger = logging.getLogger(__name__)


@dataclass
class HubPushConfig(GRPOConfig):
    """GRPOConfig with the fields of [`HubPushMixin`].

    Raises:
        ValueError: at construction, for fields that do nothing, or no number of seconds.
    """

    merge_and_push: bool = field(
        default=False,
        metadata={
            "help": "With an adapter and push_to_hub: push the adapter merged into its base, in place of the adapter. "
            "The output directory keeps the adapter. Default: False."
        },
    )
    hub_checkpoint_revisions: bool = field(
        default=False,
        metadata={
            "help": "With push_to_hub: push each checkpoint's model as a branch of its own, step-N. Default: False."
        },
    )
    hub_retry_seconds: float = field(
        default=300.0,
        metadata={
            "help": "For how many seconds each push to the Hub is tried again, with growing waits, after a lost "
            "connection or a busy server. Then the run goes on without it. 0: one attempt. Default: 300."
        },
    )

    def __post_init__(self):
        if not (math.isfinite(self.hub_retry_seconds) and self.hub_retry_seconds >= 0):
            raise ValueError(f"hub_retry_seconds={self.hub_retry_seconds} must be a number of seconds, 0 or above.")
        for name in ("merge_and_push", "hub_checkpoint_revisions"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"{name}=True does nothing without push_to_hub=True. Set both, or neither.")
        super().__post_init__()


class HubPushMixin(GRPOTrainer):
    """
    GRPOTrainer whose pushes are tried again with back-off, recorded, and never raised.

    What differs from [`~trl.GRPOTrainer`], override by override:

    - `init_hf_repo`: a Hub that cannot be reached, or refuses, is a warning;
    - `_push_from_checkpoint`: pushes what is in the checkpoint, never a pickle, in the background and in order; with
      `hub_checkpoint_revisions` as a branch of its own too;
    - `_finish_current_push`: waits for these, within a bounded time;
    - `push_to_hub`: also pushes what failed before, and says what is missing and how to push it;
    - `create_model_card`: completes TRL's card.

    Logged completions (`log_completions_hub_repo`) go the same way.

    Raises:
        ValueError: for `merge_and_push` without an adapter.
    """

    args: HubPushConfig
    # Curves on the card: name -> what the names of its metrics begin with in the log
    _card_curves = {"completions": ""}

    def __init__(self, model, reward_funcs, args: HubPushConfig, *trl_args, **trl_kwargs):
        self.card_facts = CardFacts()
        self._dataset_name: str | None = None
        self._pushes = PushQueue(Path(args.output_dir), HfApi(token=args.hub_token), args.hub_retry_seconds)
        # TRL would create this repository now, and end here if it cannot
        completions_repo, args.log_completions_hub_repo = args.log_completions_hub_repo, None
        try:
            super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        finally:
            args.log_completions_hub_repo = completions_repo
        if args.merge_and_push and not is_peft_model(self.model):
            raise ValueError(
                "merge_and_push=True, but the model has no adapter to merge. Set it to False, or use PEFT."
            )
        if self.is_world_process_zero():
            remove_held(self._pushes.output_dir)
        if completions_repo is not None and self.is_world_process_zero():
            push = Push(COMPLETIONS, completions_repo, private=args.hub_private_repo, message="Completions")
            self.add_callback(PushCompletions(self._pushes, push))

    def init_hf_repo(self, token: str | None = None) -> None:
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if token is not None:
            self._pushes.api.token = token
        bound_silence()
        try:
            url = self._pushes.api.create_repo(name, private=self.args.hub_private_repo, exist_ok=True)
            name = url.repo_id
        except Exception as error:  # a run goes on without the Hub
            logger.warning(
                f"The repository {name} could not be created: {explain(error)}. The run goes on and keeps everything "
                f"in {self.args.output_dir}; it is tried again with each push."
            )
        self.hub_model_id = name
        self._pushes.set_model(self._model_push())

    def _model_push(self, message: str | None = "End of training", revision: str | None = None) -> Push:
        return Push(
            MODEL,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            merge=self.args.merge_and_push,
            private=self.args.hub_private_repo,
            message=message or "End of training",
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """
        Save the model, its tokenizer and its card to `output_dir`, and push them with whatever could not be pushed
        before. What is missing in the end is logged, not raised: it is on disk, and `luffy-trl push` does it later.

        Args:
            card: for `create_model_card`.

        Returns:
            The commit; None on other processes than the main one, if it failed, and without `blocking`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # collective
        self.accelerator.wait_for_everyone()  # for the last time: an upload can take longer than a collective may
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token)
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1]} | card)
        push = self._model_push(commit_message, revision)
        self._pushes.add(push)
        if not blocking:
            return None
        self._pushes.finish()
        if push in self._pushes.uploaded:  # the Hub works: it may take the others too
            self._pushes.retry()
            self._pushes.finish()
        if report := what_is_missing(self._pushes.output_dir):
            logger.warning(report)
        uploaded = self._pushes.uploaded.get(push)
        return uploaded.commit if uploaded is not None else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero():
            return
        # the folder may still have another name, where saving is atomic
        for push in self._checkpoint_pushes(f"checkpoint-{self.state.global_step}"):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._pushes.add(push, Path(checkpoint_folder), keep_all=self.args.hub_always_push)

    def _checkpoint_pushes(self, checkpoint: str) -> Iterator[Push]:
        strategy = self.args.hub_strategy
        model = Push(
            checkpoint,
            self.hub_model_id,
            revision=self.args.hub_revision,
            private=self.args.hub_private_repo,
            message=f"Training in progress, step {self.state.global_step}",
        )
        if strategy != HubStrategy.END:
            yield model
        if strategy == HubStrategy.CHECKPOINT:
            yield dataclasses.replace(model, folder="last-checkpoint", states=True)
        if strategy == HubStrategy.ALL_CHECKPOINTS:
            yield dataclasses.replace(model, folder=checkpoint, states=True)
        if self.args.hub_checkpoint_revisions:
            yield dataclasses.replace(model, revision=branch_of(checkpoint))

    def _finish_current_push(self) -> None:
        # What an earlier run could not push is not looked at by one that pushes nothing
        if not self.is_world_process_zero() or not self._pushes.is_used:
            return
        self._pushes.finish()
        if missing := len(self._pushes.record.missing):
            logger.warning(f"Missing on the Hub so far: {missing}. `luffy-trl push` can do it later.")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if not self.is_world_process_zero():
            return
        # The trainer's own calls, with each checkpoint, do not know it
        self._dataset_name = dataset_name or self._dataset_name
        super().create_model_card(model_name, self._dataset_name, tags)
        facts = self.card_facts
        if facts.recipe is None:
            facts = dataclasses.replace(facts, recipe=as_yaml(self._recipe(), known_secrets(self.args.hub_token)))
        complete_card(
            Path(self.args.output_dir),
            facts,
            self.state.log_history,
            self._card_curves,
            prompting(self._a_prompt(), self.chat_template_kwargs, self.max_completion_length, self.args.temperature),
            is_adapter=is_peft_model(self.model),
        )

    def _recipe(self) -> dict[str, Any]:
        """Fields of the config that the card gives; without an override, those it has derived among them."""
        return given_fields(self.args)

    def _a_prompt(self) -> Any:
        """To see its kind; a stream is not asked, which might need the network."""
        if isinstance(self.train_dataset, Dataset) and "prompt" in self.train_dataset.column_names:
            return self.train_dataset[0]["prompt"]
        return ""


class PushCompletions(TrainerCallback):
    """Pushes the completions logged so far with each checkpoint, and at the end of training."""

    def __init__(self, pushes: PushQueue, push: Push):
        self.pushes, self.push = pushes, push

    def on_save(self, args, state, control, **kwargs):
        self.pushes.add(self.push, self.pushes.output_dir / COMPLETIONS)

    def on_train_end(self, args, state, control, **kwargs):
        self.pushes.add(self.push, self.pushes.output_dir / COMPLETIONS)
