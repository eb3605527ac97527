"""A line of a few metrics a log, where Transformers shows a table, or a dictionary, of everything."""

from collections.abc import Sequence

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK


MAIN_METRICS = ("on_policy/reward", "off_policy/prob", "on_policy/entropy")


class OneLine(TrainerCallback):
    """Prints `step 40   on_policy/reward 0.989   ...` with each log of the main process that has one of the metrics.

    Args:
        metrics: which, in this order.
        every: only at steps that are multiples of it.
        label: what the lines begin with, such as the name of one run of several.
    """

    def __init__(self, metrics: Sequence[str] = MAIN_METRICS, every: int = 1, label: str = ""):
        self.metrics, self.every, self.label = metrics, every, label

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{name} {logs[name]:.3f}" for name in self.metrics if (logs or {}).get(name) is not None]
        if shown and state.is_world_process_zero and state.global_step % self.every == 0:
            print("   ".join([f"{self.label}step {state.global_step:>3}", *shown]), flush=True)


def print_one_line(trainer: Trainer, metrics: Sequence[str] = MAIN_METRICS, every: int = 1, label: str = "") -> None:
    """Have the trainer print a line a log as [`OneLine`] does, in a notebook and in a terminal, and nothing else."""
    for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    trainer.add_callback(OneLine(metrics, every, label))
