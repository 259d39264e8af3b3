"""A training ends with the process that started it, from its first moment on."""

import argparse
import os
import signal
import subprocess
import sys

import children
import pytest
from example_scripts import EXAMPLE

from faceparse.training import jobs

WATCHED = EXAMPLE / "faceparse" / "end_with_parent.py"
# Starts a script that watches this process, as `jobs.start` does.
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), sys.argv[2]]).wait()
"""
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
print("begun", flush=True)
time.sleep(600)
"""
IGNORES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("script", "last_words"), [(SAVES, "saved\n"), (IGNORES, "")])
def test_a_script_ends_when_its_parent_is_killed(script, last_words, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-c", PARENT, WATCHED, path]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, start_new_session=True, **pipes) as parent:
        try:
            assert parent.stdout.readline() == "begun\n"
            parent.kill()
            assert parent.stdout.read() == last_words  # to the end of the last that can write
        finally:
            children.stop(parent)


def test_a_script_whose_parent_has_gone_before_does_not_begin(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import time; time.sleep(600)")
    done = children.run([sys.executable, WATCHED, 0, path])
    assert done.returncode == -signal.SIGTERM


def test_trainings_watch_who_starts_them(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    args = argparse.Namespace(out=tmp_path, device="cpu", cache=tmp_path, jobs=1)
    args.skip_bad = args.no_cache = False
    jobs.start(args, jobs.Job("one", jobs.config_file("table-3/nose"), None), {})
    script = str(EXAMPLE / "train.py")
    assert commands[0][:4] == [sys.executable, str(WATCHED), str(os.getpid()), script]
