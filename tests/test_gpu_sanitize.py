"""What `make test-gpu` makes of compute-sanitizer's answers, with a stand-in for the tool."""

import os
import sys
from pathlib import Path

import children
import pytest

SANITIZE = Path(__file__).parent / "gpu" / "sanitize.py"


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (None, 0, "NOT RUN, the tool is not on PATH"),
        ("echo Device not supported; exit 1", 0, "racecheck: NOT RUN"),
        ("echo probe: done; echo small grid: done", 0, "racecheck: nothing found"),
        ('echo probe: done; test "$6" = -c || exit 77', 1, "memcheck: FAILED, exit code 77"),
        ('echo probe: done; test "$6" = -c || exit 1', 1, "racecheck: FAILED, exit code 1"),
        ("echo probe: done", 1, "memcheck: FAILED, exit code 0"),
    ],
)
def test_findings_fail_and_a_missing_tool_is_told(answer, code, says, tmp_path):
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")
    if answer is not None:
        tool = tmp_path / "bin" / "compute-sanitizer"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
    elif Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("the tool is here")
    result = children.run(
        [sys.executable, str(SANITIZE)],
        env={"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path)},
    )
    assert (result.returncode, says in result.stdout) == (code, True), result.stdout
