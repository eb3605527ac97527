"""EvaluationSetsMixin: a GRPOTrainer that logs the metrics of each evaluation set under the set's name."""

from collections import defaultdict

from trl import GRPOTrainer


class EvaluationSetsMixin(GRPOTrainer):
    """
    GRPOTrainer whose `eval_dataset` of several sets gives `eval_NAME_reward` and so on, as it gives `eval_NAME_loss`.

    What differs from [`~trl.GRPOTrainer`], which calls the rewards of every set `eval_reward`:

    - `evaluate`: nothing; keeps what the other metrics of the evaluation under way begin with;
    - `log`: puts the set's name into TRL's metrics of an evaluation.
    """

    _evaluated_as = "eval"

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        before, self._evaluated_as = self._evaluated_as, metric_key_prefix
        try:  # of several sets Trainer calls this method once more for each
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated_as = before

    def log(self, logs, start_time=None):
        name = self._evaluated_as.removeprefix("eval").removeprefix("_")
        if name and not self.model.training:
            # TRL puts "eval_" before them
            named = {f"{name}_{key}": values for key, values in self._metrics["eval"].items()}
            self._metrics["eval"] = defaultdict(list, named)
        super().log(logs, start_time)
