"""WholeCheckpointMixin: checkpoints that are whole or not there, and the newest of them to resume from."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import NEWEST, UNFINISHED_DIR, find_checkpoint, publish


class WholeCheckpointMixin(Trainer):
    """
    A trainer whose checkpoints are written beside the others and get their name when everything is on disk.

    What differs from [`~transformers.Trainer`], override by override:

    - `train`: `resume_from_checkpoint="auto"` takes the newest whole checkpoint, if there is one;
    - `_save_checkpoint`: writes into a directory of its own, then moves it, then pushes and rotates;
    - `_get_output_dir`: that directory, while a checkpoint is written;
    - `_push_from_checkpoint`: nothing, until the checkpoint has its name.

    A subclass that keeps a state of its own in checkpoints overrides `_save_own_state` and `_load_own_state`.
    """

    def __init__(self, *args, **kwargs):
        self._writes_checkpoint = False
        super().__init__(*args, **kwargs)

    def _save_own_state(self, checkpoint: Path) -> None:
        """Write what this process needs to go on, beside the trainer's own files. Each process calls it."""

    def _load_own_state(self, checkpoint: Path) -> None:
        """Go on from what `_save_own_state` wrote, perhaps with another number of processes."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's, and with `resume_from_checkpoint="auto"` from the newest complete checkpoint, if there is one."""
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self.accelerator.print(f"Resuming from {checkpoint}")
            self._load_own_state(Path(checkpoint))
        elif resume_from_checkpoint in NEWEST:
            self.accelerator.print(f"{self.args.output_dir} has no complete checkpoint: starting anew")
        return super().train(checkpoint, *args, **kwargs)

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
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and unfinished.exists():  # another machine with a disk of its own
            publish(unfinished, final)

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED_DIR) if self._writes_checkpoint else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._writes_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)
