"""Loss and every parameter's gradient, through the real trainer, against plain torch.

The formulas below are written from the papers and from TRL's documentation, with their own forward pass, their own
advantages from the decoded texts and their own idea of which rows are demonstrations. They share no code with
`luffy_trl` or TRL.
"""

import pytest
import torch
from datasets import Dataset

from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .run_two_processes import letters_reward


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
GAMMA, EPSILON, MAX_LENGTH, GROUP = 0.1, 0.2, 16, 4
SAPO_TAU = {True: 1.0, False: 1.05}  # GRPOConfig's defaults
VESPO = {True: (2.0, 3.0), False: (3.0, 2.0)}  # (k, lambda), GRPOConfig's defaults


def whole_batch(trainer, model, rows):
    """The plain facts of a generation batch, computed anew: a list of dicts, one per row, by position in the batch."""
    tokenizer = trainer.processing_class
    demonstrations = {row["prompt"]: row["completion"] for row in rows}
    facts = []
    for batch in trainer._buffered_inputs:
        for prompt, p_mask, completion, c_mask in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            prompt_ids, completion_ids = prompt[p_mask.bool()], completion[c_mask.bool()]
            text = tokenizer.decode(completion_ids, skip_special_tokens=True)
            prompt_text = tokenizer.decode(prompt_ids)
            facts.append(
                {
                    "prompt": prompt_text,
                    "prompt_ids": prompt_ids,
                    "ids": completion_ids,
                    "reward": letters_reward([text])[0],
                    "off_policy": text == demonstrations[prompt_text],
                }
            )
    for fact in facts:
        group = [other["reward"] for other in facts if other["prompt"] == fact["prompt"]]
        assert len(group) == GROUP
        fact["advantage"] = fact["reward"] - sum(group) / GROUP
    return facts


def logps_and_entropies(model, fact):
    """One row, unpadded: (T,) and (T,)."""
    ids = torch.cat([fact["prompt_ids"], fact["ids"]])
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)[len(fact["prompt_ids"]) - 1 : -1]
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


def objective(model, ref_model, facts, old_logps, loss_type, beta, entropy_coef, micro_batches, f, weight):
    """Loss of the first micro-batch of an optimizer step that has no other."""
    rows = len(facts) // micro_batches
    tokens_in_batch = sum(len(fact["ids"]) for fact in facts)
    batch = facts[:rows]
    batch_tokens = sum(len(fact["ids"]) for fact in batch)
    on_tokens = sum(len(fact["ids"]) for fact in batch if not fact["off_policy"])

    loss, kl_of_bnpo, entropy = 0.0, 0.0, 0.0
    for fact, old in zip(batch, old_logps, strict=False):
        logps, entropies = logps_and_entropies(model, fact)
        length = len(fact["ids"])
        denominator = {
            "grpo": rows * length,
            "sapo": rows * length,
            "bnpo": batch_tokens,
            "dr_grpo": rows * MAX_LENGTH,
            "dapo": tokens_in_batch / micro_batches,
            "cispo": tokens_in_batch / micro_batches,
            "vespo": tokens_in_batch / micro_batches,
            "luspo": rows,
        }[loss_type]
        if fact["off_policy"]:
            loss = loss - weight * (fact["advantage"] * f(logps.exp())).sum() / denominator
            continue
        ratio = (logps - old).exp()
        loss = loss + on_policy_token_losses(loss_type, ratio, fact["advantage"], logps).sum() / denominator
        if beta:
            ref = logps_and_entropies(ref_model, fact)[0].detach()
            # weighted by the ratio: GRPOConfig.use_bias_correction_kl, on by default
            kl = (ratio * ((ref - logps).exp() - (ref - logps) - 1)).sum()
            # "bnpo" alone takes the KL's mean over the tokens it acts on, as TRL does for tool results
            kl_of_bnpo, loss = (
                (kl_of_bnpo + kl, loss) if loss_type == "bnpo" else (0.0, loss + beta * kl / denominator)
            )
        entropy = entropy + entropies.sum()
    return loss + beta * kl_of_bnpo / max(on_tokens, 1) - entropy_coef * entropy / max(on_tokens, 1)


def perturb(model, seed=1, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def check(trainer, rows, loss_type, beta=0.0, entropy_coef=0.0, f=regularized, weight=1.0, accumulation=1):
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    batch = [row for row in trainer.train_dataset for _ in range(GROUP)]
    inputs = trainer._prepare_inputs(batch)
    facts = whole_batch(trainer, model, rows)
    with torch.no_grad():
        old_logps = [logps_and_entropies(model, fact)[0] for fact in facts]
    perturb(model)  # ratios other than 1, so that clipping acts

    trainer.compute_loss(model, inputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = trainer.compute_loss(model, inputs).detach()

    model.zero_grad()
    micro_batches = trainer.args.steps_per_generation
    expected = objective(
        model, trainer.ref_model, facts, old_logps, loss_type, beta, entropy_coef, micro_batches, f, weight
    )
    expected = expected / accumulation  # every micro-batch is that part of its step
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    for name, parameter in model.named_parameters():
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
    check(make_trainer(rows, **options, **MISALIGNED), rows, "dr_grpo", f=f)


def test_demonstration_weight_scales_the_off_policy_term(make_trainer, rows):
    trainer = make_trainer(rows, demonstration_weight=0.3, **MISALIGNED)
    check(trainer, rows, "dr_grpo", weight=0.3)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_check_can_fail(make_trainer, rows, weight):
    trainer = make_trainer(rows, demonstration_weight=0.3, **MISALIGNED)
    with pytest.raises(AssertionError):
        check(trainer, rows, "dr_grpo", weight=weight)
