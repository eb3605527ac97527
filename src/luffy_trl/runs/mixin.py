"""WholeCheckpointMixin: checkpoints that are whole or not there, and the newest of them to resume from."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import NEWEST, NONE, UNFINISHED_DIR, find_checkpoint, publish, recover
from .earlier import Moved, go_on, has_model, of_run, start_again, start_anew
from .fitting import check_adapter, check_kind, check_processes, check_shapes, read_state, settings_in
from .identity import new_name, read_identity
from .manifest import read_manifest
from .settings import OF_THE_OPTIMIZER, OF_THE_SCHEDULE, Change, changes, settings_of


class WholeCheckpointMixin(Trainer):
    """
    A trainer whose checkpoints are written beside the others and get their name when everything is on disk.

    What differs from [`~transformers.Trainer`], override by override:

    - `train`: `resume_from_checkpoint="auto"` takes the newest whole checkpoint of this run, if there is one. What
      another run has left in `output_dir` is moved into a folder there. What has changed since the checkpoint is said;
    - `_run_epoch`: no step beyond the last, when a run is started again that has made them all;
    - `_init_training_state`: the intervals of logs, evaluations and checkpoints are those that are asked for now;
    - `_load_optimizer_and_scheduler`: the rate of the first step is the schedule's, where that has changed;
    - `_issue_warnings_after_load`: a weight that is tied to another one is not missing;
    - `_save_checkpoint`: writes into a directory of its own, then moves it, then pushes and rotates;
    - `_get_output_dir`: that directory, while a checkpoint is written;
    - `_push_from_checkpoint`: nothing, until the checkpoint has its name.

    A subclass that keeps a state of its own in checkpoints overrides `_save_own_state` and `_load_own_state`; one that
    looks at what is asked for before the first step, `check_before_training`; one that writes down what has changed,
    `_resumed_with`.
    """

    # Whether "auto" takes checkpoints without a manifest, which other trainers and earlier versions have written
    _takes_unlisted = False

    def __init__(self, *args, **kwargs):
        self._writes_checkpoint = False
        self._settings: dict[str, Any] = {}  # in force, for manifests
        self._told_changes: list[str] = []  # over all resumptions
        self._changes: list[Change] = []
        super().__init__(*args, **kwargs)

    def _save_own_state(self, checkpoint: Path) -> None:
        """Write what this process needs to go on, beside the trainer's own files. Each process calls it."""

    def _load_own_state(self, checkpoint: Path) -> None:
        """Go on from what `_save_own_state` wrote, perhaps with another number of processes."""

    def check_before_training(self) -> None:
        """Raise ValueError for what cannot work. Callbacks are known by now."""

    def _resumed_with(self, overruled: Mapping[str, Any], told: list[str]) -> None:
        """Write down the values of fields that the checkpoint has overruled, and a sentence on each change so far."""

    # Going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's, and with `resume_from_checkpoint="auto"` from the newest complete checkpoint, if any.

        Raises:
            CannotResumeError: a ValueError, for a checkpoint that is not there, is damaged, or does not fit the run.
        """
        self.check_before_training()
        is_trial = bool(args and args[0]) or kwargs.get("trial") is not None  # a search has many runs in one directory
        self._on_each_disk(partial(recover, self.args.output_dir))
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self._settings, self._changes, self._told_changes = self._current_settings(), [], []
        if checkpoint is not None:
            self._check_fits(checkpoint)
        if not is_trial:
            self._enter_output_dir(checkpoint, is_asked=resume_from_checkpoint in NEWEST)
        if checkpoint is not None:
            self.accelerator.print(f"Resuming from {checkpoint}")
            self._compare_with(checkpoint)
            self._load_own_state(checkpoint)
        elif resume_from_checkpoint in NEWEST:
            self.accelerator.print(f"{self.args.output_dir} has no complete checkpoint: starting anew")
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def finished_at(self, resume_from_checkpoint: str | bool | None) -> int | None:
        """The step at which the run in `output_dir` has ended with its model saved there; None if it has to go on.

        Args:
            resume_from_checkpoint: as for `train`. None asks for a new run.
        """
        directory = Path(self.args.output_dir)
        if resume_from_checkpoint in NONE or not (directory / TRAINER_STATE_NAME).is_file():
            return None
        state, planned = read_state(directory), self._planned_steps()
        later = [path for path in of_run(directory, read_identity(directory)) if _step(path) > state.global_step]
        # One that ended early (early stopping, a stream that was read to its end) has done what it was asked for, too
        is_done = state.global_step >= planned or (state.max_steps == planned and not later)
        if resume_from_checkpoint not in NEWEST:
            asked = Path(str(resume_from_checkpoint))
            is_done = is_done and asked.resolve() == (directory / asked.name).resolve()
            is_done = is_done and asked.name == f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        return state.global_step if is_done and has_model(directory) else None

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _find_checkpoint(self, name: str | bool | None) -> Path | None:
        if name not in NEWEST:  # each process: from the Hub it comes to the disk of each machine
            found = find_checkpoint(name, self.args.output_dir)
        else:  # one decides
            found = None
            if self.is_world_process_zero():
                found = find_checkpoint(name, self.args.output_dir, self._takes_unlisted)
            found = self._of_the_first(found)
        return Path(found) if found is not None else None

    def _check_fits(self, checkpoint: Path) -> None:
        read_state(checkpoint)
        check_kind(checkpoint, type(self.args).__name__)
        check_adapter(checkpoint, self._adapter() or None)
        check_processes(checkpoint, self.is_deepspeed_enabled, self.accelerator.num_processes)
        check_shapes(checkpoint, self._saved_shapes())

    def _adapter(self) -> dict[str, Any]:
        return self.model.peft_config[self.model.active_adapters[0]].to_dict() if is_peft_model(self.model) else {}

    def _saved_shapes(self) -> dict[str, tuple[int, ...]]:
        infix = f".{self.model.active_adapters[0]}." if is_peft_model(self.model) else None
        # ZeRO-3 leaves an empty tensor, and the shape in this attribute
        shapes = {
            name: tuple(p.ds_shape if hasattr(p, "ds_shape") else p.shape) for name, p in self.model.named_parameters()
        }
        return {name.replace(infix, ".") if infix else name: shape for name, shape in shapes.items()}

    def _enter_output_dir(self, checkpoint: Path | None, is_asked: bool) -> None:
        """Name the run that begins or goes on, and move away what another one has left. Collective."""
        directory = Path(self.args.output_dir)
        config = self._model_config()
        base = Path(config._name_or_path) if config is not None and config._name_or_path else None
        if checkpoint is not None:
            enter: Callable[[], Moved | None] = partial(go_on, directory, checkpoint)
        else:
            start = start_again if is_asked else start_anew
            enter = partial(start, directory, self._of_the_first(new_name()), keep=base)
        if moved := self._on_each_disk(enter):
            names = ", ".join(moved.checkpoints) or "no checkpoint"
            self.accelerator.print(
                f"{directory} holds another run ({names}). This is a new one: all of the other is now in "
                f"{moved.folder}, and neither its checkpoints nor its logs are taken for this run's."
            )

    def _of_the_first(self, value: Any) -> Any:
        """The main process's value, on all."""
        [value] = broadcast_object_list([value]) if self.accelerator.num_processes > 1 else [value]
        return value

    def _on_each_disk(self, function: Callable[[], Any]) -> Any:
        """Call it on the main process, then once on each other machine, where a shared disk has the work done.

        Returns:
            On the main process, what it returned.
        """
        result = function() if self.is_world_process_zero() else None
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and not self.is_world_process_zero():
            function()
        self.accelerator.wait_for_everyone()
        return result

    # What has changed

    def _current_settings(self) -> dict[str, Any]:
        settings = settings_of(
            self.args, self._model_config(), self._adapter(), self.train_dataset, self.accelerator.num_processes
        )
        return {"config": type(self.args).__name__, **settings}

    def _model_config(self) -> PreTrainedConfig | None:
        has_config = isinstance(self.model, PreTrainedModel) or is_peft_model(self.model)
        return self.model.config if has_config else None

    def _compare_with(self, checkpoint: Path) -> None:
        told = read_manifest(checkpoint).get("changes")
        self._told_changes = [str(line) for line in told] if isinstance(told, list) else []
        self._changes = changes(settings_in(checkpoint), self._settings, checkpoint)
        step = read_state(checkpoint).global_step
        self._told_changes += [f"At step {step}, {change}" for change in self._changes]
        overruled = {change.name: change.before for change in self._changes if change.is_overruled}
        self._settings |= overruled
        if self._told_changes:
            fields = {name: value for name, value in overruled.items() if name in OF_THE_OPTIMIZER}
            self._resumed_with(fields, self._told_changes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._changes:
            return
        lines = [f"  {change}" for change in self._changes]
        scheduler = self.lr_scheduler
        has_other_schedule = any(change.name in OF_THE_SCHEDULE for change in self._changes)
        if has_other_schedule and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            # The optimizer's state brings the old schedule's rate: 0, where that has come to its end
            factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates
            lines.append(f"  the next step's learning rate, of the schedule as it is now: {rates[0]:g}")
        self.accelerator.print("\n".join(["Since that checkpoint was saved, this has changed:", *lines]))

    def _init_training_state(self, max_steps, *args, **kwargs):
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint's state brings its own
        return result

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
        untied = [name for name in load_result.missing_keys if id(parameters.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=untied))

    # Saving

    def _save_checkpoint(self, model, trial):
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, final = run_dir / UNFINISHED_DIR / name, run_dir / name
        with self._writing(unfinished):
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self._save_own_state(unfinished)
        if Path(self.state.best_model_checkpoint or "") == unfinished:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        self._publish(unfinished, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _writing(self, unfinished: Path) -> Iterator[None]:
        """What is saved in here goes to the directory of unfinished checkpoints. Nothing is left there by an error."""
        if self.is_local_process_zero():
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # what a killed run has left
        self.accelerator.wait_for_everyone()
        self._writes_checkpoint = True
        try:
            yield
        except Exception as error:
            error.add_note(f"Raised while {unfinished.name} was saved. Earlier checkpoints are as they were.")
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            raise
        finally:
            self._writes_checkpoint = False

    def _publish(self, unfinished: Path, final: Path) -> None:
        """Give the checkpoint its name, on every machine that has written a part of it. Collective."""
        identity = read_identity(self.args.output_dir)
        facts = {"run": identity and identity.run, "settings": self._settings, "changes": self._told_changes}
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(unfinished, final, facts)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and unfinished.exists():  # another machine with a disk of its own
            publish(unfinished, final, facts)

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED_DIR) if self._writes_checkpoint else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._writes_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
