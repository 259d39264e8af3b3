"""Processes that tests start: none of them, nor what it started, outlives its test."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def run(command, *, timeout=120, check=False, **options):
    """`subprocess.run` with captured text; a child that is stopped early takes its children along.

    Args:
        timeout: seconds; a child that takes longer is an error of the test.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in command]
    with subprocess.Popen(command, start_new_session=True, **(pipes | options)) as process:
        try:
            output = process.communicate(timeout=timeout)
        except BaseException:  # of the limit of the test, or Ctrl-C, too
            stop(process)
            raise
    result = subprocess.CompletedProcess(command, process.returncode, *output)
    if check:
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def stop(process, first=signal.SIGTERM, patience=20):
    """Ends a process that has a session of its own, and all others in it.

    Args:
        first: a signal on which it may end by itself; torchrun passes SIGTERM on to its processes.
        patience: seconds that it has for that.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, first)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        os.killpg(process.pid, signal.SIGKILL)


def has_ended(pid, seconds=60):
    """Whether a process that is not ours to wait for ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if "zombie" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False
