"""A missing package is named in one line, with its extra, before any work."""

import ast
import sys
from pathlib import Path

import demo
import pytest
import reproduce
import train
from example_scripts import refused

from faceparse import cli

EXAMPLES = Path(cli.__file__).parents[2]
# These two are imported late themselves.
LATE = {"demo_page.py", "propagation_pictures.py"}


@pytest.mark.parametrize(
    ("script", "arguments", "package", "extra"),
    [
        (demo, ["--models", "models"], "gradio", "page"),
        (demo, ["--models", "models"], "matplotlib", "plot"),
        (train, ["--out", "out"], "matplotlib", "plot"),
        (reproduce, ["--table", "1", "--root", "."], "maxflow", "graph-cut"),
        (reproduce, ["--table", "3", "--root", "."], "matplotlib", "plot"),
    ],
)
def test_missing_package_is_named_before_any_work(
    script, arguments, package, extra, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(monkeypatch, capsys, script, *arguments)
    assert (
        error == f"error: {package} is not installed: in the checkout, pip install -e '.[{extra}]'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [["rnn-g"], ["cnn-s", "rnn"]])
def test_rows_without_a_graph_cut_do_not_need_its_package(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "maxflow", None)
    given = ["--table", "1", "--root", tmp_path / "none", "--rows", *rows]
    error = refused(monkeypatch, capsys, reproduce, *given)
    assert "needs the folder" in error


def test_packages_of_extras_are_imported_late():
    for path in EXAMPLES.rglob("*.py"):
        if path.name in LATE or "benchmarks" in path.parts:
            continue
        for line in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(line, "names", [])]
            names = names if isinstance(line, ast.Import) else [getattr(line, "module", None) or ""]
            assert not {name.partition(".")[0] for name in names} & cli.EXTRAS.keys(), path
