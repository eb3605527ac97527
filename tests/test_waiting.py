"""Nothing in a micro-batch reads the device: each such read is counted, on a CPU as it would be on a GPU."""

import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import nanmax, nanmin

from luffy_trl.padding.budget import Due
from luffy_trl.padding.waiting import nan_max, nan_min

from .test_padding import SHAPE, make_rows


aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.tensor, torch.as_tensor}


class Waits(TorchDispatchMode):
    """Names of operators that need a value on the host: a scalar, or how many elements a mask has."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else []
        if func in READS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Names of functions that copy between host and device, and wait for it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES and not (func is torch.as_tensor and isinstance(args[0], torch.Tensor)):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits_of_a_micro_batch(trainer) -> list[str]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    torch.manual_seed(0)
    trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(4)])
    due = trainer._buffered_inputs[1]
    batch = Due(due[:1]) if isinstance(due, Due) else due
    with Copies() as copies, Waits() as waits:
        trainer.compute_loss(trainer.model, batch).backward()
    return waits.found + copies.found


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
@pytest.mark.parametrize("options", [{}, {"num_demonstrations": 0}, {"temperature": 0.7}])
def test_a_micro_batch_waits_for_nothing(make_trainer, loss_type, options):
    beta = 0.0 if loss_type == "bnpo" else 0.1
    trainer = make_trainer(make_rows(), tokens_per_micro_batch=150, loss_type=loss_type, beta=beta, **SHAPE, **options)
    # TRL makes vespo's constants on the host
    assert waits_of_a_micro_batch(trainer) == (["tensor"] if loss_type == "vespo" else [])


def test_what_waits_is_found(make_trainer, monkeypatch):
    trainer = make_trainer(make_rows(), trim_padding=False, **SHAPE)
    monkeypatch.setattr(trainer, "use_adaptive_entropy", True)  # which goes on from a number, as TRL's metrics do
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", False)
    found = waits_of_a_micro_batch(trainer)
    assert found.count("aten._local_scalar_dense.default") >= 5


def test_what_is_logged_is_the_same(make_trainer):
    def logged(**options):
        torch.manual_seed(0)
        trainer = make_trainer(make_rows(), max_steps=3, logging_steps=2, **SHAPE | {"beta": 0.1}, **options)
        if options:
            trainer.use_adaptive_entropy, trainer._entropy_bonus_enabled = True, False
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    late, at_once = logged(), logged(max_grad_norm=1.0)
    for line, expected in zip(late, at_once, strict=True):
        for key, value in expected.items():
            if "time" not in key:
                assert line[key] == pytest.approx(value, rel=1e-6), key
                assert type(line[key]) is type(value), key


@pytest.mark.parametrize("values", [[1.0, math.nan, -2.0], [math.nan], [3.0], [math.inf, -math.inf, math.nan]])
def test_the_least_and_the_greatest_are_trls(values):
    values = torch.tensor(values)
    torch.testing.assert_close(nan_min(values), nanmin(values), equal_nan=True)
    torch.testing.assert_close(nan_max(values), nanmax(values), equal_nan=True)
