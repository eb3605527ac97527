"""Messages of libraries that tell a user of the commands nothing, each by its logger and its beginning. No others."""

import logging


# logger: beginning of the message, and why nothing is lost with it
NOISE = {
    # a faster CPU kernel for 4-bit weights that needs another package; logged at import, 4 bit or not
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # that there is no GPU; training says so itself, with what to do (--use_cpu)
    "DeepSpeed": "Setting accelerator to CPU.",
}


def no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE[record.name])


def quiet_libraries() -> None:
    """To be called before anything heavy is imported: some of it is logged by imports."""
    for name in NOISE:
        logging.getLogger(name).addFilter(no_noise)


def quiet_progress_bars() -> None:
    """No bars for reading and writing a model's shards. Those of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()
