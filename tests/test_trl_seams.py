"""The parts of TRL that the trainer overrides or reads: a change in any of them should fail here, by name."""

import inspect
import socket
import subprocess
import sys

import pytest
import requests
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient

from luffy_trl import SUPPORTED_TRL, LuffyTrainer
from luffy_trl.objective import LOSS_TYPES
from luffy_trl.runs.stopping import bound_waiting


SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": [
        "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
    ],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "log": ["self", "logs", "start_time"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_generate": ["self", "prompts"],
    "_tokenize_prompts": ["self", "prompts"],
    "_tool_call_loop": [
        "self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images", "multimodal_fields",
    ],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_log_completion_extra": ["self", "column", "values"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == SIGNATURES[name]


def test_the_forward_pass_returns_what_is_kept():
    method = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    assert list(method.parameters)[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert "compute_entropy" in method.parameters
    assert str(method.return_annotation).count("|") == 2  # logps, entropies | None, aux loss | None


def test_the_constructor_takes_what_is_checked():
    parameters = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert parameters[:6] == ["self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset"]
    assert {"processing_class", "tools", "rollout_func", "environment_factory"} <= set(parameters)


@pytest.mark.parametrize(
    ("method", "fragments"),
    [
        # what `_rollouts_alone` relies on: the mask of tokens that are not the policy's, and broadcastable advantages
        ("_compute_loss", ['inputs["tool_mask"]', "advantages.dim() == 1", 'inputs.get("old_per_token_logps")']),
        ("_compute_loss", ["self.current_gradient_accumulation_steps / self.args.steps_per_generation"]),
        # what `_generate_and_score_completions` relies on: rows in order, and keys of the batch
        ("_generate_and_score_completions", ['"completion_mask": completion_mask', '"advantages": advantages']),
        ("_generate_and_score_completions", ["num_items_in_batch = self.accelerator.gather(loss_mask.sum()).sum()"]),
        # what evaluation sets' names rely on
        ("log", ['metrics = {f"eval_{key}": val for key, val in metrics.items()}', "self._metrics[mode].clear()"]),
        # what `TrajectoriesMixin` relies on: calls are read off a completion's first message, by row; order of results
        ("_tool_call_loop", ['completion[0].get("tool_calls")', "self._sync_tool_dicts[idx_with_tool]"]),
        (
            "_tool_call_loop",
            ["self._generate_single_turn(", "return tool_mask, completions, completion_ids, logprobs"],
        ),
        ("_generate", ["return prompt_ids, completion_ids, tool_mask, completions, logprobs"]),
        ("_tokenize_prompts", ["tools=self.tools or None"]),
        # and with images: prompts are whole when they are rendered, each with its row's environment
        ("_tokenize_prompts", ["zip(prompts, self._batch_environments, strict=True)"]),
        ("_generate_and_score_completions", [") = self._generate(prompts)"]),
        ("_tool_call_loop", ["split_pixel_values_by_grid(multimodal_fields)"]),
        ("log", ['strip_images_from_messages(messages) for messages in self._logs["completion"]']),
        # what a budget of tokens relies on: the buffer, the count of steps, and what divides a micro-batch's loss
        ("_prepare_inputs", ["inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]"]),
        ("training_step", ["super().training_step(model, inputs, num_items_in_batch)", "self._step += 1"]),
        ("_compute_loss", ["normalizer = self.current_gradient_accumulation_steps if mode ==", "size(0) * self.max_"]),
        # what reading metrics late relies on
        ("_compute_loss", ["nanmin(gathered_low_clip).item()", "nanmax(gathered_high_clip).item()"]),
        # NaN sampling log-probs are an importance ratio of 1
        ("_generate_and_score_completions", ["torch.nan_to_num(per_token_logps_diff, nan=0.0)"]),
    ],
)
def test_source_that_the_overrides_rely_on(method, fragments):
    source = inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, method)))
    for fragment in fragments:
        assert fragment in source


def test_every_loss_type_of_trl_is_known():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    aggregation = source[
        source.index('mode = "train" if self.model.training else "eval"') : source.index("Entropy bonus")
    ]
    for loss_type in LOSS_TYPES:
        assert f'"{loss_type}"' in aggregation
    assert aggregation.count("self.loss_type") == 6  # five branches and the error: a seventh is a new loss type


def test_only_the_seams_are_overridden():
    overridden = {
        name for name in vars(LuffyTrainer) if callable(getattr(LuffyTrainer, name)) and name in dir(GRPOTrainer)
    }
    assert overridden == {
        "__init__", "_generate_and_score_completions", "_generate_single_turn", "_calculate_rewards",
        "_compute_loss", "_get_per_token_logps_and_entropies", "log",
    }  # fmt: skip


@pytest.mark.parametrize("version", ["1.15.3", "1.17.0", "2.0.0"])
def test_another_trl_is_refused_in_one_sentence(version):
    assert version not in SUPPORTED_TRL
    code = (
        "import importlib.metadata as m; real = m.version\n"
        f"m.version = lambda name: {version!r} if name == 'trl' else real(name)\n"
        "import luffy_trl"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: luffy_trl")
    assert f"works with trl {SUPPORTED_TRL}, but trl {version} is installed" in last_line


def test_a_server_that_never_answers_is_given_up():
    assert "self.session = requests.Session()" in inspect.getsource(VLLMClient.__init__)
    session = requests.Session()
    bound_waiting(session, 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,  # takes connections, says nothing
        pytest.raises(requests.exceptions.ReadTimeout, match=r"127\.0\.0\.1"),
    ):
        session.post(f"http://127.0.0.1:{server.getsockname()[1]}/generate", json={})
