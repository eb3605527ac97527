"""DeepSpeed's optimizer on the CPU under ZeRO 1 and 2: each micro-batch's gradient counts (not so before 0.19.8)."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import HUNG


@pytest.mark.slow
def test_a_step_of_several_micro_batches_with_offload_is_plain_torchs():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("run_offload.py")
    run = subprocess.run([sys.executable, script, str(port)], capture_output=True, text=True, timeout=HUNG)
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout.splitlines()[-1])
    assert set(differences) == {"1, none", "1, cpu", "2, none", "2, cpu"}
    assert max(differences.values()) < 1e-6
