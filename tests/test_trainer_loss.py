"""Loss and every parameter's gradient, through the real trainer, against plain torch.

The formulas below are written from the papers and from TRL's documentation, with their own forward pass, their own
advantages from the decoded texts and their own idea of which rows are demonstrations. They share no code with
`luffy_trl` or TRL.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from luffy_trl import LuffyTrainer
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .run_two_processes import letters_reward


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
GAMMA, EPSILON, MAX_LENGTH, GROUP = 0.1, 0.2, 16, 4
SAPO_TAU = {True: 1.0, False: 1.05}  # GRPOConfig's defaults
VESPO = {True: (2.0, 3.0), False: (3.0, 2.0)}  # (k, lambda), GRPOConfig's defaults


def whole_batch(trainer, model, rows, ratio=1.0, baseline="group", gate=1.0, reward=None):
    """The plain facts of a generation batch, computed anew: a list of dicts, one per row, by position in the batch."""
    tokenizer = trainer.processing_class
    reward = reward or (lambda prompts, completions: letters_reward(completions))
    demonstrations = {row["prompt"]: row["completion"] for row in rows}
    facts = []
    for batch in trainer._buffered_inputs:
        for prompt, p_mask, completion, c_mask in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            prompt_ids, completion_ids = prompt[p_mask.bool()], completion[c_mask.bool()]
            text = tokenizer.decode(completion_ids, skip_special_tokens=True)
            prompt_text = tokenizer.decode(prompt_ids)
            demonstration = tokenizer(demonstrations[prompt_text] + tokenizer.eos_token)["input_ids"]
            prefix = demonstration[: int(ratio * len(demonstration))]
            off_policy = completion_ids[: len(prefix)].tolist() == prefix
            facts.append(
                {
                    "prompt": prompt_text,
                    "prompt_ids": prompt_ids,
                    "ids": completion_ids,
                    "reward": reward([prompt_text], [text])[0],
                    "off_policy": off_policy,
                    "given": len(prefix) if off_policy else 0,
                }
            )
            if "completion_logps" in rows.column_names:
                facts[-1]["behavior"] = dict(zip(rows["prompt"], rows["completion_logps"], strict=True))[prompt_text]
    for fact in facts:
        group = [other for other in facts if other["prompt"] == fact["prompt"]]
        assert len(group) == GROUP
        rollouts = [other["reward"] for other in group if not other["off_policy"]]
        fact["success"] = sum(reward >= 1 for reward in rollouts) / len(rollouts)
        fact["counts"] = fact["success"] <= gate
        rewards = [other["reward"] for other in group] if baseline == "group" and fact["counts"] else rollouts
        fact["advantage"] = fact["reward"] - sum(rewards) / len(rewards)
        if fact["off_policy"] and not fact["counts"]:
            fact["advantage"] = 0.0
    return facts


def logps_and_entropies(model, fact, temperature=1.0):
    """One row, unpadded, with its images where it has some: (T,) and (T,)."""
    ids = torch.cat([fact["prompt_ids"], fact["ids"]])
    logits = model(input_ids=ids[None], **fact.get("images", {})).logits[0, len(fact["prompt_ids"]) - 1 : -1]
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(1, fact["ids"][:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def on_policy_token_losses(loss_type, ratio, a, logps):
    """(T,) from (T,), a float, (T,)."""
    if loss_type == "cispo":
        return -ratio.clamp(max=EPSILON).detach() * a * logps
    if loss_type == "sapo":
        tau = SAPO_TAU[a > 0]
        return -a * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    if loss_type == "vespo":
        k, lam = VESPO[a >= 0]
        w = ratio.log().sum().exp().clamp(min=1e-8, max=torch.tensor(20.0).exp())
        phi = (torch.e**lam * w**k * torch.exp(-lam * w)).detach()
        return -phi * a * logps
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - EPSILON, 1 + EPSILON))


def regularized(r):
    return r / (r + GAMMA)


def importance_sampling(f):
    return lambda logps, advantage: -advantage * f(logps.exp())


def sft(logps, advantage):
    return -logps


def chord_phi(logps, advantage):
    """CHORD's Eqs. 5 and 6: phi = p (1 - p) is a weight, without a gradient of its own."""
    with torch.no_grad():
        phi = logps.exp() * (1 - logps.exp())
    return -phi * logps


REGULARIZED = importance_sampling(regularized)


def averaged_apart(loss_type, average, facts, micro_batches, max_length):
    """What a rollout's and a demonstration's token losses are divided by, each kind averaged by itself."""
    on = [fact for fact in facts if fact["given"] < len(fact["ids"])]
    off = [fact for fact in facts if fact["given"] and fact["counts"]]
    on_rows, off_rows = len(on) / micro_batches, len(off) / micro_batches
    on_tokens = sum(len(fact["ids"]) - fact["given"] for fact in on) / micro_batches
    off_tokens = sum(fact["given"] for fact in off) / micro_batches

    def of_rollout(fact, on_tokens_of_batch):
        return {
            "grpo": on_rows * (len(fact["ids"]) - fact["given"]),
            "sapo": on_rows * (len(fact["ids"]) - fact["given"]),
            "bnpo": on_tokens_of_batch,
            "dr_grpo": on_rows * max_length,
            "luspo": on_rows,
        }.get(loss_type, on_tokens)

    def of_demonstration(fact):
        return off_tokens if average == "token" else off_rows * fact["given"]

    return of_rollout, of_demonstration


def objective(
    model, ref_model, facts, old_logps, loss_type, beta, entropy_coef, micro_batches, term, weight, temperature=1.0,
    average="joint", complement=False, max_length=MAX_LENGTH,
):  # fmt: skip
    """Loss of the first micro-batch of an optimizer step that has no other."""
    rows = len(facts) // micro_batches
    tokens_in_batch = sum(len(fact["ids"]) for fact in facts)
    of_rollout, of_demonstration = averaged_apart(loss_type, average, facts, micro_batches, max_length)
    batch = facts[:rows]
    batch_tokens = sum(len(fact["ids"]) for fact in batch)
    on_tokens = sum(len(fact["ids"]) - fact["given"] for fact in batch)

    loss, kl_of_bnpo, entropy = 0.0, 0.0, 0.0
    for fact, old in zip(batch, old_logps, strict=False):
        logps, entropies = logps_and_entropies(model, fact, temperature)
        untempered, _ = logps_and_entropies(model, fact)
        length = len(fact["ids"])
        denominator = {
            "grpo": rows * length,
            "sapo": rows * length,
            "bnpo": batch_tokens,
            "dr_grpo": rows * max_length,
            "dapo": tokens_in_batch / micro_batches,
            "cispo": tokens_in_batch / micro_batches,
            "vespo": tokens_in_batch / micro_batches,
            "luspo": rows,
        }[loss_type]
        given = fact["given"]
        w = weight(fact) if callable(weight) else weight
        on_denominator = off_denominator = denominator
        if average != "joint":
            on_denominator, off_denominator = of_rollout(fact, on_tokens), of_demonstration(fact)
        if fact["counts"] and given:
            behavior = torch.tensor(fact["behavior"])[:given] if "behavior" in fact else 0.0
            loss = loss + w * term(untempered[:given] - behavior, fact["advantage"]).sum() / off_denominator
        if given == length:
            continue
        logps, old, entropies = logps[given:], old[given:], entropies[given:]
        ratio = (logps - old).exp()
        policy_loss = on_policy_token_losses(loss_type, ratio, fact["advantage"], logps).sum() / on_denominator
        loss = loss + (1 - w if complement else 1) * policy_loss
        if beta:
            ref = logps_and_entropies(ref_model, fact, temperature)[0].detach()[given:]
            # weighted by the ratio: GRPOConfig.use_bias_correction_kl, on by default
            kl = (ratio * ((ref - logps).exp() - (ref - logps) - 1)).sum()
            # Types that average over tokens first take the KL's mean over those it acts on, as TRL does with tools
            if loss_type == "bnpo":
                kl_of_bnpo = kl_of_bnpo + kl
            else:
                acted_on = rows * (length - given) if loss_type in ("grpo", "sapo") else denominator
                loss = loss + beta * kl / acted_on
        entropy = entropy + entropies.sum()
    return loss + beta * kl_of_bnpo / max(on_tokens, 1) - entropy_coef * entropy / max(on_tokens, 1)


