"""`luffy-trl report`: from directories as runs leave them to a page, read back by an HTML parser."""

import copy
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from luffy_trl.commands.cli import main
from luffy_trl.reporting.finding import find_runs, read_runs
from luffy_trl.reporting.panels import bounds, filled_panels, thinned, ticks
from luffy_trl.reporting.token_probs import pieces

from .conftest import save_tiny_qwen2


HOSTILE = (
    "<!--<script></script x></script><script>document.title='taken'</script><img src=x onerror=alert(1)> & \u2028"
)


class Page(HTMLParser):
    """Elements, the text of each script of data, and the text that a reader sees."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.data: list[tuple[dict, str]] = []
        self.text = ""
        self._raw: dict | None = None
        self.feed(html)
        self.panels = [attributes["id"] for tag, attributes in self.elements if tag == "figure"]
        self.steps = [(a, json.loads(text)) for a, text in self.data if a.get("class") == "step"]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = dict(attrs) if tag in ("script", "style") else None
        self.text += " " if tag in ("td", "th") else ""

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if self._raw is None:
            self.text += data
        elif self._raw.get("type") == "application/json":
            self.data.append((self._raw, data))


def state(steps: int, max_steps: int = 4, **metrics) -> str:
    lines = [{"step": s, "loss": 0.5 / s, **{k: v(s) for k, v in metrics.items()}} for s in range(1, steps + 1)]
    return json.dumps({"global_step": steps, "max_steps": max_steps, "log_history": lines})


def write_completions(run, step: int, completions: list[str], prompts: list | None = None):
    folder = run / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    n = len(completions)
    pd.DataFrame(
        {
            "step": step,
            "prompt": prompts or ["Why?"] * n,
            "completion": completions,
            "my_reward": [1.0] + [math.nan] * (n - 1),
            "demonstration": [i == n - 1 for i in range(n)],
            "advantage": [0.5] * n,
        }
    ).to_parquet(folder / f"completions_{step:05d}.parquet")


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    rewards = {"on_policy/reward": lambda s: s / 10, "off_policy/reward": lambda s: 1}
    (directory / "trainer_state.json").write_text(state(4, **rewards))
    return directory


def report(tmp_path, *arguments) -> Page:
    main(["report", *map(str, arguments), "--output_dir", str(tmp_path / "report")])
    return Page((tmp_path / "report" / "report.html").read_text())


def test_two_runs_make_one_page_without_addresses_and_without_empty_panels(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "trainer_state.json").write_text(state(2, **{"on_policy/entropy": lambda s: math.nan if s == 1 else 0.3}))
    write_completions(run, 4, ["a", "b"])
    page = report(tmp_path, run, other)
    assert page.panels == ["panel-reward", "panel-entropy", "panel-loss"]
    assert sorted(p.stem for p in (tmp_path / "report").glob("*.png")) == ["entropy", "loss", "reward"]
    html = (tmp_path / "report" / "report.html").read_text()
    assert re.findall(r"https?://\S+", html) == ['http://www.w3.org/2000/svg",']  # a name, never loaded
    assert not any({"src", "href", "action"} & set(attributes) for _, attributes in page.elements)
    paths = [a["d"] for tag, a in page.elements if tag == "path" and "stroke-width" in a]
    assert len(paths) == 5  # reward: 2 of run; entropy: 1 of other; loss: 1 each
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)*", d) for d in paths)
    assert "4 of 4" in " ".join(page.text.split())
    assert "not finished" in page.text


@pytest.mark.parametrize(
    "card",
    [
        "torch 1.0\n\nVersions: luffy_trl 0.1.0, trl 1.16.0, torch 2.13.0+cpu, datasets 5.2.0.\n",
        "### Framework versions\n\n- TRL: 1.16.0\n- Pytorch: 2.13.0+cpu\n- Datasets: 5.2.0\n",
    ],
)
def test_versions_come_from_the_model_card(card, run):
    (run / "README.md").write_text(card)
    [found] = read_runs(run, "run")
    versions = found.versions
    assert {name.lower(): v for name, v in versions.items() if "luffy" not in name} in (
        {"trl": "1.16.0", "torch": "2.13.0+cpu"},
        {"trl": "1.16.0", "pytorch": "2.13.0+cpu"},
    )


def test_a_curve_lies_where_its_values_say(run, tmp_path):
    page = report(tmp_path, run)
    first = next(a["d"] for tag, a in page.elements if tag == "path" and "stroke-width" in a)
    # rewards 0.1 to 0.4 beside demonstrations' 1: the axis is 0 to 1 over heights 194 to 8, steps over 52 to 392
    points = [[float(n) for n in point.split()] for point in first[1:].split("L")]
    expected = [[52 + (s - 1) / 3 * 340, 194 - s / 10 * 186] for s in (1, 2, 3, 4)]
    assert points == [pytest.approx(point, abs=0.06) for point in expected]


def test_text_of_a_completion_never_becomes_markup(run, tmp_path):
    write_completions(run, 3, [HOSTILE, HOSTILE], prompts=[HOSTILE, HOSTILE])
    page = report(tmp_path, run)
    assert [tag for tag, _ in page.elements].count("img") == 0
    assert len([a for tag, a in page.elements if tag == "script" and "type" not in a]) == 1
    assert not any("<" in text for _, text in page.data)
    [(_, groups)] = page.steps
    assert groups[0]["prompt"] == HOSTILE
    assert [row["text"] for row in groups[0]["rows"]] == [HOSTILE, HOSTILE]


def test_a_run_may_have_any_name(run, tmp_path):
    run = run.rename(tmp_path / "<b>$x_1")
    page = report(tmp_path, run)
    assert "<b>$x_1" in page.text
    assert "b" not in {a.get("id") for tag, a in page.elements if tag == "b"}


def test_groups_hold_rollouts_and_demonstrations_with_their_rewards(run, tmp_path):
    chat = [[{"role": "user", "content": "1 + 1?"}]] * 2
    write_completions(run, 4, [[{"role": "assistant", "content": c}] for c in ("two", "2")], prompts=chat)
    [(attributes, [group])] = report(tmp_path, run).steps
    assert attributes["data-step"] == "4"
    assert group["prompt"] == "user: 1 + 1?"
    assert group["rows"] == [
        {"text": "two", "rewards": {"my_reward": 1.0}, "demonstration": False, "advantage": 0.5},
        {"text": "2", "rewards": {"my_reward": None}, "demonstration": True, "advantage": 0.5},
    ]


def test_trajectories_are_shown_turn_by_turn(run, tmp_path):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": None}}}]
    acted = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "7"},
        {"role": "assistant", "content": "7."},
    ]
    write_completions(run, 4, [[{"role": "assistant", "content": "two"}], acted])
    [(_, [group])] = report(tmp_path, run).steps
    assert [row["text"] for row in group["rows"]] == [
        "two",
        'assistant:\n  calls add({"a": 3})\ntool add: 7\nassistant: 7.',
    ]


def test_limits_spread_over_the_steps_and_are_said(run, tmp_path, capsys):
    for step in range(1, 101):
        write_completions(run, step, ["x" * 9000, "y"])
    page = report(tmp_path, run, "--completions", 10)
    assert [a["data-step"] for a, _ in page.steps] == ["1", "26", "51", "75", "100"]
    text = page.steps[0][1][0]["rows"][0]["text"]
    assert "[... 5,000 characters left out ...]" in text
    assert len(text) < 4100
    assert "completions of 5 of the 100 logged steps are shown" in capsys.readouterr().out
    one = report(tmp_path, run, "--completions", 1)
    assert [len(group["rows"]) for _, groups in one.steps for group in groups] == [1]
    assert "1 more completions of the shown steps are left out" in capsys.readouterr().out
    assert report(tmp_path, run, "--completions", 0).steps == []


def test_a_run_still_going_is_read_from_its_newest_whole_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(state(step))
        size = (checkpoint / "trainer_state.json").stat().st_size
        (checkpoint / "manifest.json").write_text(json.dumps({"files": {"trainer_state.json": size + (step == 3)}}))
    (run / "trainer_state.json").write_text(state(1))  # of an earlier start
    [found] = read_runs(run, "run")
    assert (found.source, found.step, found.finished) == ("checkpoint-2/trainer_state.json", 2, False)
    assert found.curve("loss") == [(1, 0.5), (2, 0.25)]
    assert found.notes[0].startswith("checkpoint-3 was skipped: trainer_state.json has")


def named_checkpoint(directory, step: int, run_name: str | None, **metrics):
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(state(step, **metrics))
    if run_name is not None:
        (checkpoint / "manifest.json").write_text(json.dumps({"files": {}, "run": run_name}))


def test_runs_of_one_directory_are_told_apart_by_their_names(tmp_path):
    run = tmp_path / "run"
    named_checkpoint(run, 2, "mine")
    named_checkpoint(run, 7, "another")
    named_checkpoint(run, 5, "another")
    (run / ".run.json").write_text(json.dumps({"run": "mine", "continues_unnamed": False}))
    (run / "trainer_state.json").write_text(state(4))
    write_completions(run, 4, ["a", "b"])
    found = read_runs(run, "run")
    assert [(r.name, r.source, r.step, r.has_completions) for r in found] == [
        ("run", "trainer_state.json", 4, True),
        ("run/checkpoint-7", "checkpoint-7/trainer_state.json", 7, False),
    ]
    page = report(tmp_path, run)
    assert "Report of 2 runs" in page.text
    assert [a["data-run"] for a, _ in page.steps] == ["0"]


def test_runs_of_other_trainers_are_told_apart_by_how_they_begin(tmp_path):
    run = tmp_path / "run"
    named_checkpoint(run, 8, None, learning_rate=lambda s: 1e-3)  # of an earlier run, of more steps
    named_checkpoint(run, 3, None)
    (run / "trainer_state.json").write_text(state(4))
    os.utime(run / "checkpoint-8" / "trainer_state.json", (1, 1))
    assert [(r.name, r.step) for r in read_runs(run, "run")] == [("run", 4), ("run/checkpoint-8", 8)]


def test_runs_that_were_there_before_are_shown_unless_the_latest_is_asked_for(run, tmp_path):
    for number in (1, 2, 10):
        folder = run / f"_earlier-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state(number))
        write_completions(folder, number, ["a", "b"])
    names = [f"run/_earlier-{number}" for number in (10, 2, 1)]
    assert [r.name for r in find_runs([run])] == ["run", *names]
    page = report(tmp_path, run)
    assert [(a["data-run"], a["data-step"]) for a, _ in page.steps] == [("1", "10"), ("2", "2"), ("3", "1")]
    page = report(tmp_path, run, "--latest")
    assert "Report of 1 run\n" in page.text
    assert page.steps == []


def test_a_directory_of_runs_is_all_of_them(run, tmp_path):
    (tmp_path / "all" / "notes").mkdir(parents=True)
    for name in ("b", "a"):
        shutil.copytree(run, tmp_path / "all" / name)
    assert [r.name for r in find_runs([tmp_path / "all"])] == ["a", "b"]
    assert [r.name for r in find_runs([tmp_path / "all", run])] == ["all/a", "all/b", "run"]


def test_a_completions_file_being_written_is_skipped_and_counted(run, tmp_path, capsys):
    write_completions(run, 1, ["a", "b"])
    (run / "completions" / "completions_00002.parquet").write_bytes(b"PAR1 not yet")
    assert len(report(tmp_path, run).steps) == 1
    assert "1 files of completions cannot be read" in capsys.readouterr().out


MESSAGE = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (["Why?", "How?"], "Why?\nHow?"),
        ([MESSAGE, None], "user: Why?\n"),
        ([{"role": "user", "content": ["Why?", None]}], "user: Why?None"),
        ([{"role": "user", "content": None}], "user: "),
    ],
)
def test_messages_may_have_any_form(prompt, shown, run, tmp_path):
    write_completions(run, 4, [prompt, prompt], prompts=[prompt, prompt])
    [(_, [group])] = report(tmp_path, run).steps
    assert group["prompt"] == shown
    assert [row["text"] for row in group["rows"]] == [shown.replace("user: ", "").replace("\n", "")] * 2


def test_each_run_shows_at_least_one_completion(run, tmp_path, capsys):
    runs = [run]
    for name in ("second", "third"):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        (runs[-1] / "trainer_state.json").write_text(state(4))
    for directory in runs:
        write_completions(directory, 4, ["a", "b"])
    page = report(tmp_path, *runs, "--completions", 2)
    assert [(a["data-run"], len(groups[0]["rows"])) for a, groups in page.steps] == [("0", 1), ("1", 1), ("2", 1)]
    assert page.text.count("1 more completions of the shown steps are left out") == 3
    assert "3 completions" in capsys.readouterr().out


def test_steps_without_room_are_counted_as_left_out(run, tmp_path, capsys):
    for step, n in ((1, 9), (2, 9), (3, 2)):
        write_completions(run, step, ["x"] * n)
    assert len(report(tmp_path, run, "--completions", 6).steps) == 2
    assert "completions of 2 of the 3 logged steps are shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no directory"),
        (["nothing"], "nothing has neither a trainer_state.json nor a whole checkpoint nor completions"),
        (["run", "run/."], "The same directory is given twice"),
        (["run", "--completions", "-1"], "--completions -1 must be 0 or more"),
        (["run", "--model", "nowhere"], "--model nowhere cannot be loaded"),
        (["run", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"global_step": "x", "max_steps": 1, "log_history": []}', "[" * 10**5])
def test_a_state_that_is_none_is_said(text, run, tmp_path, capsys):
    (run / "trainer_state.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    assert "trainer_state.json " in capsys.readouterr().err


def test_tokens_have_their_probability_under_the_model(run, tmp_path, tiny_model_dir, tokenizer):
    write_completions(run, 4, ["a;b#b", "c#c"], prompts=["Da+1:", "Da+1:"])
    page = report(tmp_path, run, "--model", tiny_model_dir)
    tokens = page.steps[0][1][0]["rows"][0]["tokens"]
    assert [text for text, _ in tokens] == list("a;b#b")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = tokenizer("Da+1:a;b#b", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probs = model(ids).logits[0, :-1].softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert [p for _, p in tokens] == pytest.approx(probs[-5:].tolist(), rel=5e-3)
    assert "not under the policy at that step" in page.text


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_coloured_pieces_are_the_text_whatever_the_tokens(trim_offsets, run, tmp_path, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)  # of bytes: three of them are one character's
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    model = save_tiny_qwen2(tmp_path / "model", tokenizer, max_position_embeddings=64)
    text = " é ≤  😀 ok\n "
    write_completions(run, 4, [text, text * 9], prompts=["Why?", "Why?"])
    short, long = report(tmp_path, run, "--model", model).steps[0][1][0]["rows"]
    assert "".join(piece for piece, _ in short["tokens"]) == text
    assert [piece.strip() for piece, p in short["tokens"] if p is not None and piece.strip()] == list("é≤😀ok")
    *shown, (left_out, _) = long["tokens"]
    count = int(re.fullmatch(r" \[\.\.\. (\d+) characters left out \.\.\.\]", left_out)[1])
    assert "".join(piece for piece, _ in shown) == (text * 9)[:-count]


def test_bytes_of_a_character_are_one_piece_with_their_product():
    assert pieces("≤ a", [1, 1, 1, 3], [0.5, 0.25, 0.5, 0.125]) == ([("≤", 0.0625), (" a", 0.125)], "")


CHAT = [[{"role": "user", "content": "Why?"}]] * 2


@pytest.mark.parametrize(
    ("template", "prompts", "message"),
    [
        (None, CHAT, "has no chat template, and the prompts are conversations"),
        ("{{ raise_exception('system first') }}", CHAT, "its chat template refuses a prompt: system first"),
        (
            "{% for m in messages %}{{ m['role'] + '' }}{% endfor %}",
            [["Why?"]] * 2,
            "its chat template refuses a prompt: ",
        ),
        ("damaged", CHAT, "cannot be loaded: Error while deserializing header"),
        ("another tokenizer", ["Why?", "Why?"], "has no embedding for a token"),
    ],
)
def test_a_model_that_cannot_read_the_prompts_is_said(
    template, prompts, message, run, tmp_path, chat_tokenizer, tokenizer, capsys
):
    write_completions(run, 4, ["a", "b"], prompts=prompts)
    tokenizer = copy.deepcopy(tokenizer if template == "another tokenizer" else chat_tokenizer)
    tokenizer.chat_template = template
    model = save_tiny_qwen2(tmp_path / "model", tokenizer, max_position_embeddings=64)
    if template == "damaged":
        (model / "model.safetensors").write_bytes(b"\x08" + b"\0" * 40)
    if template == "another tokenizer":
        chat_tokenizer.save_pretrained(model)
    with pytest.raises(SystemExit) as stop:
        report(tmp_path, run, "--model", model)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_with_few_positions_colours_what_it_can(run, tmp_path, chat_tokenizer):
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": len(chat_tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    write_completions(run, 4, ["b" * 30] * 2, prompts=["Why?", "Why?" * 4])
    page = report(tmp_path, run, "--model", tmp_path / "model")
    [first], [second] = [group["rows"] for group in page.steps[0][1]]
    assert [len(piece) for piece, p in first["tokens"] if p is not None] == [1] * 12
    assert "tokens" not in second
    assert "16 tokens with the prompt are looked at. 1 completions are not coloured" in page.text


def test_long_curves_are_means_of_neighbours():
    curve = [(float(i), float(i % 2)) for i in range(10_000)]
    thin = thinned(curve)
    assert len(thin) == 400
    assert thin[0] == (12.0, pytest.approx(12 / 25))  # 0 to 24: 12 odd numbers
    assert thinned(curve[:400]) == curve[:400]


def test_the_legend_has_the_last_logged_value(run, tmp_path):
    (run / "trainer_state.json").write_text(state(801, **{"on_policy/reward": lambda s: float(s == 801)}))
    assert "last rollouts run 1 " in " ".join(report(tmp_path, run).text.split())


def test_the_legends_of_all_panels_have_a_row_for_each_run(run, tmp_path):
    """So cards beside each other are of one height, whatever the runs have logged."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "trainer_state.json").write_text(state(2, **{"on_policy/entropy": lambda s: 0.3}))
    text = " ".join(report(tmp_path, run, other).text.split())
    assert "Reward mean of a completion" in text
    assert "last rollouts demonstrations run 0.4 1 other - -" in text
    assert "last rollouts run - other 0.3" in text


