"""Recorded trajectories: their tokens under real chat templates, what is refused, and what is trained of them."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.utils import get_json_schema
from trl.chat_template_utils import get_training_chat_template, llama3_1_chat_template, qwen3_chat_template

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.commands.sft import to_prompt_completion
from luffy_trl.demonstrations.encoding import DemonstrationEncoder, demonstrations_of, encode_dataset
from luffy_trl.tasks.letter_chain import Links, letter_chain_reward

from .acting_model import chain_of, chain_rows
from .conftest import SMALL_RUN
from .test_docs import DOCS, blocks


CHATML = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% for call in message.tool_calls %}\
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3's, strips thoughts of all turns but the last; not one that TRL knows
STRIPPING = CHATML.replace(
    "{{ message.content }}{% for",
    "{{ message.content if loop.last else message.content.split('</think>')[-1].lstrip() }}{% for",
)
PROMPT = [{"role": "user", "content": "What is 3 + 4 + 5?"}]


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number.
        b: another.
    """
    return a + b


def call(**arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def answer(text):
    return {"role": "tool", "name": "add", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


TWO_CALLS = [call(a=3, b=4), answer("7"), call(a=7, b=5), answer("12"), said("It is 12.")]


@pytest.fixture
def chatml(chat_tokenizer):
    def make(template: str) -> Qwen2Tokenizer:
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
        return tokenizer

    return make


@pytest.fixture
def llama(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token, tokenizer.eos_token = special[0], special[-1]
    tokenizer.chat_template = llama3_1_chat_template
    return tokenizer


def encoder_of(tokenizer, max_length=2000, overflow="drop", **options) -> DemonstrationEncoder:
    return DemonstrationEncoder(tokenizer, [tokenizer.eos_token_id], max_length, overflow, {}, **options)


def encoded(tokenizer, messages, tools=None, **options):
    columns = encoder_of(tokenizer, **options)({"prompt": [PROMPT], "completion": [messages], "tools": [tools]}, [3])
    return demonstrations_of({name: values[0] for name, values in columns.items()})


def own_text(tokenizer, demonstration) -> list[str]:
    """The runs of the policy's tokens, as text."""
    runs, before = [], 0
    for is_own, token in zip(demonstration.tool_mask(), demonstration.token_ids, strict=True):
        if is_own:
            runs = [*runs, ""] if not before else runs
            runs[-1] += tokenizer.decode([token])
        before = is_own
    return runs


@pytest.mark.parametrize("tools", [None, json.dumps([get_json_schema(add)])])
@pytest.mark.parametrize("name", ["with generation markers", "Qwen3", "Llama 3.1"])
def test_tokens_are_the_templates_and_the_policys_are_the_assistants(name, tools, chatml, llama):
    tokenizer = {"with generation markers": chatml(CHATML), "Qwen3": chatml(qwen3_chat_template), "Llama 3.1": llama}[
        name
    ]
    [demonstration] = encoded(tokenizer, TWO_CALLS, tools)
    # What Transformers makes of the whole conversation; Qwen3's own template writes history otherwise than it was
    template = get_training_chat_template(tokenizer) if name == "Qwen3" else None
    options = {"tools": tools and json.loads(tools), "chat_template": template, "return_dict": True}
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, **options)["input_ids"]
    marked = name != "Llama 3.1"
    whole = tokenizer.apply_chat_template([*PROMPT, *TWO_CALLS], return_assistant_tokens_mask=marked, **options)
    behind = whole["input_ids"][len(prompt) :]
    length = len(demonstration.token_ids)
    assert behind[:length] == demonstration.token_ids
    assert tokenizer.decode(behind[length:]).strip() == ""  # the line break behind the last turn
    if marked:  # TRL's markers take in the line break behind a turn, at whose end the policy has stopped
        ends = [False, *(token == tokenizer.eos_token_id for token in behind)]
        marks = whole["assistant_masks"][len(prompt) :]
        own = [int(mark and not ended) for mark, ended in zip(marks, ends, strict=False)]
        assert own[:length] == demonstration.tool_mask()
    texts = own_text(tokenizer, demonstration)
    end = tokenizer.eos_token
    thought = "<think>\n\n</think>\n\n" if name == "Qwen3" else ""
    called = {
        "with generation markers": '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>',
        "Qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>',
        "Llama 3.1": '{"name": "add", "parameters": {"a": 3, "b": 4}}',
    }
    second = called[name].replace("3", "7").replace("4", "5")
    assert texts == [called[name] + end, second + end, f"{thought}It is 12.{end}"]
    assert list(demonstration.messages) == TWO_CALLS


def test_a_user_may_speak_between_and_tools_answer_together(chatml):
    messages = [call(a=1, b=2), answer("3"), answer("4"), said("3?"), {"role": "user", "content": "Sure?"}, said("3.")]
    [demonstration] = encoded(chatml(CHATML), messages)
    assert own_text(chatml(CHATML), demonstration)[1:] == ["3?<|im_end|>", "3.<|im_end|>"]


def test_fields_that_a_table_fills_with_none_and_openais_arguments(chatml):
    filled = [{"role": None, "content": None, "tool_calls": None, "name": None} | message for message in TWO_CALLS]
    filled[0]["content"] = None
    filled[0]["tool_calls"] = [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}, "id": None}
    ]
    [given], [plain] = (encoded(chatml(CHATML), messages) for messages in (filled, TWO_CALLS))
    assert given == plain
    assert list(plain.messages) == TWO_CALLS


