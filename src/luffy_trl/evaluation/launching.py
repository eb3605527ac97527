"""One of the processes that `torchrun` or `accelerate launch` start: on GPUs of its own, and waiting for no other."""

import os

import torch

from . import EvaluationError


# By these torch and accelerate know of the other processes, and would wait for them
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
VISIBLE = "CUDA_VISIBLE_DEVICES"


def stand_alone(device: str | None, gpus: int) -> int:
    """Take this process's GPUs, and leave the group: the processes share a directory of samples, and nothing else.

    To be called before CUDA is used.

    Args:
        device: of the command line.
        gpus: how many this process needs, where there are any.

    Returns:
        How many processes were launched together.

    Raises:
        EvaluationError: if there are too few GPUs for all processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return 1
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    for name in LAUNCHED:
        os.environ.pop(name, None)
    count = torch.cuda.device_count()  # unlike `is_available`, it does not begin to use CUDA
    if device == "cpu" or count == 0:
        return launched
    if device is not None:
        raise EvaluationError(
            f"--device {device}: processes that are launched together take a GPU each. Leave it out."
        )
    if count < processes * gpus:
        raise EvaluationError(
            f"{processes} processes need {processes * gpus} GPUs, and {count} are there. Launch fewer processes."
        )
    visible = os.environ.get(VISIBLE, ",".join(map(str, range(count)))).split(",")
    os.environ[VISIBLE] = ",".join(visible[local * gpus : (local + 1) * gpus])
    return launched