def perturb(model, seed=1, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def check(
    trainer, rows, loss_type, beta=0.0, entropy_coef=0.0, term=REGULARIZED, weight=1.0,
    accumulation=1, temperature=1.0, average="joint", complement=False, scaled=False, **guidance,
):  # fmt: skip
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    batch = [row for row in trainer.train_dataset for _ in range(GROUP)]
    inputs = trainer._prepare_inputs(batch)
    facts = whole_batch(trainer, model, rows, **guidance)
    if scaled:
        scale_by_group(facts)
    with torch.no_grad():
        old_logps = [logps_and_entropies(model, fact, temperature)[0] for fact in facts]
    perturb(model)  # ratios other than 1, so that clipping acts

    trainer.compute_loss(model, inputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = trainer.compute_loss(model, inputs).detach()

    model.zero_grad()
    micro_batches = trainer.args.steps_per_generation
    expected = objective(
        model, trainer.ref_model, facts, old_logps, loss_type, beta, entropy_coef, micro_batches, term, weight,
        temperature, average, complement,
    )  # fmt: skip
    expected = expected / accumulation  # every micro-batch is that part of its step
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    assert gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in gradients
            continue
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2e}"
    return facts


# 4 prompts x 4, two micro-batches of 8 rows a generation, one optimizer step each: the old policy's log-probs count
MISALIGNED = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}


@pytest.fixture
def rows() -> Dataset:
    return to_dataset(split_walks(train_size=4, test_size=1, seed=3)["train"])