def test_history_that_loses_thoughts_is_refused_and_without_them_is_not(chatml):
    tokenizer = chatml(STRIPPING)
    thinking = [{**TWO_CALLS[0], "content": "<think>\n3 + 4\n</think>\n\n"}, *TWO_CALLS[1:]]
    expected = (
        r"Row 3: `completion`, message 0: the chat template writes it otherwise once other messages follow "
        r"\('.*<think>.* becomes '.*<tool_call>.*take the thoughts out of all turns but the last, or give the model a "
    )
    with pytest.raises(ValueError, match=expected):
        encoded(tokenizer, thinking)
    last = "<think>\n7 + 5\n</think>\n\nIt is 12."
    [demonstration] = encoded(tokenizer, [*TWO_CALLS[:-1], said(last)])
    assert own_text(tokenizer, demonstration)[-1] == f"{last}<|im_end|>"
    # Where nothing is stripped, thoughts of every turn are trained
    [demonstration] = encoded(chatml(CHATML), thinking)
    assert own_text(tokenizer, demonstration)[0].startswith("<think>\n3 + 4\n</think>")


DROPS_CALLS = CHATML.replace("<tool_call>{{ call.function | tojson }}</tool_call>", "")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, TWO_CALLS[:-1], r"a list with roles .*'tool'\]; expected .* a trajectory: .* Message 3 breaks that"),
        (CHATML, [said("a"), said("b")], "Message 0 breaks that"),
        (CHATML, [said("a"), {"role": "system", "content": "x"}, said("b")], "Message 1 breaks that"),
        (CHATML, [call(a=1), answer(3), said("b")], "message 1 has the content int 3, expected a text"),
        (CHATML, [said("a"), answer("b"), said(" ")], "message 2 is empty: give it a content, or tool_calls"),
        (CHATML, [{**call(), "tool_calls": ["add"]}, answer("b"), said("c")], "has the tool call str 'add', expected"),
        (CHATML, [said("a<|im_end|>b"), answer("b"), said("c")], "the end-of-sequence token '<.im_end.>' before"),
        (DROPS_CALLS, TWO_CALLS, "message 0: the chat template leaves out or changes the call of add, of which 'add'"),
        (CHATML.replace("{{ message.content }}<|im", "<|im"), TWO_CALLS, "message 1: .* `content`, of which '7'"),
        (CHATML.replace("<|im_end|>", "<|endoftext|>"), TWO_CALLS, "at which generation does not stop"),
        (CHATML + "{{ raise_exception('no') if messages | length > 3 }}", TWO_CALLS, "is refused by .* template"),
        (CHATML + "{{ '<think>' if add_generation_prompt }}", TWO_CALLS, "does not write it behind '.*<think>'"),
    ],
)  # fmt: skip
def test_what_no_policy_could_have_written_is_refused_by_row(chatml, template, messages, message):
    with pytest.raises(ValueError, match=f"^Row 3: `completion`.*{message}"):
        encoded(chatml(template), messages)


def test_a_trajectory_needs_a_conversation_and_is_given_whole(chatml):
    encoder = encoder_of(chatml(CHATML))
    with pytest.raises(ValueError, match="Row 3: `completion` is a trajectory, and `prompt` is str 'a'"):
        encoder({"prompt": ["a"], "completion": [TWO_CALLS]}, [3])
    with pytest.raises(
        ValueError, match="Row 3: `completion` is a trajectory, which is replayed whole: leave prefix_str"
    ):
        encoded(chatml(CHATML), TWO_CALLS, gives_prefixes=True)
    with pytest.raises(ValueError, match=r"Row 3: `tools` is str 'add', expected a list of JSON schemas"):
        encoded(chatml(CHATML), TWO_CALLS, tools="add")


