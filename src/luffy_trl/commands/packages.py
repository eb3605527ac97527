"""Packages that some options need and that a base install does not have, looked for before anything is loaded."""

import difflib
import os
from collections.abc import Iterator
from importlib.util import find_spec

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, SFTConfig

from ..config import LuffyConfig


# Beginnings of optimizers' names, and the module that has them
OPTIMIZER_PACKAGES = {
    "adamw_bnb": "bitsandbytes", "adamw_8bit": "bitsandbytes", "ademamix": "bitsandbytes", "lion": "bitsandbytes",
    "paged": "bitsandbytes", "rmsprop_bnb": "bitsandbytes", "galore": "galore_torch", "apollo": "apollo_torch",
    "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw", "schedule_free": "schedulefree",
    "stable_adamw": "optimi", "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao",
}  # fmt: skip
# Of reports, where the module has another name, or there are two
REPORT_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
REPORTS_WITHOUT_PACKAGE = ("kubeflow",)
# What pip calls a module, where that is another name, or one of this package's extras, which know the version
PIP_NAMES = {
    "azureml": "azureml-mlflow", "bitsandbytes": "luffy_trl[peft]", "deepspeed": "luffy_trl[deepspeed]",
    "kernels": "luffy_trl[kernels]", "optimi": "torch-optimi", "peft": "luffy_trl[peft]", "vllm": "luffy_trl[vllm]",
}  # fmt: skip


def check_packages(training_args: LuffyConfig | SFTConfig, model_args: ModelConfig) -> None:
    """Raises ValueError naming the option, the package that it needs, and how to get it."""
    for option, modules in _needed(training_args, model_args):
        check_package(option, *modules)


def check_package(option: str, *modules: str) -> None:
    """Raises ValueError if none of the modules, which do the same, is there."""
    if any(find_spec(module) for module in modules):
        return
    name = PIP_NAMES.get(modules[0], modules[0].replace("_", "-"))
    raise ValueError(
        f"{option} needs the package {modules[0]}, which is not installed here: pip install '{name}', or leave the "
        "option out."
    )


def check_launcher() -> None:
    """Raises ValueError if the process was launched for DeepSpeed, by a configuration of Accelerate, without it."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        check_package("distributed_type: DEEPSPEED, of the configuration for accelerate launch,", "deepspeed")


def _needed(training_args: LuffyConfig | SFTConfig, model_args: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if model_args.use_peft:
        yield "--use_peft", ("peft",)
    if "/" in (model_args.attn_implementation or ""):
        yield f"--attn_implementation {model_args.attn_implementation}", ("kernels",)
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, option):
            yield f"--{option}", ("bitsandbytes",)
    if isinstance(training_args, LuffyConfig) and training_args.use_vllm:
        yield "--use_vllm", ("vllm",)
    if training_args.deepspeed:
        yield "--deepspeed", ("deepspeed",)
    if training_args.use_liger_kernel:
        yield "--use_liger_kernel", ("liger_kernel",)
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    for beginning, module in OPTIMIZER_PACKAGES.items():
        if optimizer.startswith(beginning):
            yield f"--optim {optimizer}", (module,)
    reports = training_args.report_to
    for report in [reports] if isinstance(reports, str) else reports or []:
        if report not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(report), INTEGRATION_TO_CALLBACK, n=1)
            raise ValueError(
                f"--report_to {report} is not one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}"
                + (f" (did you mean {near[0]}?)." if near else ".")
            )
        if report not in REPORTS_WITHOUT_PACKAGE:
            yield f"--report_to {report}", REPORT_PACKAGES.get(report, (report,))
