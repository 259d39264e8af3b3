"""The scripts from end to end: results, bit-exact resuming, interruptions."""

import json
import signal
import subprocess
import sys
import time

import checkpoint
import evaluate
import pytest
import torch
import train
from example_scripts import EXAMPLE, QUICK, call


def assert_same_training(a, b):
    """Every entry of two training states, bit by bit, but the time and the planned end."""

    def assert_same(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                if (where, key) != ("/settings", "epochs"):
                    assert_same(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for i, pair in enumerate(zip(a, b, strict=True)):
                assert_same(*pair, f"{where}/{i}")
        else:
            assert a == b, where

    a, b = checkpoint.load(a / "checkpoint.pt"), checkpoint.load(b / "checkpoint.pt")
    assert a.pop("seconds") > 0
    assert b.pop("seconds") > 0
    assert_same(a, b, "")


def metrics_but_seconds(out):
    result = json.loads((out / "metrics.json").read_text())
    del result["seconds"]
    return result


@pytest.mark.parametrize("model", ["rnn-g", "cnn-deep"])
def test_train_writes_its_results_and_resumes_bit_for_bit(
    model, tmp_path, monkeypatch, one_thread, capsys
):
    settings = ["--model", model, "--limit", "3", "--batch-size", "2", "--seed", "3"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert call(monkeypatch, train, *settings, "--epochs", 2, "--out", straight) == 0
    result = json.loads((straight / "metrics.json").read_text())
    assert list(result) == [
        "dataset", "model", "parameters", "epochs", "seconds", "accuracy", "f",
    ]  # fmt: skip
    assert result["dataset"] == "synthetic"
    assert result["model"] == model
    assert result["epochs"] == 2
    assert list(result["f"]) == ["background", "skin", "hair"]
    assert 0 < result["accuracy"] < 1
    names = sorted(p.name for p in straight.iterdir())
    assert names == ["checkpoint.pt", "faces.png", "losses.png", "metrics.json"]

    assert call(monkeypatch, train, *settings, "--epochs", 1, "--out", parts) == 0
    torch.manual_seed(99)  # what happened in between must not matter
    assert call(monkeypatch, train, "--resume", "--epochs", 2, "--out", parts) == 0
    assert_same_training(straight, parts)
    assert metrics_but_seconds(straight) == metrics_but_seconds(parts)

    # evaluate.py says the same of the checkpoint alone.
    capsys.readouterr()
    arguments = ["--checkpoint", straight / "checkpoint.pt", "--limit", 3, "--json"]
    assert call(monkeypatch, evaluate, *arguments) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert call(monkeypatch, evaluate, *arguments[:-1], "--dataset", "synthetic") == 0
    assert f"accuracy: {100 * result['accuracy']:.2f} %" in capsys.readouterr().out


def test_interrupted_epoch_is_run_again_bit_for_bit(tmp_path, monkeypatch, one_thread, capsys):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert call(monkeypatch, train, *QUICK, "--epochs", 3, "--out", straight) == 0

    steps = []

    def interrupted(*arguments, **options):
        steps.append(None)
        if len(steps) in (1, 4):  # two steps an epoch: in the first and in the second epoch
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = train.update_average
    monkeypatch.setattr(train, "update_average", interrupted)
    assert call(monkeypatch, train, *QUICK, "--epochs", 3, "--out", cut) == 130
    assert checkpoint.load(cut / "checkpoint.pt")["epoch"] == 0
    assert call(monkeypatch, train, "--resume", "--out", cut) == 130
    assert checkpoint.load(cut / "checkpoint.pt")["epoch"] == 1
    assert "Traceback" not in capsys.readouterr().err
    assert call(monkeypatch, train, "--resume", "--out", cut) == 0
    assert_same_training(straight, cut)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_killed_run_resumes_bit_for_bit(
    name, code, tmp_path, monkeypatch, one_thread, script_environment
):
    out = tmp_path / "killed"
    command = [sys.executable, EXAMPLE / "train.py", *QUICK, "--epochs", "100000", "--out", out]
    process = subprocess.Popen(
        command,
        env=script_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = out / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not path.exists() or checkpoint.load(path)["epoch"] < 1:
        assert time.monotonic() < deadline, "the run wrote no checkpoint"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in error

    epochs = checkpoint.load(path)["epoch"] + 1
    assert call(monkeypatch, train, "--resume", "--epochs", epochs, "--out", out) == 0
    straight = tmp_path / "straight"
    assert call(monkeypatch, train, *QUICK, "--epochs", epochs, "--out", straight) == 0
    assert_same_training(straight, out)


def test_finished_run_resumes_to_the_same_results(tmp_path, monkeypatch, one_thread):
    arguments = [*QUICK, "--epochs", 1, "--out", tmp_path]
    assert call(monkeypatch, train, *arguments) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").unlink()
    assert call(monkeypatch, train, *arguments, "--resume") == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == before[0]
    assert (tmp_path / "metrics.json").read_text() == before[1]


def test_training_learns(one_thread):
    """A hundred steps on a handful of faces beat the share of the largest class by far."""
    settings = {**train.DEFAULTS, "model": "cnn-s", "classes": ["background", "skin", "hair"]}
    state = train.new_state({**settings, "batch_size": 4})
    faces = train.open_dataset("synthetic", None, "train", limit=16)
    saved = []
    train.train(state, faces, faces, epochs=25, device=torch.device("cpu"), save=saved.append)
    assert len(saved) == 25
    assert state["history"][-1]["output"] < 0.8 * state["history"][0]["output"]
    assert state["history"][-1]["validation"] > (faces.labels == 0).float().mean() + 0.05
