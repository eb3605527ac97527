"""A line a log, in place of everything."""

import re

from luffy_trl.reporting.lines import print_one_line


def test_a_training_prints_a_line_of_the_chosen_metrics_and_nothing_else(make_trainer, capsys):
    trainer = make_trainer(max_steps=4, disable_tqdm=False)
    print_one_line(trainer, ("off_policy/reward", "on_policy/reward", "no/such"), every=2, label="mine ")
    capsys.readouterr()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    logged = {line["step"]: line for line in trainer.state.log_history if "on_policy/reward" in line}
    assert lines == [
        f"mine step   {step}   off_policy/reward {logged[step]['off_policy/reward']:.3f}   "
        f"on_policy/reward {logged[step]['on_policy/reward']:.3f}"
        for step in (2, 4)
    ]


def test_a_metric_that_is_a_mean_over_nothing_is_left_out(make_trainer, capsys):
    trainer = make_trainer(max_steps=1, num_demonstrations=0)
    print_one_line(trainer)
    trainer.train()
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step   1   on_policy/reward \d\.\d{3}   on_policy/entropy \d\.\d{3}", line)
