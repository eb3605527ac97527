"""What only a GPU can show, as functions of the device: the tests of a CPU run them too, at tiny size."""

import tempfile
import time
from typing import Any

import torch
import update_flops
from recorded import Workload, forward_and_backward, make_config, make_model, make_trainer, synchronize
from transformers import Qwen2ForCausalLM
from trl.trainer.utils import get_peak_flops


def gradient(
    name: str, attention: str, device: str, dtype: torch.dtype, work: Workload, shape: dict[str, int]
) -> torch.Tensor:
    """All gradients of one optimizer step with a configuration, in one row of float64."""
    model = make_model(device, attention, shape, dtype)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(name, work, model, directory, bf16=False, gradient_checkpointing=False)
        forward_and_backward(trainer)
        assert name in ("TRL", "trimmed") or trainer._packs, f"{attention} did not pack"
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the expected gradient's length."""
    return ((found - expected).norm() / expected.norm()).item()


def packed_against_padded(
    name: str, attention: str, device: str, dtype: torch.dtype, work: Workload, shape: dict[str, int]
) -> dict[str, float]:
    """How far a packed gradient is from the padded one in float32, and how far padded ones are in this precision."""
    exact = gradient("trimmed", "sdpa", device, torch.float32, work, shape)
    padded = gradient("trimmed", "sdpa", device, dtype, work, shape)
    packed = gradient(name, attention, device, dtype, work, shape)
    return {"packed": distance(packed, exact), "padded": distance(padded, exact)}


def measured_against_counted(
    name: str, attention: str, device: str, work: Workload, shape: dict[str, int], steps: int = 2
) -> dict[str, Any]:
    """Seconds and peak memory of forward and backward passes, beside what `update_flops.py` counts for them."""
    on_gpu = device == "cuda"
    model = make_model(device, attention, shape, torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(name, work, model, directory, bf16=False, gradient_checkpointing=True)
        forward_and_backward(trainer)  # a warm-up, and gradients are there from now on
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            synchronize(trainer)
            start = time.perf_counter()
            forward_and_backward(trainer)
            synchronize(trainer)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
    flops, counted_peak = counted(name, attention, work, shape)
    best = get_peak_flops(torch.cuda.get_device_name(0), "bf16") if on_gpu else None
    return {
        "attention": attention,
        "seconds": min(seconds),
        "peak_memory_bytes": peak,
        "counted_flops": flops,
        "counted_peak_memory_bytes": counted_peak,
        "mfu": flops / min(seconds) / best if best else None,
    }


def counted(name: str, attention: str, work: Workload, shape: dict[str, int]) -> tuple[int, int]:
    """FLOPs and peak memory of one step, of all layers."""
    one, two = (
        update_flops.count(
            make_config({**shape, "num_hidden_layers": layers}), Qwen2ForCausalLM, work, name, attention=attention
        )
        for layers in (1, 2)
    )
    layers = shape["num_hidden_layers"]
    peaks = zip(one.peaks, two.peaks, strict=True)
    return (
        update_flops.of_all_layers(one.flops, two.flops, layers),
        max(update_flops.of_all_layers(*peak, layers) for peak in peaks),
    )
