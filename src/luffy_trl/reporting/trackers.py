"""The report's pictures, for the trackers of `report_to` that take pictures: Trackio, W&B and TensorBoard.

Curves, and the table of completions that `log_completions` keeps, go there by themselves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from .logs import STATE, State, run_of_state
from .panels import filled_panels
from .pictures import write_pictures


PICTURE_NAME = "report/{}"  # of a picture, beside the metrics


class TrackerPictures(TrainerCallback):
    """Sends each panel of the run's report as a picture, with the last line of a training's log.

    Args:
        trainer: that it is added to.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        # the last line of a training; `on_train_end` would find trackers closed
        if not state.is_world_process_zero or "train_runtime" not in (logs or {}):
            return
        senders = [SENDERS[tracker] for tracker in args.report_to if tracker in SENDERS]
        with TemporaryDirectory() as folder:
            pictures = draw(state, Path(folder)) if senders else []
            for send in senders if pictures else []:
                send(pictures, self.trainer)


def draw(state: TrainerState, directory: Path) -> list[Path]:
    """The panels of the report of this run alone, as PNGs."""
    logged = State(directory / STATE, None, state.global_step, state.max_steps, state.log_history)
    run = run_of_state(logged, directory, "run")
    return write_pictures(directory, [run], filled_panels([run]))


def _to_trackio(pictures: Sequence[Path], trainer: Trainer) -> None:
    import trackio

    trackio.log({PICTURE_NAME.format(path.stem): trackio.Image(path) for path in pictures})


def _to_wandb(pictures: Sequence[Path], trainer: Trainer) -> None:
    import wandb

    if wandb.run is not None:  # WANDB_MODE=disabled
        wandb.log({PICTURE_NAME.format(path.stem): wandb.Image(str(path)) for path in pictures})


def _to_tensorboard(pictures: Sequence[Path], trainer: Trainer) -> None:
    from matplotlib.image import imread

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for path in pictures:
                name = PICTURE_NAME.format(path.stem)
                callback.tb_writer.add_image(name, imread(path), trainer.state.global_step, dataformats="HWC")


SENDERS: dict[str, Callable[[Sequence[Path], Trainer], None]] = {
    "trackio": _to_trackio,
    "wandb": _to_wandb,
    "tensorboard": _to_tensorboard,
}
