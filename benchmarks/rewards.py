"""math_reward against TRL's reasoning_accuracy_reward, which verifies one completion after the other.

Groups of eight completions, as in training: half of them right, each with its own thought and response, none of them
hostile. Every run has other problems, so that nothing is remembered from the last one. The two alternate; medians are
reported, without the first run, which starts the workers. Both rewards are also checked against the known truth.

    python benchmarks/rewards.py                        # problems and texts made on the spot
    python benchmarks/rewards.py --data ../shared/data  # the six benchmarks' gold answers, texts of real traces
"""

import argparse
import json
import operator
import os
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import pandas as pd
from measuring import spread, watched_machine, write_record
from tqdm import tqdm
from trl.rewards import reasoning_accuracy_reward

from luffy_trl.reporting.tables_and_curves import text_table
from luffy_trl.rewards import math_reward
from luffy_trl.rewards.pool import default_workers


REWARDS = {"TRL": reasoning_accuracy_reward, "LUFFY": math_reward}
STEPS = [
    "First simplify the expression: $x^2 - {a}x + {b} = 0$, so the sum of the roots is ${a}$.",
    "Let me check that again. With $n = {a}$ we get \\[ \\frac{{n(n+1)}}{{2}} = {b}, \\] which does not fit.",
    "Wait, the triangle is right-angled, so its hypotenuse is $\\sqrt{{{a}^2 + {b}^2}}$.",
    "Try the substitution $u = {a}x + {b}$; then $du = {a}\\,dx$ and the integral is easy.",
]
GOLDS = [
    "{a}",
    "\\frac{{{a}}}{{{b}}}",
    "{a}\\sqrt{{{b}}}",
    "({a}, {b})",
    "{a}x + {b}",
    "{a}.{b}",
    "{a}, {b}",
    "{a}\\pi",
]


def made_up(rng: random.Random, templates: list[str]) -> str:
    return rng.choice(templates).format(a=rng.randint(2, 999), b=rng.randint(2, 999))


def load_problems(data: Path | None, rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Gold answers, and (thought, response) texts to put them into."""
    if data is None:
        texts = [
            [
                "\n".join(made_up(rng, STEPS) for _ in range(count))
                for count in (rng.randint(20, 120), rng.randint(3, 8))
            ]
            for _ in range(50)
        ]
        return [made_up(rng, GOLDS) for _ in range(1590)], [(thought, response) for thought, response in texts]
    golds = [row["ground_truth"] for row in pd.read_parquet(data / "math_benchmarks.parquet").reward_model]
    rng.shuffle(golds)
    traces = json.loads((data / "reasoning_traces.json").read_text())
    return golds, [(trace["thinking"], trace["response"].partition("\\boxed")[0]) for trace in traces]


def make_run(run: int, args, golds: list[str], texts: list[tuple[str, str]], rng: random.Random):
    """Completions, their gold answers, and the rewards that they should get."""
    rows = []
    for i in range(args.completions):
        gold = golds[(run * args.completions + i) // args.group_size % len(golds)]
        other = rng.choice(golds)
        right = rng.random() < 0.5
        thought, response = rng.choice(texts)
        content = (
            f"<think>\nAttempt {i}.{run}\n{thought}\n</think>\n\n{response}\n\n\\boxed{{{gold if right else other}}}"
        )
        # `$...$` is the form in which TRL's reward reads every gold answer as LaTeX
        solution = gold if "$" in gold else f"${gold}$"
        rows.append(([{"role": "assistant", "content": content}], solution, float(right or other == gold)))
    return zip(*rows, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completions", type=int, default=990, help="of one call")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with math_benchmarks.parquet and reasoning_traces.json")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    golds, texts = load_problems(args.data, rng)
    seconds, agreement = defaultdict(list), defaultdict(list)
    with watched_machine() as machine:
        for run in tqdm(range(args.runs + 1), desc="Runs of both rewards", unit="run"):
            completions, solutions, truth = make_run(run, args, golds, texts, rng)
            for name, reward in REWARDS.items() if run % 2 else reversed(REWARDS.items()):
                start = time.perf_counter()
                rewards = reward(list(completions), solution=list(solutions))
                seconds[name].append(time.perf_counter() - start)
                agreement[name].append(sum(map(operator.eq, rewards, truth)) / len(truth))
    first = {name: values.pop(0) for name, values in seconds.items()}
    results = {name: spread(values) for name, values in seconds.items()}
    rows = [
        [
            name,
            f"{r['median']:.2f}",
            f"{r['min']:.2f}-{r['max']:.2f}",
            f"{first[name]:.2f}",
            f"{statistics.mean(agreement[name]):.2%}",
        ]
        for name, r in results.items()
    ]
    print(text_table([f"{args.completions} completions", "s", "min-max", "first call", "as expected"], rows))
    ratio = results["LUFFY"]["median"] / results["TRL"]["median"]
    print(f"ratio {ratio:.2f}, with {default_workers()} workers")
    if args.output:
        write_record(
            args.output,
            args,
            machine,
            results,
            ("trl", "math-verify", "sympy"),
            cores=f"{len(os.sched_getaffinity(0))} cores, {default_workers()} workers",
            data="six benchmarks and real traces" if args.data else "made up",
            first_call=first,
            as_expected={name: statistics.mean(values) for name, values in agreement.items()},
        )


if __name__ == "__main__":
    main()
