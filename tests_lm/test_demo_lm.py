"""The second demo on the real model: its beginning, and what Ctrl-C does. Its end is `make demo-lm`."""

import signal
import subprocess
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.demo_lm import sampled_answers, sums, unpacked_smollm2


def test_the_model_speaks_and_does_not_know_sums(tmp_path):
    base = unpacked_smollm2(tmp_path / "smollm2")
    made = (base / "model.safetensors").stat().st_mtime_ns
    assert unpacked_smollm2(base) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == made  # once
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = sums(seed=0)["test"].select(range(8))
    answers = sampled_answers(model, tokenizer, rows)
    assert answers == sampled_answers(model, tokenizer, rows)  # a fixed seed
    assert all(len(text) > 3 for text in answers.texts)
    assert answers.share < 0.5


def test_ctrl_c_ends_it_with_a_sentence(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by jobs in the background, and their children
    command = [sys.executable, "-m", "luffy_trl", "demo", "--model", "smollm2", "--output_dir", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1/4")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == f"Interrupted. What was finished, if anything, is in {tmp_path / 'out'}"
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == []
