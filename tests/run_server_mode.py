"""Launched by test_distributed.py on two processes: vLLM's server mode, with a stand-in for TRL's client.

TRL's own code gathers the prompts, asks the client on the main process, and hands each process its slice. The stand-in
answers with tokens of the prompt, so that every process can tell whether it got its own completions.
"""

import json
import sys
from pathlib import Path

from run_two_processes import leave, make_trainer
from trl.generation.vllm_generation import VLLMGeneration


class Client:
    """Answers a prompt with its second and third token (the walk's start and first shift) and EOS."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, n, **sampling):
        assert n == 1
        self.asked.append(len(prompts))
        completion_ids = [[*ids[1:3], 1] for ids in prompts]
        logprobs = [[[-0.5]] * 3 for _ in prompts]
        return {"prompt_ids": prompts, "completion_ids": completion_ids, "logprobs": logprobs}


def main(model_dir: str, output_dir: str) -> None:
    trainer = make_trainer(model_dir, output_dir, rows=16)
    generation = VLLMGeneration.__new__(VLLMGeneration)  # without connecting to a server
    vars(generation).update(
        mode="server", accelerator=trainer.accelerator, vllm_client=Client(), sync_weights=lambda: None,
        max_completion_length=16, logprobs=0, structured_outputs_regex=None, generation_kwargs={},
        temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
    )  # fmt: skip
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, generation, -1

    score, own = trainer._generate_and_score_completions, []

    def checked(inputs):
        batch = score(inputs)
        rollouts = ~batch["off_policy_mask"].any(1)
        answers, prompts = batch["completion_ids"][rollouts, :2], batch["prompt_ids"][rollouts, 1:3]
        own.append([int(rollouts.sum()), int((answers == prompts).all(1).sum())])
        return batch

    trainer._generate_and_score_completions = checked
    trainer.train()
    record = {"own": own, "asked": generation.vllm_client.asked}
    Path(output_dir, f"process{trainer.accelerator.process_index}.json").write_text(json.dumps(record))
    leave(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
