"""The replay buffer and the other sources of demonstrations."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from luffy_trl.demonstrations.encoding import Demonstration
from luffy_trl.demonstrations.replay import ReplayBuffer, Trajectory
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .run_two_processes import letters_reward
from .test_distributed import CONFIGS, launch
from .test_trainer_loss import GAMMA, GROUP, MAX_LENGTH, logps_and_entropies, on_policy_token_losses, perturb


def trajectory(row: int, entropy: float = 1.0, length: int = 3, first: int = 5) -> Trajectory:
    return Trajectory.of(row, np.arange(first, first + length), -np.linspace(0.1, 2, length), entropy)


def filled(success: dict[int, int], capacity: int = 100, group_size: int = 8) -> ReplayBuffer:
    """A buffer that has started, with a trajectory for each prompt: row -> how many of 8 rollouts were solved."""
    buffer = ReplayBuffer(capacity, start=0.0, group_size=group_size)
    buffer.record(success, success.values(), [8] * len(success))
    for row in success:
        buffer.add(trajectory(row))
    return buffer


def contents(buffer: ReplayBuffer):
    numbers = list(buffer._trajectories.values())
    order = {row: [e for e, _ in entries] for row, entries in sorted(buffer._numbers.items())}
    return numbers, order, buffer.success, buffer.retired, buffer.started


# Selection


def test_buckets_are_drawn_by_a_normal_density_around_one_half():
    success = {0: 0, 1: 1, 2: 1, 3: 4, 4: 7}
    buffer = filled(success)
    random.seed(0)
    draws = 20_000
    counts = Counter(buffer.sample(1)[0] for _ in range(draws))
    normal = torch.distributions.Normal(0.5, 1.0)
    density = {solved: normal.log_prob(torch.tensor(solved / 8)).exp().item() for solved in set(success.values())}
    sharing = Counter(success.values())
    for row, solved in success.items():
        expected = density[solved] / sum(density.values()) / sharing[solved]
        assert counts[row] / draws == pytest.approx(expected, abs=0.012)  # 3.5 standard deviations


def test_a_sample_holds_each_prompt_once_and_none_left_out():
    buffer = filled({row: row % 8 for row in range(10)})
    assert sorted(buffer.sample(20, leave_out={3, 4, 99})) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert len(set(buffer.sample(5))) == 5
    assert buffer.sample(0) == []


def test_the_trajectories_of_lowest_entropy_are_replayed_first():
    buffer = filled({0: 4})
    for entropy, first in [(0.7, 20), (0.2, 30), (0.9, 40), (0.2, 50)]:
        buffer.add(trajectory(0, entropy, first=first))
    assert [t.unpacked()[0][0] for t in buffer.best(0, 3)] == [30, 50, 20]
    assert len(buffer.best(0, 9)) == 5
    assert buffer.best(1, 1) == []


def test_a_prompt_that_is_always_solved_is_retired_for_good():
    buffer = filled({0: 4, 1: 7})
    buffer.record([0, 1], [7, 6], [7, 7])
    assert buffer.retired == {0}
    assert len(buffer) == 1
    buffer.add(trajectory(0))
    buffer.record([0], [1], [8])
    buffer.add(trajectory(0))
    assert list(buffer.prompts) == [1]
    assert buffer.sample(2) == [1]


def test_nothing_is_replayed_before_the_start():
    buffer = ReplayBuffer(10, start=0.35, group_size=8)
    buffer.record([0, 1], [5, 0], [8, 8])  # 0.3125
    buffer.add(trajectory(0))
    assert buffer.sample(1) == []
    buffer.record([0, 1], [5, 1], [8, 8])  # 0.375
    assert buffer.sample(1) == [0]
    buffer.record([0, 1], [1, 0], [8, 8])  # once started it goes on
    assert buffer.sample(1) == [0]


def test_the_oldest_trajectory_goes_where_the_buffer_is_full():
    buffer = filled({0: 4, 1: 4}, capacity=3)
    for entropy in (0.3, 0.2, 0.4):
        buffer.add(trajectory(1, entropy))
    assert len(buffer) == 3
    assert list(buffer.prompts) == [1]
    assert [t.entropy for t in buffer.best(1, 9)] == [0.2, 0.3, 0.4]


# Checkpoints


def busy_buffer(rows: int = 12) -> ReplayBuffer:
    rng = random.Random(0)
    buffer = ReplayBuffer(30, start=0.2, group_size=8)
    for _ in range(20):
        prompts = rng.sample(range(rows), 4)
        buffer.record(prompts, [rng.randrange(8 + (rng.random() < 0.1)) for _ in prompts], [8] * 4)
        for row in prompts:
            buffer.add(trajectory(row, rng.random(), rng.randrange(1, 9), rng.randrange(40)))
    buffer.record([3], [8], [8])
    return buffer


def test_a_saved_buffer_is_the_same_buffer(tmp_path):
    buffer = busy_buffer()
    assert len(buffer.retired) > 0
    assert len(buffer) > 10
    buffer.save(tmp_path, 0, 1, "data")
    loaded = ReplayBuffer(30, start=0.2, group_size=8)
    loaded.load(tmp_path, 0, 1, "data")
    assert contents(loaded) == contents(buffer)
    random.seed(1)
    drawn = [buffer.sample(3) for _ in range(10)]
    random.seed(1)
    assert [loaded.sample(3) for _ in range(10)] == drawn


def test_a_smaller_limit_leaves_longer_trajectories_out(tmp_path, caplog):
    buffer = busy_buffer()
    buffer.save(tmp_path, 0, 1, "data")
    loaded = ReplayBuffer(30, start=0.2, group_size=8, longest=4)
    loaded.load(tmp_path, 0, 1, "data")
    kept = [t for t in contents(buffer)[0] if len(t.unpacked()[0]) <= 4]
    assert 0 < len(kept) < len(buffer)
    assert contents(loaded)[0] == kept
    assert f"{len(buffer) - len(kept)} trajectories of more than 4 tokens were left out" in caplog.text


def test_another_number_of_processes_deals_the_trajectories_anew(tmp_path):
    first, second = busy_buffer(), busy_buffer()
    second.add(trajectory(5, 0.01))
    first.save(tmp_path, 0, 2, "data")
    second.save(tmp_path, 1, 2, "data")
    loaded = [ReplayBuffer(100, 0.2, 8) for _ in range(3)]
    for process, buffer in enumerate(loaded):
        buffer.load(tmp_path, process, 3, "data")
    assert sum(map(len, loaded)) == len(first) + len(second)
    for process, buffer in enumerate(loaded):
        assert {row % 3 for row in buffer.prompts} == {process}
        assert buffer.retired == first.retired
        assert buffer.started


def test_a_buffer_that_is_missing_damaged_or_of_other_data(tmp_path, caplog):
    buffer = busy_buffer()
    buffer.load(tmp_path, 0, 1, "data")
    assert len(buffer) == 0
    assert "has no replay buffer: replay starts with an empty one" in caplog.text
    busy_buffer().save(tmp_path, 0, 1, "data")
    with pytest.raises(ValueError, match="is of another dataset"):
        buffer.load(tmp_path, 0, 1, "other data")
    path = tmp_path / "replay-0-of-1" / "token_ids.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cannot be read"):
        buffer.load(tmp_path, 0, 1, "data")


# Training


def often_solved(completions, **kwargs) -> list[float]:
    """1 or above for about half of all completions."""
    rewards = letters_reward(completions)
    return [reward + (ord(text[0]) % 2 if text else 0) for reward, text in zip(rewards, completions, strict=True)]


@pytest.fixture
def prompts() -> Dataset:
    walks = to_dataset(split_walks(train_size=4, test_size=1, seed=3)["train"])
    return walks.remove_columns("completion")


REPLAY = {"demonstration_source": "replay", "replay_start": 0.0}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_with_replayed_rows_equal_plain_torch(make_trainer, prompts, temperature):
    """Past solutions are samples of the policy at the temperature of the run, then and now."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "temperature": temperature}
    trainer = make_trainer(prompts, reward=often_solved, replay_ratio=1.0, **options, **REPLAY)
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = [row for row in trainer.train_dataset for _ in range(GROUP)]

    # a generation of rollouts alone fills the buffer with what the policy thought of them
    inputs = trainer._prepare_inputs(batch)
    remembered = inputs["row_to_remember"].clone()
    texts = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    assert (remembered >= 0).tolist() == [reward >= 1 for reward in often_solved(texts)]
    trainer.compute_loss(model, inputs)
    buffer = trainer._source.buffer
    assert len(buffer) == sum(int(row) not in buffer.retired for row in remembered if row >= 0) > 0
    recorded = {}
    for row in buffer.prompts:
        prompt_ids = torch.tensor(trainer.processing_class(prompts[row]["prompt"])["input_ids"])
        for entry in buffer.best(row, 9):
            ids, behavior = entry.unpacked()
            with torch.no_grad():
                fact = {"prompt_ids": prompt_ids, "ids": torch.tensor(ids)}
                logps, entropies = logps_and_entropies(model, fact, temperature)
            torch.testing.assert_close(torch.tensor(behavior), logps, rtol=1e-3, atol=1e-4)
            assert entry.entropy == pytest.approx(entropies.mean().item(), rel=1e-4)
        ids, behavior = buffer.best(row, 1)[0].unpacked()
        recorded[prompts[row]["prompt"]] = (ids, torch.tensor(behavior))

    # the second one replays, with other rows in the place of all groups that it can
    perturb(model, seed=2, scale=0.05)
    trainer._step += 1
    first = next(iter(buffer.prompts))
    # rows that are in the generation are not drawn: one group, of another prompt
    other = next(row for row in range(4) if row != first)
    buffer._numbers = type(buffer._numbers)(list, {first: buffer._numbers[first]})
    group = [trainer.train_dataset[other]] * GROUP
    trainer.args.steps_per_generation, trainer.args.per_device_train_batch_size = 1, GROUP
    inputs = trainer._prepare_inputs(group)
    assert (inputs["row_to_remember"][inputs["off_policy_mask"].any(1)] == -1).all()
    trainer.compute_loss(model, inputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    ids, behavior = recorded[prompts[first]["prompt"]]
    facts = []
    rows = zip(*(inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True)
    for prompt, prompt_mask, completion, mask in rows:
        fact = {"prompt_ids": prompt[prompt_mask.bool()], "ids": completion[mask.bool()]}
        assert trainer.processing_class.decode(fact["prompt_ids"]) == prompts[first]["prompt"]
        text = trainer.processing_class.decode(fact["ids"], skip_special_tokens=True)
        facts.append(fact | {"reward": often_solved([text])[0]})
    [place] = [i for i, mask in enumerate(inputs["off_policy_mask"]) if mask.any()]
    assert facts[place]["ids"].tolist() == ids
    mean = sum(fact["reward"] for fact in facts) / GROUP
    loss = 0.0
    for i, fact in enumerate(facts):
        logps, _ = logps_and_entropies(model, fact, temperature)
        advantage = fact["reward"] - mean
        if i == place:
            ratio = (logps - behavior).exp()
            loss = loss - (advantage * ratio / (ratio + GAMMA)).sum()
        else:
            loss = loss + on_policy_token_losses("dr_grpo", (logps - logps.detach()).exp(), advantage, logps).sum()
    (loss / GROUP / MAX_LENGTH).backward()
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_a_run_that_goes_on_with_replay_is_the_run_that_never_stopped(make_trainer, prompts, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", **REPLAY}
    dataset = Dataset.from_list(prompts.to_list() * 4)
    whole = make_trainer(dataset, often_solved, max_steps=6, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    make_trainer(dataset, often_solved, max_steps=3, **options).train()
    resumed = make_trainer(dataset, often_solved, max_steps=6, **options)
    resumed.train(resume_from_checkpoint="auto")
    assert contents(resumed._source.buffer) == contents(whole._source.buffer)
    assert len(resumed._source.buffer) > 0
    log = [line for line in whole.state.log_history if "loss" in line]
    assert sum(line["replay/groups"] for line in log) > 0
    assert [line["replay/groups"] for line in log] == [line["groups/guided"] for line in log]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_rollout_is_remembered_once_however_often_it_is_trained(make_trainer, prompts):
    options = {"num_iterations": 2, "max_steps": 2, "replay_ratio": 0.0, "per_device_train_batch_size": 16}
    trainer = make_trainer(prompts, often_solved, **options, **REPLAY)
    trainer.train()
    kept = list(trainer._source.buffer._trajectories.values())
    assert len(kept) > 1
    assert len({t.token_ids for t in kept}) == len(kept)


def test_what_is_masked_for_being_cut_off_is_not_kept(make_trainer, prompts):
    def reward(completions, **kwargs):
        return [1.0, 0.0] * (len(completions) // 2)

    options = {"mask_truncated_completions": True, "replay_ratio": 1.0, "max_completion_length": 4, "max_steps": 6}
    trainer = make_trainer(prompts, reward, **options, **REPLAY)
    trainer.train()
    assert all(t.token_ids for t in trainer._source.buffer._trajectories.values())


@pytest.mark.slow
def test_two_processes_share_what_is_retired_and_save_what_each_has_sampled(tiny_model_dir, tmp_path):
    output = launch(CONFIGS / "cpu.yaml", 2, "run_replay.py", tiny_model_dir, tmp_path / "out")
    [line] = [line for line in output.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["loaded"] == result["trained"]
    (rows, retired), (other_rows, other_retired) = result["trained"]
    assert retired == other_retired
    assert rows != other_rows
    assert sum(line["replay/groups"] for line in result["log"]) > 0
    assert result["log"][-1]["replay/retired"] == len(retired)


def two_ways(row: dict) -> list:
    """One as text, one as tokens with their log-probs, and one that is too long."""
    return ["5;a#a", Demonstration([5, 6, 7, 1], [-0.5, -1.0, -2.0, -0.1]), "5;" * MAX_LENGTH]


def test_a_function_of_the_users_is_a_source(make_trainer, prompts, tokenizer):
    trainer = make_trainer(prompts, demonstration_source=two_ways, num_demonstrations=3, steps_per_generation=1)
    assert tokenizer.eos_token_id == 1
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in (0, 2) for _ in range(GROUP)])
    given = [
        (ids[mask].tolist(), logps[mask].tolist())
        for ids, mask, logps in zip(
            inputs["completion_ids"], inputs["off_policy_mask"], inputs["behavior_logps"], strict=True
        )
        if mask.any()
    ]
    text = tokenizer("5;a#a" + tokenizer.eos_token)["input_ids"]
    tokens = ([5, 6, 7, 1], pytest.approx([-0.5, -1.0, -2.0, -0.1]))
    assert sorted(given) == sorted([(text, [0.0] * len(text)), tokens] * 2, key=lambda pair: pair[0])
    assert trainer._means.take()["off_policy/dropped"] == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("5;a#a", "prompt .*: what it returned is a str, expected a list of completions"),
        ([3], r"what it returned\[0\] is int 3, no text"),
        ([Demonstration([])], r"what it returned\[0\] has no tokens"),
        ([Demonstration([5, 1, 6])], r"what it returned\[0\] holds the end-of-sequence token"),
        ([Demonstration([5, 6], [-0.1, -0.2])], r"what it returned\[0\] has 2 values, but .* 3 tokens"),
    ],
)
def test_what_is_no_demonstration_names_the_function(make_trainer, prompts, returned, message):
    def mine(row):
        return returned

    with pytest.raises(ValueError, match="demonstration_source 'mine'.*" + message):
        make_trainer(prompts, demonstration_source=mine, max_steps=1).train()


def test_what_cannot_be_a_source_is_refused(config, make_trainer, prompts):
    with pytest.raises(ValueError, match="demonstration_source='reply' is not one of 'dataset', 'replay', nor"):
        config(demonstration_source="reply")
    with pytest.raises(ValueError, match="needs a name of its own"):
        config(demonstration_source=lambda row: [])
    with pytest.raises(ValueError, match="has nothing to do with num_demonstrations=0"):
        config(demonstration_source="replay", num_demonstrations=0)
    with pytest.raises(ValueError, match="replay_capacity=0 must be 1 or above"):
        config(replay_capacity=0)
    with pytest.raises(ValueError, match=r"replay_ratio=1\.5 must be a number from 0 to 1"):
        config(replay_ratio=1.5)
    with pytest.raises(ValueError, match="demonstration_source='replay' needs a dataset whose rows can be read again"):
        make_trainer(prompts.to_iterable_dataset(), **REPLAY)