def test_one_that_is_too_long_is_cut_behind_a_turn(chatml):
    tokenizer = chatml(CHATML)
    [whole] = encoded(tokenizer, TWO_CALLS)
    first = whole.context[0][0]
    for longest, messages, length in [
        (len(whole.token_ids) - 1, 3, whole.context[1][0]),
        (first + 1, 1, first),
        (first, 1, first),
    ]:
        [cut] = encoded(tokenizer, TWO_CALLS, max_length=longest, overflow="truncate")
        assert list(cut.messages) == TWO_CALLS[:messages]
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.tool_mask() == whole.tool_mask()[:length]
        assert tokenizer.decode(cut.token_ids[-1:]) == "<|im_end|>"
    for longest, overflow in [(first - 1, "truncate"), (len(whole.token_ids) - 1, "drop")]:
        assert encoded(tokenizer, TWO_CALLS, max_length=longest, overflow=overflow) == []


def test_log_probs_are_of_the_policys_tokens(chatml):
    encoder = encoder_of(chatml(CHATML))
    [whole] = encoded(chatml(CHATML), TWO_CALLS)
    own = sum(whole.tool_mask())
    batch = {"prompt": [PROMPT], "completion": [TWO_CALLS], "completion_logps": [[-1.0] * own]}
    [demonstration] = demonstrations_of({name: values[0] for name, values in encoder(batch, [0]).items()})
    assert demonstration.logps == [-1.0 * is_own for is_own in whole.tool_mask()]
    with pytest.raises(ValueError, match=f"Row 0: `completion_logps` has {len(whole.token_ids)} values, .* {own} tok"):
        encoder(batch | {"completion_logps": [[-1.0] * len(whole.token_ids)]}, [0])


def test_the_example_of_the_documentation(chatml):
    name = "test_the_example_of_the_documentation"
    [code] = [code for _, value, _, code in blocks(DOCS / "data.md") if value.endswith(name)]
    names: dict = {}
    exec(code, names)
    rows = encode_dataset(names["dataset"], encoder_of(chatml(CHATML)))
    [demonstration] = demonstrations_of(rows[0])
    assert own_text(chatml(CHATML), demonstration)[-1] == "It is 12.<|im_end|>"
    assert list(demonstration.messages) == TWO_CALLS


def test_sft_takes_them_where_it_trains_assistants_alone(chatml):
    rows = [{"prompt": PROMPT, "completion": messages, "tools": "[]"} for messages in (None, TWO_CALLS, [said("12")])]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    with pytest.raises(ValueError, match="Row 1: `completion` is a trajectory: set --assistant_only_loss true"):
        to_prompt_completion(dataset)
    taken = to_prompt_completion(dataset, takes_trajectories=True)
    assert taken["completion"][:] == [TWO_CALLS, [said("12")]]
    assert taken["tools"][:] == ["[]", "[]"]


# In the trainer


