"""What is printed of file names: no command to the terminal, no error of its encoding."""

import io
import re
import sys

import pytest
from example_scripts import EXAMPLE

from faceparse import cli
from faceparse.console import accept_every_name, printable, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Zoë 日本 🙂.jpg", "Zoë 日本 🙂.jpg"),
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("a\x9b2Jb", "a\\x9b2Jb"),
        ("a\r\nb\tc\x7f", "a\\r\\nb\\tc\\x7f"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),  # would be shown from right to left
        ("a\u2028b\u200b", "a\\u2028b\\u200b"),
        ("a\udcffb", "a\\udcffb"),  # a byte that is no UTF-8
        ("a\\x1b", "a\\x1b"),
    ],
)
def test_what_does_not_print_is_spelled_out(text, shown, capsys):
    assert printable(text) == shown
    say(text, f"{text}!")
    say(text, file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == f"{shown}\n{shown}!\n"
    assert captured.err == f"{shown}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_name_is_an_error_of_the_terminals_encoding(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main():
        say("results in 日本\udcff")
        raise cli.DataError("Zo\u0308e\x1b[2J\nis no face")

    assert cli.exit_code(main) == cli.WRONG
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    name = "日本" if encoding == "utf-8" else "\\u65e5\\u672c"
    assert out == f"results in {name}\\udcff\n"
    dots = "\u0308" if encoding == "utf-8" else "\\u0308"
    assert err == f"error: Zo{dots}e\\x1b[2J is no face\n"


def test_streams_that_cannot_be_set_up_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    accept_every_name()


def test_a_wrong_argument_is_printed_without_its_escapes(capsys):
    with pytest.raises(SystemExit):
        cli.Parser().parse_args(["--\x1b[2J\nx"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --\\x1b[2J x\n"


def test_everything_is_printed_by_one_function():
    other = re.compile(r"\bprint\(|\.write\(.*std(out|err)|sys\.std\w+\.write")
    files = [*EXAMPLE.glob("*.py"), *(EXAMPLE / "faceparse").rglob("*.py")]
    files = [path for path in files if path.name != "console.py"]
    assert [path.name for path in files if other.search(path.read_text())] == []
