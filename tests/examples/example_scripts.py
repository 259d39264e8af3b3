"""Where the example lies, and how tests run its scripts."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "face_parsing"

# A run of a second or less.
QUICK = ["--model", "cnn-s", "--limit", "4", "--batch-size", "2", "--no-cache"]


def call(monkeypatch, script, *arguments):
    """Run the ``main`` of ``train`` or ``evaluate`` in this process; returns its exit code."""
    from faceparse import cli  # only after conftest.py has put the example on the path

    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    try:
        return cli.exit_code(script.main)
    except SystemExit as stop:  # argparse
        return stop.code


def refused(monkeypatch, capsys, script, *arguments):
    """The line on the error stream of a run that must end with exit code 2.

    Notices (a list shorter than the published one) may stand before it, and nothing else.
    """
    capsys.readouterr()
    assert call(monkeypatch, script, *arguments) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in notes)
    assert error.startswith("error: ")
    return error