GROUP, LONGEST, GAMMA = 4, 24, 0.1
OPTIONS = {
    **SMALL_RUN,
    "num_generations": GROUP,
    "max_completion_length": LONGEST,
    "per_device_train_batch_size": 16,
    "max_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def train_on(acting_model, tmp_path):
    """A trainer on chains with trajectories of two calls."""

    def make(dataset=None, reward=letter_chain_reward, acts=True, trainer_options=None, **overrides) -> LuffyTrainer:
        if acts:
            trainer_options = {"environment_factory": Links} | (trainer_options or {})
        return LuffyTrainer(
            str(acting_model),
            reward,
            LuffyConfig(output_dir=str(tmp_path / "out"), **(OPTIONS | overrides)),
            train_dataset=chain_rows([True] * 4) if dataset is None else dataset,
            processing_class=AutoTokenizer.from_pretrained(acting_model),
            **(trainer_options or {}),
        )

    return make


def generated(trainer) -> dict:
    """The first and only micro-batch of a generation: all rows of the dataset."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(GROUP)])


def context_of(text: list[str]) -> list[bool]:
    """Where a row's tokens are the tool's: from its mark to the opening of the next turn."""
    inside, found = False, []
    for token in text:
        inside = inside or token == "="
        found.append(inside)
        inside = inside and token != "|"
    return found


def facts_of(trainer, rewards_of):
    tokenizer = trainer.processing_class
    [batch] = trainer._buffered_inputs
    facts = []
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        tokens = [tokenizer.decode([token]) for token in ids.tolist()]
        start = tokenizer.decode(prompt)[1]
        demonstration = f"follow(letter={start})<eos>=z|follow(letter=z)<eos>=.|#z<eos>"
        facts.append(
            {
                "prompt": prompt,
                "ids": ids,
                "start": start,
                "own": ~torch.tensor(context_of(tokens)),
                "reward": rewards_of("".join(tokens)),
                "off_policy": "".join(tokens) == demonstration,
            }
        )
    for fact in facts:
        rewards = [other["reward"] for other in facts if other["start"] == fact["start"]]
        assert len(rewards) == GROUP
        fact["advantage"] = fact["reward"] - sum(rewards) / GROUP
    return facts


def plain_loss(model, ref_model, facts, loss_type, beta):
    tokens = sum(int(fact["own"].sum()) for fact in facts)
    loss, kl_sum = 0.0, 0.0
    visible = sum(int(fact["own"].sum()) for fact in facts if not fact["off_policy"])
    for fact in facts:
        both = torch.cat([fact["prompt"], fact["ids"]])[None]

        def logps_of(model, fact=fact, both=both):
            logits = model(input_ids=both, **fact.get("images", {})).logits[0, len(fact["prompt"]) - 1 : -1]
            return logits.log_softmax(-1).gather(1, fact["ids"][:, None])[:, 0]

        logps, own = logps_of(model), fact["own"]
        length = int(own.sum())
        denominator = {
            "grpo": len(facts) * length, "dr_grpo": len(facts) * LONGEST, "dapo": tokens, "bnpo": tokens,
        }[loss_type]  # fmt: skip
        if fact["off_policy"]:
            r = logps[own].exp()
            loss = loss - fact["advantage"] * (r / (r + GAMMA)).sum() / denominator
            continue
        ratio = (logps - logps.detach()).exp()
        loss = loss - fact["advantage"] * ratio[own].sum() / denominator
        if beta:
            ref = logps_of(ref_model).detach()
            kl = (ratio * ((ref - logps).exp() - (ref - logps) - 1))[own].sum()
            if loss_type == "bnpo":
                kl_sum = kl_sum + kl / visible
            else:
                loss = loss + beta * kl / denominator
    return loss + beta * kl_sum


def distinct(completion: str) -> float:
    return len(set(completion)) / len(completion)


def distinct_reward(completions, completion_ids, **kwargs) -> list[float]:
    """Of all that is in a row, what the tool said included; different for most."""
    tokenizer = distinct_reward.tokenizer
    return [distinct("".join(tokenizer.decode([i]) for i in ids)) for ids in completion_ids]


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "dapo", "bnpo"])
def test_loss_and_gradients_equal_plain_torch(train_on, loss_type, acts):
    trainer = train_on(reward=distinct_reward, loss_type=loss_type, beta=0.1, acts=acts)
    distinct_reward.tokenizer = trainer.processing_class
    model, inputs = trainer.model, generated(trainer)
    facts = facts_of(trainer, distinct)
    with torch.no_grad():  # a reference other than the policy
        for parameter in trainer.ref_model.parameters():
            parameter.mul_(1.01)
    assert sum(fact["off_policy"] for fact in facts) == 4
    acted = sum(bool((~fact["own"]).any()) and not fact["off_policy"] for fact in facts)
    assert acted > 0 if acts else acted == 0

    inputs["ref_per_token_logps"] = torch.zeros_like(inputs["completion_ids"], dtype=torch.float32)
    with torch.no_grad():
        kept = inputs["completion_ids"].size(1)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        rows = (~inputs["off_policy_mask"].any(1)).nonzero().flatten()
        of_rollouts = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids[rows], mask[rows], kept)[0]
        inputs["ref_per_token_logps"][rows] = of_rollouts
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = plain_loss(model, trainer.ref_model, facts, loss_type, beta=0.1)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
    for name, parameter in model.named_parameters():
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2e}"


def test_what_tools_say_has_no_loss_and_rewards_get_every_message(train_on):
    seen: list = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return letter_chain_reward(completions, **kwargs)

    trainer = train_on(reward=reward)
    batch = generated(trainer)
    held = batch["off_policy_mask"].any(1)
    tokenizer = trainer.processing_class
    assert held.sum() == 4
    for ids, mask in zip(batch["completion_ids"][held], batch["off_policy_mask"][held], strict=True):
        start = tokenizer.decode(ids[1:2])
        assert tokenizer.decode(ids[mask]) == f"follow(letter={start})<eos>follow(letter=z)<eos>#z<eos>"
    assert torch.equal(batch["off_policy_mask"][held], (batch["tool_mask"] * batch["completion_mask"]).bool()[held])
    # of each group the last is the trajectory as it was recorded, the others are as TRL hands them over
    for number, group in enumerate(zip(*[iter(seen)] * GROUP, strict=True)):
        start = chain_rows([True] * 4)[number]["prompt"][0]["content"][1]
        recorded = chain_of(start + "z").trajectory()
        assert group[-1] == [{"content": "", **message} for message in recorded]
    acted = [messages for i, messages in enumerate(seen) if i % GROUP < GROUP - 1 and len(messages) > 1]
    assert acted
    assert {message["role"] for messages in acted for message in messages} == {"assistant", "tool"}


def test_a_trajectory_recorded_from_a_rollout_has_the_rollouts_tokens(train_on):
    """What acts, and what is replayed, is one thing: ids, and which of them are the policy's."""
    seen: list = []

    def reward(completions, completion_ids, prompts, **kwargs):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    trainer = train_on(reward=reward)
    batch = generated(trainer)
    by_ids = {
        tuple(ids[mask.bool()].tolist()): tool_mask[mask.bool()].tolist()
        for ids, mask, tool_mask in zip(
            batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True
        )
    }
    encoder = DemonstrationEncoder(trainer.processing_class, trainer.eos_token_ids, LONGEST, "drop", {})
    compared = 0
    for prompt, completion, ids in seen:
        if len(completion) > 1 and completion[-1]["role"] == "assistant" and completion[-1]["content"]:
            again = encoder.encode(completion, {"prompt": prompt}, "it")
            assert (again.token_ids, again.tool_mask()) == (ids, by_ids[tuple(ids)])
            compared += 1
    assert compared > 4


def test_environments_are_left_as_the_recorded_calls_leave_them(train_on):
    calls: list[str] = []

    class Counting(Links):
        def reset(self, **row):
            super().reset(**row)
            self.asked = ""

        def follow(self, letter: str) -> str:
            """Where a letter leads.

            Args:
                letter: the letter to follow.
            """
            self.asked += letter
            calls.append(letter)
            return super().follow(letter)

        def get_reward(self) -> float:
            return float(self.asked.endswith("z"))

    trainer = train_on(reward=[], trainer_options={"environment_factory": Counting})
    trainer.train()
    [line] = [line for line in trainer.state.log_history if "off_policy/reward" in line]
    assert line["off_policy/reward"] == 1.0
    # the recorded calls are the environment's, and no rollout's
    assert line["tools/call_frequency"] * 16 == len(calls) - 4 * 2


def test_prompts_without_the_trainers_tools_are_rendered_with_their_own(chatml, chat_model_dir, tmp_path):
    tokenizer = chatml(CHATML)
    schema = get_json_schema(add)
    rows = [{"prompt": PROMPT, "completion": TWO_CALLS, "tools": json.dumps([schema])}] * 3
    rows.append({"prompt": PROMPT, "completion": [said("12")], "tools": None})
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    trainer = LuffyTrainer(
        str(chat_model_dir),
        lambda completions, **kwargs: [float(len(completion)) for completion in completions],
        LuffyConfig(output_dir=str(tmp_path), **(OPTIONS | {"max_completion_length": 400})),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
    )
    batch = generated(trainer)
    prompts = {tokenizer.decode(i[m.bool()]) for i, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)}
    with_tools, without = (
        tokenizer.apply_chat_template(PROMPT, tools=tools, add_generation_prompt=True, tokenize=False)
        for tools in ([schema], None)
    )
    assert prompts == {with_tools, without}
    assert batch["off_policy_mask"].any(1).sum() == 4
    trainer.model.eval()
    evaluated = trainer._generate_and_score_completions([dataset[0], dataset[3]] * GROUP)
    assert {len(ids) for ids in evaluated["prompt_mask"].sum(1, keepdim=True).tolist()} == {1}
    lengths = {len(tokenizer(text)["input_ids"]) for text in (with_tools, without)}
    assert set(evaluated["prompt_mask"].sum(1).tolist()) == lengths
