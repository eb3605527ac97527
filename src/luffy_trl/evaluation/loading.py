"""From the command line's flags to a loaded model."""

import argparse
from typing import Any

import torch
from lm_eval.utils import simple_parse_args_string

from . import EvaluationError
from .backends import ADAPTER_ARGUMENTS, ReportsLengths, adapter_arguments, load_backend
from .model_files import check_model
from .templates import OWN


DEFAULT_BATCH_SIZE = {"hf": "8", "vllm": "auto"}

# Change how fast samples are made, not which: a run may go on with other ones
SPEED_ARGUMENTS = {
    "data_parallel_size", "device_map", "distributed_executor_backend", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "max_batch_size", "max_cpu_memory", "max_memory_per_gpu", "max_num_batched_tokens",
    "max_num_seqs", "offload_folder", "parallelize",
}  # fmt: skip
# In --model_args, they would go around what is checked and kept
OWN_FLAGS = {
    "pretrained": "--model", "batch_size": "--batch_size", "dtype": "--dtype", "device": "--device",
    "tensor_parallel_size": "--tensor_parallel_size", "seed": "--seed", "think_end_token": "--thought",
}  # fmt: skip


def parse_model_args(args: argparse.Namespace) -> dict[str, Any]:
    """`--model_args` as lm-eval reads it.

    Raises:
        EvaluationError: for an argument that has a flag of its own, or no value.
    """
    for part in filter(None, args.model_args.split(",")):
        key = part.split("=")[0].strip()
        if "=" not in part:
            raise EvaluationError(f"--model_args {part}: expected KEY=VALUE,KEY=VALUE.")
        if key in OWN_FLAGS:
            raise EvaluationError(f"--model_args {key}: use {OWN_FLAGS[key]}.")
    model_args = simple_parse_args_string(args.model_args)
    if args.adapter and ADAPTER_ARGUMENTS[args.backend] in model_args:
        raise EvaluationError("--adapter and an adapter in --model_args: give one of them.")
    return model_args


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's arguments of the model, beside those that have flags of their own.

    Raises:
        EvaluationError: if there is no such model or adapter, or an argument cannot be used.
    """
    model_args = parse_model_args(args)
    check_model(args.model, model_args)
    return model_args | (adapter_arguments(args.backend, args.adapter) if args.adapter else {})


def kept_arguments(model_args: dict[str, Any]) -> dict[str, str]:
    """Those of `--model_args` on which samples depend."""
    return {name: str(value) for name, value in sorted(model_args.items()) if name not in SPEED_ARGUMENTS}


def load_model(args: argparse.Namespace, model_args: dict[str, Any], images: bool) -> ReportsLengths:
    """
    Args:
        images: whether prompts have any.

    Raises:
        EvaluationError: if lm-eval's back end cannot load it, or it has no chat template where one is needed.
    """
    arguments: dict[str, Any] = {
        "pretrained": args.model,
        "dtype": args.dtype,
        "batch_size": args.batch_size or DEFAULT_BATCH_SIZE[args.backend],
    }
    if args.backend == "hf":
        arguments["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        arguments |= {"tensor_parallel_size": args.tensor_parallel_size, "seed": args.seed}
    if args.dataset_name is not None:  # prompts are rendered before, and lm-eval takes it with `think_end_token` alone
        model_args = {name: value for name, value in model_args.items() if name != "enable_thinking"}
    try:
        backend = load_backend(args.backend, arguments | model_args, images)
    except (OSError, ValueError, TypeError, ImportError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"--model {args.model} could not be loaded by lm-eval's {args.backend}: {reason}"
        ) from error
    if args.dataset_name is None and args.template == OWN and not backend.tokenizer.chat_template:
        raise EvaluationError(
            f"{args.model} has no chat template: choose --template plain, qwen_math or r1_zero, or add one with "
            "luffy-trl prepare-model."
        )
    return backend
