"""Weights after three optimizer steps of four micro-batches, by plain torch and through Accelerate and DeepSpeed.

Prints {"ZeRO STAGE, OFFLOAD": largest difference to plain torch} as JSON. One process, on a CPU.
"""

import json
import os
import sys


os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ["MASTER_PORT"] = sys.argv[1]

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


MICRO_BATCH, ACCUMULATED, STEPS = 2, 4, 3


def model_and_data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(MICRO_BATCH * ACCUMULATED * STEPS, 8)
    return model, x, x.sum(1, keepdim=True)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def by_torch() -> torch.Tensor:
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = MICRO_BATCH * ACCUMULATED
    for start in range(0, len(x), rows):
        optimizer.zero_grad()
        (model(x[start : start + rows]) - y[start : start + rows]).square().mean().backward()
        optimizer.step()
    return flat(model)


def by_deepspeed(stage: int, offload: str) -> torch.Tensor:
    AcceleratorState._reset_state(True)
    config = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}},
        "gradient_accumulation_steps": ACCUMULATED,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATED)
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=MICRO_BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x_rows, y_rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(x_rows) - y_rows).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


if __name__ == "__main__":
    expected = by_torch()
    differences = {
        f"{stage}, {offload}": (by_deepspeed(stage, offload) - expected).abs().max().item()
        for stage in (1, 2)
        for offload in ("none", "cpu")
    }
    print(json.dumps(differences))