@pytest.mark.filterwarnings("error")
def test_pictures_of_many_lines_have_room_for_them(run, tmp_path):
    for n in range(9):
        shutil.copytree(run, tmp_path / "all" / f"run_{n}_with_a_name")
    report(tmp_path, tmp_path / "all")
    with Image.open(tmp_path / "report" / "reward.png") as many, Image.open(tmp_path / "report" / "loss.png") as fewer:
        assert many.width == fewer.width
        assert many.height > fewer.height > 352  # 18 lines, 9, and a picture's usual height


def test_each_evaluation_set_is_a_line(run, tmp_path):
    sets = {"eval_easy_reward": lambda s: 0.5, "eval_easy_runtime": lambda s: 1, "eval_hard_reward": lambda s: 0.1}
    own = {"eval_hard_runtime": lambda s: 1, "eval_format_reward": lambda s: 7}  # logged by a reward function
    (run / "trainer_state.json").write_text(state(4, **sets, **own))
    page = report(tmp_path, run)
    assert page.panels == ["panel-eval_reward", "panel-loss"]
    assert "Reward in evaluation mean of a completion" in page.text
    assert "last easy hard run 0.5 0.1" in " ".join(page.text.split())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ([10**400, 1.0], True),
        ([-1e308, 1e308, 2], True),
        ([math.inf, -math.inf, 2], True),
        ([-1e200, 1e200], False),
        ([0, 5e-324], False),
        ([5e-324, 5e-324], False),
        ([1e-200, 1.1e-200], False),
    ],
)
def test_numbers_of_any_size_are_drawn_or_said_to_be_left_out(values, left_out, run, tmp_path):
    lines = [{"step": 10**16 * s, "loss": value} for s, value in enumerate(values)]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 4, "max_steps": 4, "log_history": lines}))
    page = report(tmp_path, run)
    assert page.panels == ["panel-loss"]
    assert ("logged values are infinite or beyond 1e+200" in page.text) == left_out


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.03, 0.17, [0, 0.05, 0.1, 0.15, 0.2]), (-7, 12, [-10, -5, 0, 5, 10, 15])],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_a_constant_has_an_axis(value, run):
    [found] = read_runs(run, "run")
    found.history = [{"step": 1.0, "loss": value}]
    [(_, series)] = filled_panels([found])
    _, _, low, high = bounds(series)
    assert low < high
    values = ticks(low, high)
    assert values[0] <= low
    assert values[-1] >= high * (1 - 1e-6)
    assert 2 <= len(values) <= 7
