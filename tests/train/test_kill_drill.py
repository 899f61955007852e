"""``make drill``: kill -9 five times, and once inside a save, changes nothing in the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_run_equals_uninterrupted_run():
    # One device, as on a laptop, whatever the tests are run on.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    drill = [sys.executable, str(ROOT / "tools" / "drill.py")]
    result = subprocess.run(drill, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    report = result.stdout.decode()
    print(report)
    assert result.returncode == 0, report
    assert "resumed from step" in report and "PASS" in report
