"""What `make test-gpu` makes of compute-sanitizer's answers, with a stand-in for the tool."""

import os
import sys
from pathlib import Path

import children
import pytest

SANITIZE = Path(__file__).parent / "gpu" / "sanitize.py"
sys.path += [str(SANITIZE.parent)]

import sanitize  # noqa: E402


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


@pytest.mark.parametrize(("answer", "says"), [("", "program of PyTorch alone"), ("echo", "FAILED")])
def test_run_out_of_time_fails_and_leaves_no_process(answer, says, tmp_path, monkeypatch, capsys):
    # The probe answers, or hangs as well; what the tool has started hangs with it.
    tool = tmp_path / "tool"
    tool.write_text(
        f'#!/bin/sh\n[ -n "{answer}" ] && [ "$6" = -c ] && echo probe: done && exit\n'
        f"sleep 100 & echo $! > {tmp_path}/pid; wait\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "MINUTES", 2 / 60)
    assert not sanitize.check(str(tool), "memcheck")
    told = capsys.readouterr().out
    assert says in told
    assert "not done after" in told
    assert children.has_ended(int((tmp_path / "pid").read_text()))
