"""What `make-demonstrations` is run with, from its flags: what cannot work is refused before a question is asked."""

import argparse
import inspect
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasets import Dataset
from trl import ScriptArguments

from ..advantages import ANSWER_REWARDS, TOTAL
from ..checks import check_reward_inputs, needed_columns, reward_name
from ..data.loading import choose_split
from ..data.schemas import user_text
from ..data.splitting import split_problems
from ..demonstrations.images import IMAGE_COLUMNS
from ..runs.redaction import known_secrets
from ..teaching.answers import file_stem
from ..teaching.in_transformers import TransformersTeacher
from ..teaching.in_vllm import VLLMTeacher
from ..teaching.output import check_place
from ..teaching.problems import MADE, found_in, in_contract, problems_of, with_system_prompt
from ..teaching.run import Making
from ..teaching.servers import Server
from ..teaching.student import Student
from ..teaching.teachers import LocalTeacher, Sampling, repeated
from .adapters import refuse_adapter
from .datasets_out import check_push
from .grading import make_grader, named_rewards
from .inputs import load_dataset_splits, load_reward_funcs


KEY_VARIABLE = "OPENAI_API_KEY"
MOST_CONNECTIONS = 1000  # openai/_constants.py


def check(args: argparse.Namespace) -> None:
    """What can be said without loading anything.

    Raises:
        ValueError: naming the flag.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "it runs in one process: start it without a launcher. Several GPUs are for --teacher_backend vllm "
            "--vllm_options '{\"tensor_parallel_size\": 2}', or for a server."
        )
    _check_teachers(args)
    _check_numbers(args)
    needs_student = [flag for flag, given in _read_by_the_student(args).items() if given]
    if needs_student and args.student is None:
        raise ValueError(f"{needs_student[0]} needs --student: which model will be trained on the demonstrations?")
    if args.logprobs and (args.max_demonstrations or 1) > 1:
        raise ValueError(
            f"--logprobs go with one demonstration a problem, in the column `completion`, and --max_demonstrations is "
            f"{args.max_demonstrations}: leave one of them out."
        )
    check_push(args)
    check_place(args.output_dir)


def _read_by_the_student(args: argparse.Namespace) -> dict[str, bool]:
    return {"--select probable": args.select == "probable", "--logprobs": args.logprobs}


def _check_teachers(args: argparse.Namespace) -> None:
    urls, models, variables = args.teacher_url, args.teacher_model, args.teacher_key_variable
    if not urls and not args.teacher_model_name_or_path:
        raise ValueError(
            "who is to answer? Give a server (--teacher_url with --teacher_model), or a model for this process "
            "(--teacher_model_name_or_path)."
        )
    if len(urls) != len(models):
        raise ValueError(
            f"--teacher_url and --teacher_model go together, one of each for a server: there are {len(urls)} and "
            f"{len(models)}."
        )
    if len(variables) > 1 and len(variables) != len(urls):
        raise ValueError(f"--teacher_key_variable is given {len(variables)} times: give one, or one for each server.")
    for url in urls:
        if not _is_address(url):
            raise ValueError(f"--teacher_url {url}: expected an address such as http://localhost:8000/v1.")
    for variable in variables:
        if not os.environ.get(variable):
            raise ValueError(f"--teacher_key_variable {variable}: there is no such variable in the environment.")
    if urls and find_spec("openai") is None:
        raise ValueError("--teacher_url needs the openai client: pip install 'luffy_trl[teacher]'.")
    if args.teacher_model_name_or_path and args.teacher_backend == "vllm" and find_spec("vllm") is None:
        raise ValueError("--teacher_backend vllm needs vLLM: pip install 'luffy_trl[vllm]'.")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        return False


def _check_numbers(args: argparse.Namespace) -> None:
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature} must be 0 or more.")
    if args.temperature == 0 and args.num_samples > 1:
        raise ValueError("--temperature 0 gives the same answer each time: add --num_samples 1 to it.")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p {args.top_p} must be above 0 and at most 1.")
    if not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout {args.timeout} must be a number of seconds above 0.")
    if args.concurrency > MOST_CONNECTIONS:
        raise ValueError(
            f"--concurrency {args.concurrency} is more than the {MOST_CONNECTIONS} that the client opens."
        )
    if args.ngram_size < 0:
        raise ValueError(f"--ngram_size {args.ngram_size} must be 0 or more.")
    if args.max_retries < 0:
        raise ValueError(f"--max_retries {args.max_retries} must be 0 or more.")


def making(args: argparse.Namespace, argv: Sequence[str]) -> Making:
    """Everything loaded but models' weights.

    Raises:
        ValueError: for data, rewards, models or answers of an earlier run that do not go together.
        OSError: for what cannot be read.
    """
    where = f"--dataset_name {args.dataset_name}"
    functions = named_rewards(load_reward_funcs(args.reward_funcs, args.dataset_name))
    grader = make_grader(args, functions, where)
    dataset = _load_problems(args, where)
    _check_rewards(args, list(functions.values()), dataset, where)
    dataset, test, split = _split(args, dataset)
    problems = problems_of(dataset, args.teacher_system_prompt, where)
    student = _student(args, dataset)
    servers, models = _servers(args), _models(args)
    _check_names([teacher.name for teacher in (*servers, *models)])
    judged = f"the reward `{grader.deciding}`" if grader.deciding else f"the {TOTAL} of {', '.join(functions)}"
    return Making(
        output_dir=args.output_dir,
        source=args.dataset_name,
        dataset=dataset,
        test=test,
        split=split,
        problems=problems,
        found=found_in(dataset, problems, where),
        servers=servers,
        models=models,
        shared={"system_prompt": args.system_prompt, "teacher_system_prompt": args.teacher_system_prompt},
        num_samples=args.num_samples,
        grader=grader,
        student=student,
        how=args.select,
        maximum=args.max_demonstrations or (None if args.select == "all" and not args.logprobs else 1),
        logprobs=args.logprobs,
        right_if=f"{judged} is {args.solved_threshold:g} or more",
        load=args.push_to_hub or args.output_dir.name,
        argv=argv,
        secrets=known_secrets(*(server.key for server in servers)),
    )


# The problems, and what is right


def _load_problems(args: argparse.Namespace, where: str) -> Dataset:
    chosen = ScriptArguments(dataset_config=args.dataset_config, dataset_train_split=args.dataset_split)
    splits = load_dataset_splits(args.dataset_name, chosen, args.seed)
    dataset = choose_split(splits, args.dataset_split, where, "--dataset_split")
    assert isinstance(dataset, Dataset)
    dataset = in_contract(dataset, where, args.prompt_column, args.solution_column)
    if images := [name for name in IMAGE_COLUMNS if name in dataset.column_names]:
        raise ValueError(f"{where} has images ({images[0]}), which teachers are not shown. Leave the column out.")
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    return with_system_prompt(dataset, args.system_prompt, where)


def _split(args: argparse.Namespace, dataset: Dataset) -> tuple[Dataset, Dataset | None, str]:
    """The problems to be solved, those of a test split, and a sentence on both."""
    if args.test_size is None:
        return dataset, None, ""
    texts = (user_text(prompt) for prompt in dataset["prompt"][:])
    split = split_problems(texts, args.test_size, args.seed, args.ngram_size)
    rows = range(len(dataset))
    test = [row for row in rows if row in split.test]
    return dataset.select([row for row in rows if row not in split.test]), dataset.select(test), split.says()


def _check_rewards(args: argparse.Namespace, functions: Sequence[Callable], dataset: Dataset, where: str) -> None:
    check_reward_inputs(functions, dataset, "--reward_funcs", where, [name for name in MADE if name != "teacher"])
    names = [reward_name(function) for function in functions]
    if len(names) > 1 and args.solved_reward is None and not set(names) & set(ANSWER_REWARDS):
        raise ValueError(
            f"--solved_reward is missing: which of {', '.join(names)} says that an answer is right? ({TOTAL}: their "
            "weighted sum.)"
        )
    for function in functions:
        if "completion_ids" in _arguments(function) and args.student is None:
            raise ValueError(
                f"--reward_funcs {reward_name(function)} reads `completion_ids`, token ids: give --student, whose "
                "tokens they are."
            )


def _arguments(function: Callable) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # compiled code: nobody knows what it reads
        return needed_columns(function)


# The models


def _student(args: argparse.Namespace, dataset: Dataset) -> Student | None:
    if args.student is None:
        return None
    _refuse_adapter("--student", args.student)
    student = Student(args.student, args.dtype, args.device)
    for sentence in student.check(dataset):
        print(f"Note: {sentence}", flush=True)
    return student


def _refuse_adapter(flag: str, model: str) -> None:
    try:
        refuse_adapter(f"{flag} {model}", model)
    except OSError as error:
        raise ValueError(
            f"{flag} {model}: there is no such directory, and nothing to be had from the Hub: {error}"
        ) from error


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.max_tokens, args.seed, args.logprobs)


def _servers(args: argparse.Namespace) -> list[Server]:
    variables = args.teacher_key_variable or [KEY_VARIABLE]
    variables = variables if len(variables) > 1 else variables * len(args.teacher_url)
    limits = (args.concurrency, args.timeout, args.max_retries)
    return [
        Server(model, url, os.environ.get(variable) or None, _sampling(args), args.extra_body, *limits)
        for url, model, variable in zip(args.teacher_url, args.teacher_model, variables, strict=True)
    ]


def _models(args: argparse.Namespace) -> list[LocalTeacher]:
    made: list[LocalTeacher] = []
    for path in args.teacher_model_name_or_path:
        _refuse_adapter("--teacher_model_name_or_path", path)
        name = Path(path).resolve().name if Path(path).is_dir() else path
        own: dict[str, Any] = {"name": name, "path": path, "sampling": _sampling(args), "dtype": args.dtype}
        if args.teacher_backend == "vllm":
            made.append(VLLMTeacher(**own, options=args.vllm_options, chunk_size=args.chunk_size))
        else:
            made.append(TransformersTeacher(**own, device=args.device, batch_size=args.batch_size))
    return made


def _check_names(names: Sequence[str]) -> None:
    """Answers are kept by the teachers' names."""
    twice = repeated(names) or repeated(map(file_stem, names))
    if twice is not None:
        raise ValueError(f"two teachers are called {twice}, and answers are kept by name: rename one.")
