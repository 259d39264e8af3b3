"""A table from end to end on tiny trees: trained, stopped, gone on with, written."""

import json
import signal

import lfw_tree
import pytest
import reproduce
import torch
from example_scripts import call, refused
from tiers import sampled

from faceparse.inference.postprocess import PARSERS
from faceparse.reporting import evaluation, reproduction
from faceparse.reporting.metrics import f_measures
from faceparse.reporting.tables import TABLES
from faceparse.training import checkpoint, jobs
from faceparse.training.config import Settings, read_file
from faceparse.training.loop import new_state


@pytest.fixture
def root(tmp_path):
    lfw_tree.write_tree(tmp_path / "data" / "lfw-pl")
    return tmp_path / "data"


def arguments(root, out, *rows):
    given = ["--table", 1, "--root", root, "--epochs", 1, "--no-cache", "--out", out]
    return [*given, "--rows", *rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_table_is_trained_written_and_not_trained_again(root, tmp_path, monkeypatch, one_thread):
    out = tmp_path / "out"
    rows = ("cnn-s", "cnn-crf", "mo", "rnn-g")
    assert call(monkeypatch, reproduce, *arguments(root, out, *rows), "--jobs", 2) == 0
    results = json.loads((out / f"{','.join(rows)}.json").read_text())
    assert list(results) == list(rows)
    for result in results.values():
        assert 0 <= result["accuracy"] <= 1
        assert result["frames_per_second"] > 0
        assert list(result["f"]) == ["background", "skin", "hair"]
    # One network, with and without refinement; the three trainings share no folder.
    assert results["cnn-crf"]["parameters"] == results["cnn-s"]["parameters"]
    names = sorted(path.name for path in out.iterdir())
    stem = ",".join(rows)
    written = [f"{stem}.{kind}" for kind in ("json", "md", "png")]
    assert names == sorted(["cnn-s", "mo", "rnn-g", *written])
    text = (out / f"{stem}.md").read_text()
    assert "| % | CNN-S | CNN-CRF | MO | RNN-G |" in text
    assert "(97.55)" in text
    accuracy = results["rnn-g"]["accuracy"]
    assert f"| {100 * accuracy:.2f} (95.46) |" in text

    before = (out / "cnn-s" / "last.pt").read_bytes(), (out / "cnn-s" / "cnn-crf.json").read_bytes()
    assert call(monkeypatch, reproduce, *arguments(root, out, *rows)) == 0
    after = (out / "cnn-s" / "last.pt").read_bytes(), (out / "cnn-s" / "cnn-crf.json").read_bytes()
    assert after == before
    again = json.loads((out / f"{stem}.json").read_text())
    assert [r["f"] for r in again.values()] == [r["f"] for r in results.values()]


@pytest.mark.parametrize("number", sampled([signal.SIGINT, signal.SIGTERM], 1))
def test_interrupted_table_stops_its_trainings_and_goes_on(
    number, root, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    running, original = [], jobs.start

    def start(*options):
        running.append(original(*options))
        return running[-1]

    def sleep(seconds):
        signal.raise_signal(number)

    monkeypatch.setattr(jobs, "start", start)
    monkeypatch.setattr(jobs.time, "sleep", sleep)
    given = arguments(root, out, "cnn-s")
    assert call(monkeypatch, reproduce, *given) == 130
    assert running[0].returncode is not None  # no process is left behind
    assert "Traceback" not in capsys.readouterr().err
    assert not (out / "cnn-s.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    assert call(monkeypatch, reproduce, *given) == 0
    assert (out / "cnn-s.json").exists()


def test_a_row_whose_schedule_knows_its_end_is_refused_before_anything_is_trained(
    root, tmp_path, monkeypatch, capsys
):
    settings = Settings(model="rnn-g+small", schedule="cosine", epochs=3)
    facts = {"classes": ["background", "skin", "hair"], "side": 128, "layout": {}}
    state = new_state(settings, facts, faces=3)
    out = tmp_path / "out"
    (out / "rnn-g+small").mkdir(parents=True)
    checkpoint.save(out / "rnn-g+small" / "last.pt", state)
    given = arguments(root, out, "cnn-s", "rnn-g+small")
    error = refused(monkeypatch, capsys, reproduce, *given)
    assert "with --epochs 3 and a cosine schedule, which cannot be made 1" in error
    assert not (out / "cnn-s").exists()


def test_failed_training_is_one_line_with_its_log(root, tmp_path, monkeypatch, capsys):
    lfw_tree.image_path(root / "lfw-pl", "Ann_Lee", 2).write_bytes(b"damaged")
    error = refused(monkeypatch, capsys, reproduce, *arguments(root, tmp_path / "out", "cnn-s"))
    assert "training cnn-s failed" in error
    assert "Ann_Lee_0002.jpg" in error


def test_training_that_was_killed_is_said_to_be(root, tmp_path, monkeypatch, capsys):
    original = jobs.start

    def start(*options):
        process = original(*options)
        process.kill()
        return process

    monkeypatch.setattr(jobs, "start", start)
    error = refused(monkeypatch, capsys, reproduce, *arguments(root, tmp_path / "out", "cnn-s"))
    assert "training cnn-s failed" in error
    assert error.endswith("ended by signal 9")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--table", 4, "--root", "."], "--table"),
        (["--table", 1], "--root DIR is needed"),
        (["--table", 1, "--root", ".", "--rows", "gloc"], "table 1 has mo, cnn-s"),
        (["--table", 1, "--root", "/nonexistent"], "/nonexistent"),
        (["--table", 1, "--root", ".", "--jobs", 0], "--jobs"),
    ],
)
def test_bad_arguments_are_one_line(given, words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert words in refused(monkeypatch, capsys, reproduce, *given, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("number", TABLES)
def test_every_row_has_a_config_for_its_network(number, tmp_path):
    table = TABLES[number]
    needed = reproduction.jobs_of(table, tmp_path, table.rows)
    for key, networks in needed.items():
        row = table.rows[key]
        for training in networks.values():
            settings = read_file(training.config)
            assert settings["dataset"] == (row.dataset or table.dataset)
            if row.parser is not None:
                assert settings["model"] == PARSERS[row.parser][0]
    every = [training for networks in needed.values() for training in networks.values()]
    assert len({t.name for t in every}) == len({t.config for t in every})


def test_f_of_the_table_is_that_of_the_confusion_matrix():
    matrix = torch.tensor([[8, 1, 1], [0, 5, 0], [2, 0, 3]])
    result = evaluation.scores(matrix, ("background", "skin", "hair"))
    assert list(result["f"].values()) == f_measures(matrix)
    assert result["accuracy"] == pytest.approx(16 / 20)