@pytest.mark.parametrize(("beta", "entropy_coef"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (0.1, 0.05)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_equal_plain_torch(make_trainer, rows, loss_type, beta, entropy_coef):
    trainer = make_trainer(rows, loss_type=loss_type, beta=beta, entropy_coef=entropy_coef, **MISALIGNED)
    facts = check(trainer, rows, loss_type, beta, entropy_coef)
    first = [fact["off_policy"] for fact in facts[:8]]
    assert 0 < sum(first) < 8  # the checked micro-batch holds both kinds
    assert sum(fact["off_policy"] for fact in facts) == 4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_accumulation(make_trainer, rows, loss_type):
    options = {**MISALIGNED, "per_device_train_batch_size": 4, "steps_per_generation": 4}
    trainer = make_trainer(rows, loss_type=loss_type, beta=0.1, entropy_coef=0.05, trim_padding=False, **options)
    check(trainer, rows, loss_type, beta=0.1, entropy_coef=0.05, accumulation=4)


@pytest.mark.parametrize(
    ("options", "f"),
    [
        ({"shaping_gamma": 0.7}, lambda r: r / (r + 0.7)),
        ({"shaping": "identity"}, lambda r: r),
        ({"shaping": "power", "shaping_exponent": 0.3}, lambda r: r**0.3),
        ({"shaping": "log"}, torch.log),
    ],
)
def test_the_configured_shaping_is_the_one_used(make_trainer, rows, options, f):
    check(make_trainer(rows, **options, **MISALIGNED), rows, "dr_grpo", term=importance_sampling(f))


# The method family


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rl_with_an_sft_loss(make_trainer, rows, loss_type):
    options = {"demonstration_loss": "sft", "advantage_baseline": "on_policy", "demonstration_weight": 0.5}
    trainer = make_trainer(rows, loss_type=loss_type, beta=0.1, **options, **MISALIGNED)
    check(trainer, rows, loss_type, beta=0.1, term=sft, weight=0.5, baseline="on_policy")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_prefix_that_the_policy_continues(make_trainer, rows, loss_type, ratio):
    trainer = make_trainer(rows, loss_type=loss_type, beta=0.1, entropy_coef=0.05, prefix_max=ratio, **MISALIGNED)
    facts = check(trainer, rows, loss_type, beta=0.1, entropy_coef=0.05, ratio=ratio)
    assert sum(fact["off_policy"] for fact in facts) == 4
    assert all(len(fact["ids"]) > fact["given"] for fact in facts)


def solved_rows(rows: Dataset) -> Dataset:
    """Every other prompt gets a letter under which its rollouts count as solved, see `sometimes_solved`."""
    return rows.map(lambda row, i: {"prompt": ("C" if i % 2 else "D") + row["prompt"][1:]}, with_indices=True)


def sometimes_solved(prompts, completions, **kwargs) -> list[float]:
    rewards = letters_reward(completions)
    solved = [p[0] == "C" and ord(text[0]) % 2 for p, text in zip(prompts, completions, strict=True)]
    return [reward + bonus for reward, bonus in zip(rewards, solved, strict=True)]


@pytest.mark.parametrize("loss", ["importance_sampling", "sft"])
@pytest.mark.parametrize("gate", [0.0, 0.9])
def test_demonstrations_count_only_below_the_gate(make_trainer, rows, loss, gate):
    baseline = "on_policy" if loss == "sft" else "group"
    options = {"demonstration_loss": loss, "advantage_baseline": baseline, "success_gate": gate}
    trainer = make_trainer(solved_rows(rows), reward=sometimes_solved, **options, **MISALIGNED)
    term = sft if loss == "sft" else REGULARIZED
    facts = check(
        trainer, solved_rows(rows), "dr_grpo", term=term, baseline=baseline, gate=gate, reward=sometimes_solved
    )
    assert {fact["counts"] for fact in facts} == ({True} if gate else {True, False})


def test_a_closed_gate_keeps_rows_with_a_prefix_out_too(make_trainer, rows):
    trainer = make_trainer(solved_rows(rows), reward=sometimes_solved, success_gate=0.0, prefix_max=0.5, **MISALIGNED)
    facts = check(
        trainer, solved_rows(rows), "dr_grpo", term=REGULARIZED, ratio=0.5, gate=0.0, reward=sometimes_solved
    )
    closed = [fact for fact in facts if fact["off_policy"] and not fact["counts"]]
    assert any(fact["given"] < len(fact["ids"]) for fact in closed)


@pytest.mark.parametrize(("schedule", "weight"), [("linear", 0.75), ("cosine", (1 + 0.5**0.5) / 2), ("constant", 1.0)])
def test_a_weight_that_fades(make_trainer, rows, schedule, weight):
    trainer = make_trainer(rows, demonstration_weight_schedule=schedule, **MISALIGNED)
    trainer.state.global_step, trainer.state.max_steps = 2, 8
    check(trainer, rows, "dr_grpo", weight=weight)


# CHORD, AMPO and weights that follow success


def scale_by_group(facts):
    """Advantages over the standard deviation of the rewards that are compared, as GRPO's."""
    for fact in facts:
        group = [other for other in facts if other["prompt"] == fact["prompt"]]
        rewards = [other["reward"] for other in group if not other["off_policy"] or other["counts"]]
        fact["scaled"] = fact["advantage"] / (torch.tensor(rewards).std().item() + 1e-4)
    for fact in facts:
        fact["advantage"] = fact.pop("scaled")


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_rollouts_and_demonstrations_averaged_apart(make_trainer, rows, loss_type, average, ratio):
    options = {"demonstration_average": average, "demonstration_weight": 0.5, "prefix_max": ratio, **MISALIGNED}
    trainer = make_trainer(rows, loss_type=loss_type, beta=0.1, entropy_coef=0.05, **options)
    check(trainer, rows, loss_type, beta=0.1, entropy_coef=0.05, average=average, weight=0.5, ratio=ratio)


CHORD = {
    "advantage_baseline": "on_policy", "rollout_weight": "complement", "demonstration_average": "token",
    "loss_type": "dapo",
}  # fmt: skip


@pytest.mark.parametrize(("step", "mu"), [(0, 0.0), (1, 0.45), (2, 0.9), (4, 0.475), (6, 0.05), (7, 0.05)])
def test_chord_with_its_mu(make_trainer, rows, step, mu):
    """Eqs. 1 to 3: (1 - mu) L_GRPO + mu L_SFT, each a mean over its own tokens, mu by the authors' schedule."""
    schedule = {
        "demonstration_weight": 0.9, "demonstration_weight_schedule": "chord", "demonstration_weight_final": 0.05,
        "demonstration_weight_warmup_steps": 2, "demonstration_weight_decay_steps": 4,
    }  # fmt: skip
    trainer = make_trainer(rows, demonstration_loss="sft", **CHORD, **schedule, **MISALIGNED)
    trainer.state.global_step, trainer.state.max_steps = step, 10
    check(trainer, rows, "dapo", term=sft, weight=mu, baseline="on_policy", average="token", complement=True)
    assert trainer._metrics["train"]["groups/weight"] == pytest.approx([mu])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chord_with_its_phi(make_trainer, rows, temperature):
    """Eqs. 3, 5 and 6: a small mu that stays, and tokens weighted by p (1 - p)."""
    options = {"demonstration_loss": "chord_phi", "demonstration_weight": 0.1, "temperature": temperature}
    trainer = make_trainer(rows, **options, **CHORD, **MISALIGNED)
    check(
        trainer, rows, "dapo", term=chord_phi, weight=0.1, baseline="on_policy", average="token", complement=True,
        temperature=temperature,
    )  # fmt: skip


def test_ampos_objective_behind_the_gate(make_trainer, rows):
    """Eqs. 6 and 7: demonstrations where no rollout is right, averaged by sequence, on advantages over the group."""
    options = {"success_gate": 0.0, "scale_rewards": "group", "demonstration_average": "sequence", "loss_type": "dapo"}
    trainer = make_trainer(solved_rows(rows), reward=sometimes_solved, **options, **MISALIGNED)
    facts = check(
        trainer, solved_rows(rows), "dapo", gate=0.0, reward=sometimes_solved, average="sequence", scaled=True
    )
    assert {fact["counts"] for fact in facts} == {True, False}


def often_solved(prompts, completions, **kwargs) -> list[float]:
    """By the first letter, in any group."""
    return [r + (text[:1] > "M") for r, text in zip(letters_reward(completions), completions, strict=True)]


@pytest.mark.parametrize("target", [1.0, 0.5])
def test_a_weight_that_follows_the_groups_success(make_trainer, rows, target):
    options = {"demonstration_weight_schedule": "group_success", "success_target": target, "demonstration_weight": 0.8}
    trainer = make_trainer(rows, reward=often_solved, **options, **MISALIGNED)
    seen = []

    def weight(fact):
        seen.append(0.8 * max(0.0, target - fact["success"]))
        return seen[-1]

    check(trainer, rows, "dr_grpo", reward=often_solved, weight=weight)
    assert len(set(seen)) > 1


def test_a_weight_that_follows_the_running_success(make_trainer, rows):
    """CHORD's section 4.3, mu = max(0, target - success), with a memory: the rate is 0.5 before this generation."""
    options = {"demonstration_weight_schedule": "success", "success_memory": 0.75, "rollout_weight": "complement"}
    trainer = make_trainer(rows, reward=often_solved, **options, **MISALIGNED)
    trainer._guidance.rate = 0.5

    def weight(fact):
        return 1 - trainer._guidance.rate

    facts = check(trainer, rows, "dr_grpo", reward=often_solved, weight=weight, complement=True)
    solved = [fact["reward"] >= 1 for fact in facts if not fact["off_policy"]]
    assert 0 < sum(solved) < len(solved)
    assert trainer._guidance.rate == pytest.approx(0.75 * 0.5 + 0.25 * sum(solved) / len(solved))


def test_demonstration_weight_scales_the_off_policy_term(make_trainer, rows):
    trainer = make_trainer(rows, demonstration_weight=0.3, **MISALIGNED)
    check(trainer, rows, "dr_grpo", weight=0.3)


# Temperatures other than 1: rollouts are of the policy at that temperature, demonstrations of the policy itself

SHAPINGS = {
    "regularized": regularized,
    "identity": lambda r: r,
    "power": lambda r: r**0.5,
    "log": torch.log,
}
TEMPERATURES = [0.7, 1.3]


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("with_behavior", [False, True])
def test_demonstrations_are_scored_at_temperature_one(
    make_trainer, rows, tokenizer, shaping, temperature, with_behavior
):
    if with_behavior:
        lengths = [len(tokenizer(text + tokenizer.eos_token)["input_ids"]) for text in rows["completion"]]
        rows = rows.add_column("completion_logps", [[-0.1 * (i + 1) for i in range(length)] for length in lengths])
    trainer = make_trainer(rows, shaping=shaping, temperature=temperature, beta=0.1, entropy_coef=0.05, **MISALIGNED)
    term = importance_sampling(SHAPINGS[shaping])
    check(trainer, rows, "dr_grpo", beta=0.1, entropy_coef=0.05, term=term, temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_sft_loss_is_of_the_policy_itself(make_trainer, rows, loss_type, temperature):
    options = {"demonstration_loss": "sft", "advantage_baseline": "on_policy", "temperature": temperature}
    trainer = make_trainer(rows, loss_type=loss_type, **options, **MISALIGNED)
    check(trainer, rows, loss_type, term=sft, baseline="on_policy", temperature=temperature)


@pytest.mark.parametrize(
    "options", [{"packed_forward": True}, {"prefix_max": 0.6}, {"prefix_max": 0.6, "packed_forward": True}]
)
def test_temperature_is_a_tokens_own(make_trainer, rows, options):
    """Packed rows too, and rows of which a part is a demonstration's."""
    trainer = make_trainer(rows, temperature=0.7, beta=0.1, entropy_coef=0.05, **options, **MISALIGNED)
    ratio = options.get("prefix_max", 1.0)
    check(trainer, rows, "dr_grpo", beta=0.1, entropy_coef=0.05, ratio=ratio, temperature=0.7)


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {
    "bias": (PhiForCausalLM, PhiConfig, {}),
    "cap": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}),
}


@pytest.mark.parametrize("head", HEADS)
def test_whatever_a_model_makes_of_its_logits(config, rows, tokenizer, head):
    """A bias, a cap and a scale come before the temperature: no scaling of hidden states would undo it."""
    torch.manual_seed(0)
    model_class, config_class, options = HEADS[head]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = model_class(config_class(vocab_size=len(tokenizer), num_key_value_heads=1, **options, **TINY, **ids))
    if head == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    args = config(temperature=0.7, **MISALIGNED)
    trainer = LuffyTrainer(model, letters_reward, args, train_dataset=rows, processing_class=tokenizer)
    check(trainer, rows, "dr_grpo", temperature=0.7)


def test_an_adapter_at_another_temperature(make_trainer, rows):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(rows, temperature=1.3, trainer_options={"peft_config": lora}, **MISALIGNED)
    check(trainer, rows, "dr_grpo", temperature=1.3)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_check_can_fail(make_trainer, rows, weight):
    trainer = make_trainer(rows, demonstration_weight=0.3, **MISALIGNED)
    with pytest.raises(AssertionError):
        check(trainer, rows, "dr_grpo", weight=weight)
