"""Launched by test_hub.py: real trainers, and the real client, against local Hubs that fail.

A process of its own, because `huggingface_hub` reads HF_ENDPOINT when it is imported. It prints one line of JSON per
case; test_hub.py says what must be in it.
"""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .hub_server import PUSH_ENDPOINTS, TOKEN, HubServer


FAULTS = {
    "429": {"status": 429},
    "429 with Retry-After": {"status": 429, "retry_after": 0},
    "500": {"status": 500},
    "401": {"status": 401},
    "403": {"status": 403},
    "dropped": {"status": None},
    "slow": {"delay": 0.5},
}
# Where the Hub's own client tries again, for up to 23 s: in a training run, only faults that it does not try again
PATIENT = ("preupload", "batch", "put", "verify")


def report(**result) -> None:
    print("CASE " + json.dumps(result), flush=True)


def weights(content: bytes) -> list:
    """Comparable content of a safetensors file."""
    from safetensors.numpy import load

    return sorted((name, tensor.tobytes()) for name, tensor in load(content).items())


# Every fault at every endpoint, without training


def push_with_fault(output_dir: Path, endpoint: str, name: str) -> dict:
    from huggingface_hub import HfApi

    from luffy_trl.hub.queue import PushQueue, what_is_missing
    from luffy_trl.hub.upload import Push

    directory = output_dir.parent / f"{endpoint}-{name}"
    shutil.copytree(output_dir, directory)
    with HubServer() as hub:
        hub.fault(endpoint, **FAULTS[name])
        pushes = PushQueue(directory, HfApi(endpoint=hub.url, token=TOKEN), retry_seconds=0)
        push = Push(".", "model", revision="dev")
        pushes.add(push)
        pushes.finish()
        result = {"kind": "push", "endpoint": endpoint, "fault": name, "missing": what_is_missing(directory)}
        hub.faults.clear()
        later = PushQueue(directory, HfApi(endpoint=hub.url, token=TOKEN), retry_seconds=0)  # from the record alone
        later.retry()
        later.finish()
        pushed = hub.model("model").at("dev")["model.safetensors"]
        return result | {
            "same": weights(pushed) == weights((output_dir / "model.safetensors").read_bytes()),
            "missing_later": what_is_missing(directory),
        }


def every_fault(output_dir: Path) -> None:
    """All at once: most of the time is waiting."""
    cases = [(endpoint, name) for endpoint in PUSH_ENDPOINTS for name in FAULTS]
    with ThreadPoolExecutor(len(cases)) as pool:
        for result in pool.map(lambda case: push_with_fault(output_dir, *case), cases):
            report(**result)


# Training runs


def train(model_dir: str, output_dir: Path, **options) -> dict:
    """Two steps with a checkpoint each, and the final push; what came of it."""
    from transformers import AutoTokenizer

    from luffy_trl import LuffyConfig, LuffyTrainer

    from .run_two_processes import dataset, letters_reward

    args = LuffyConfig(
        output_dir=str(output_dir), max_steps=2, save_steps=1, num_generations=4, per_device_train_batch_size=8,
        max_completion_length=16, logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, push_to_hub=True, **options,
    )  # fmt: skip
    trainer = LuffyTrainer(
        model_dir, letters_reward, args, train_dataset=dataset([True] * 8),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )  # fmt: skip
    trainer.train()
    commit = trainer.push_to_hub()
    record = json.loads((output_dir / "_hub.json").read_text())
    return {
        "step": trainer.state.global_step,
        "committed": commit is not None,
        "missing": [[push["source"], push["revision"], why] for push, why in record["missing"]],
        "whole": all((output_dir / name / "model.safetensors").is_file() for name in LOCAL.values()),
        "held": [path.name for path in output_dir.glob("_push-*")],
    }


# branch -> where its model lies locally, after `train` with hub_checkpoint_revisions
LOCAL = {"main": ".", "step-1": "checkpoint-1", "step-2": "checkpoint-2"}


def push_later(output_dir: Path, *flags: str) -> int:
    from luffy_trl.commands.cli import main

    try:
        main(["push", str(output_dir), "--retry_seconds", "0", *flags])
    except SystemExit as exit_:
        print(exit_.code)
        return 1
    return 0


def is_pushed(hub: HubServer, output_dir: Path) -> bool:
    repo = hub.model(output_dir.name)
    return all(
        weights(repo.at(branch)["model.safetensors"])
        == weights((output_dir / name / "model.safetensors").read_bytes())
        for branch, name in LOCAL.items()
    )


def runs_with_faults(hub: HubServer, model_dir: str, directory: Path) -> None:
    names = ("500", "dropped", "429")
    for i, endpoint in enumerate(PUSH_ENDPOINTS):
        name = "403" if endpoint in PATIENT else names[i % len(names)]
        hub.fault(endpoint, **FAULTS[name])
        # seeds: other weights each time, or the Hub would have them already
        options = {"hub_checkpoint_revisions": True, "hub_retry_seconds": 0, "seed": i}
        output_dir = directory / f"run-{i}"  # the client takes a repository named "commit" for a part of its protocol
        result = train(model_dir, output_dir, **options)
        hub.faults.clear()
        result |= {"status": push_later(output_dir), "pushed": is_pushed(hub, output_dir)}
        report(kind="run", endpoint=endpoint, fault=name, **result)


def run_that_recovers(hub: HubServer, model_dir: str, directory: Path) -> None:
    hub.fault("create", status=503, times=1)
    hub.fault("preupload", times=1)
    hub.fault("commit", status=429, retry_after=1, times=1)
    hub.fault("put", status=500, times=1)
    result = train(model_dir, directory / "recovers", hub_checkpoint_revisions=True, hub_retry_seconds=60)
    left = [max(fault.times, 0) for fault in hub.faults.values()]
    hub.faults.clear()
    report(kind="recovers", faults_left=left, pushed=is_pushed(hub, directory / "recovers"), **result)


def load_again(hub: HubServer, directory: Path) -> None:
    """What was pushed is a model like any other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "recovers"
    ids = AutoTokenizer.from_pretrained(f"tester/{name}")("Da:bc", return_tensors="pt")["input_ids"]
    difference = 0.0
    for branch, source in LOCAL.items():
        remote = AutoModelForCausalLM.from_pretrained(f"tester/{name}", revision=branch)
        local = AutoModelForCausalLM.from_pretrained(directory / name / source)
        difference = max(difference, (remote(ids).logits - local(ids).logits).abs().max().item())
    report(kind="loads", difference=difference, files={b: sorted(hub.model(name).at(b)) for b in LOCAL})


def main(model_dir: str, directory: str) -> None:
    with HubServer() as hub:
        os.environ.update(hub.environment())
        run_that_recovers(hub, model_dir, Path(directory))
        load_again(hub, Path(directory))
        runs_with_faults(hub, model_dir, Path(directory))
        every_fault(Path(directory) / "recovers")


if __name__ == "__main__":
    main(*sys.argv[1:])
