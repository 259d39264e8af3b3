"""Training from end to end: results, bit-exact resuming, interruptions, settings."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import evaluate
import pytest
import torch
import train
from example_scripts import EXAMPLE, QUICK, call, refused
from tiers import sampled

from faceparse.data import batches, open_dataset
from faceparse.inference.face_crops import Whole
from faceparse.training import checkpoint, loop
from faceparse.training.config import Settings, read_file


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

    a, b = checkpoint.load(a / "last.pt"), checkpoint.load(b / "last.pt")
    assert a.pop("seconds") > 0
    assert b.pop("seconds") > 0
    assert_same(a, b, "")


def metrics_but_seconds(out):
    result = json.loads((out / "metrics.json").read_text())
    del result["seconds"]
    return result


@pytest.mark.parametrize("model", sampled(["rnn-g", "cnn-deep"], 1))
def test_train_writes_its_results_and_resumes_bit_for_bit(
    model, tmp_path, monkeypatch, one_thread, capsys
):
    settings = ["--model", model, "--limit", "3", "--batch-size", "2", "--seed", "3", "--no-cache"]
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
    assert names == ["best.pt", "faces.png", "last.pt", "losses.png", "metrics.json"]

    assert call(monkeypatch, train, *settings, "--epochs", 1, "--out", parts) == 0
    torch.manual_seed(99)  # what happened in between must not matter
    assert call(monkeypatch, train, "--resume", "--no-cache", "--epochs", 2, "--out", parts) == 0
    assert_same_training(straight, parts)
    assert metrics_but_seconds(straight) == metrics_but_seconds(parts)

    # evaluate.py says the same of the checkpoint alone.
    capsys.readouterr()
    arguments = ["--checkpoint", straight / "best.pt", "--limit", 3, "--json"]
    assert call(monkeypatch, evaluate, *arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == result["accuracy"]
    assert again["f"] == result["f"]
    assert call(monkeypatch, evaluate, *arguments[:-1], "--dataset", "synthetic") == 0
    assert f"accuracy: {100 * result['accuracy']:.2f} %" in capsys.readouterr().out


def stop_at(monkeypatch, steps, ending):
    """Let training end by ``ending`` (raised, or the signal sent) after these steps, counted on."""
    done, original = [], loop.update_average

    def update(*arguments, **options):
        original(*arguments, **options)
        done.append(None)
        if len(done) in steps:
            if isinstance(ending, signal.Signals):
                signal.raise_signal(ending)
            else:
                raise ending

    monkeypatch.setattr(loop, "update_average", update)


@pytest.mark.parametrize("ending", sampled([signal.SIGINT, signal.SIGTERM], 1))
def test_requested_stop_saves_the_step_and_goes_on_bit_for_bit(
    ending, tmp_path, monkeypatch, one_thread, capsys
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    arguments = [*QUICK, "--batch-size", 1, "--epochs", 3]  # four steps an epoch
    assert call(monkeypatch, train, *arguments, "--out", straight) == 0
    stop_at(monkeypatch, (1, 4), ending)  # seen in the step after
    assert call(monkeypatch, train, *arguments, "--out", cut) == 130
    state = checkpoint.load(cut / "last.pt")
    assert (state["epoch"], state["batch"], state["step"]) == (0, 2, 2)
    assert call(monkeypatch, train, "--resume", "--no-cache", "--out", cut) == 130
    state = checkpoint.load(cut / "last.pt")
    assert (state["epoch"], state["batch"], state["step"]) == (1, 1, 5)
    assert capsys.readouterr().err.endswith("interrupted: saved; --resume goes on from here\n")
    assert call(monkeypatch, train, "--resume", "--no-cache", "--out", cut) == 0
    assert_same_training(straight, cut)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_interrupt_stops_at_once_and_loses_the_epoch_alone(
    tmp_path, monkeypatch, one_thread
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--out", straight) == 0
    stop_at(monkeypatch, (3,), KeyboardInterrupt())
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--out", cut) == 130
    state = checkpoint.load(cut / "last.pt")
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert call(monkeypatch, train, "--resume", "--no-cache", "--out", cut) == 0
    assert_same_training(straight, cut)


@pytest.mark.slow
def test_long_epochs_are_saved_in_between(tmp_path, monkeypatch, one_thread):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--out", straight) == 0
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    stop_at(monkeypatch, (2,), KeyboardInterrupt())  # as a kill would, after the second step
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--out", cut) == 130
    state = checkpoint.load(cut / "last.pt")
    assert (state["epoch"], state["batch"]) == (0, 1)
    assert call(monkeypatch, train, "--resume", "--no-cache", "--out", cut) == 0
    assert_same_training(straight, cut)


def test_workers_make_the_same_batches(tmp_path, monkeypatch, one_thread):
    straight, helped = tmp_path / "straight", tmp_path / "helped"
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", straight) == 0
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--workers", 2, "--out", helped) == 0
    assert_same_training(straight, helped)


def full_memory(batch):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: Success (0)")


def test_full_shared_memory_is_one_line(tmp_path, monkeypatch, one_thread, capsys):
    monkeypatch.setattr(batches, "shared", full_memory)
    arguments = [*QUICK, "--epochs", 1, "--workers", 1, "--out", tmp_path]
    error = refused(monkeypatch, capsys, train, *arguments)
    assert "/dev/shm, which is full or missing" in error
    assert "--workers 0" in error
    assert multiprocessing.active_children() == []  # Python's exit would wait for them


def test_a_worker_puts_its_batches_into_shared_memory_itself():
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    batch = batches.shared(batches.Batch(images, labels, None, labels, labels))
    assert batch.images.is_shared()
    assert batch.labels.is_shared()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_killed_worker_is_one_line(tmp_path, monkeypatch, one_thread, capsys):
    original = loop.batches

    def doomed(*arguments, **options):
        for batch in original(*arguments, **options):
            yield batch
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(loop, "batches", doomed)
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", tmp_path) == 2
    assert "a process that makes the batches (--workers) was killed" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 0


@pytest.mark.slow
def test_termination_of_the_whole_group_is_a_stop_with_workers_too(tmp_path, script_environment):
    command = [sys.executable, EXAMPLE / "train.py", *QUICK, "--epochs", "100000"]
    command += ["--workers", "2", "--out", tmp_path]
    with subprocess.Popen(
        command,
        env=script_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            path = tmp_path / "last.pt"
            while not path.exists() or checkpoint.load(path)["epoch"] < 1:
                assert time.monotonic() < deadline, "the run wrote no checkpoint"
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGTERM)
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error


def test_the_first_request_ends_a_wait_for_a_batch_and_saves(tmp_path, monkeypatch, capsys):
    original = loop.batches

    def stuck(*arguments, **options):
        made = original(*arguments, **options)
        yield next(made)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the wait went on")

    monkeypatch.setattr(loop, "batches", stuck)
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", tmp_path) == 130
    assert capsys.readouterr().err.endswith("interrupted: saved; --resume goes on from here\n")
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["epoch"], state["batch"], state["step"]) == (0, 1, 1)
    monkeypatch.undo()
    assert call(monkeypatch, train, "--resume", "--no-cache", "--out", tmp_path) == 0


def test_best_checkpoint_is_the_best_on_validation(tmp_path, monkeypatch, one_thread):
    scores = iter([0.25, 0.75, 0.5])
    monkeypatch.setattr(loop.evaluation, "score", lambda model, faces: next(scores))
    assert call(monkeypatch, train, *QUICK, "--epochs", 3, "--out", tmp_path) == 0
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 2
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 3
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 3


def test_out_may_have_any_name(tmp_path, monkeypatch, one_thread, capsys):
    out = tmp_path / os.fsdecode(b"\xff\x1b[2J")
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", out) == 0
    assert capsys.readouterr().out.endswith(f"results in {tmp_path}/\\udcff\\x1b[2J\n")
    pytest.importorskip("tensorboard")
    resumed = ["--resume", "--no-cache", "--tensorboard", "--out", out]
    assert "needs --out in UTF-8" in refused(monkeypatch, capsys, train, *resumed)


def test_settings_come_from_the_file_and_options_win(tmp_path, monkeypatch, one_thread):
    file = tmp_path / "settings.toml"
    file.write_text('model = "mo"\nlimit = 2\nepochs = 1\nschedule = "cosine"\nclip = 1\n')
    arguments = ["--config", file, "--model", "cnn-s", "--no-cache", "--out", tmp_path / "out"]
    assert call(monkeypatch, train, *arguments) == 0
    settings = checkpoint.load(tmp_path / "out" / "last.pt")["settings"]
    expected = {"model": "cnn-s", "limit": 2, "epochs": 1, "schedule": "cosine", "clip": 1.0}
    assert settings == vars(Settings()) | expected


@pytest.mark.parametrize(
    "path", sorted((EXAMPLE / "configs").glob("*/*.toml")), ids=lambda p: p.stem
)
def test_every_config_file_is_one_of_settings(path):
    values = read_file(path)
    Settings(**values)
    if path.parent.name == "table-3":
        view = {"points": "box", "one-stage": "face"}.get(path.stem, path.stem)
        assert values["view"] == view
    else:
        assert values["model"] == path.stem


@pytest.mark.parametrize(
    "options", sampled([["--amp", "bfloat16"], ["--clip", "0.1"], ["--model", "unet"]], 1)
)
def test_mixed_precision_clipping_and_batch_norm_train(options, tmp_path, monkeypatch, one_thread):
    assert call(monkeypatch, train, *QUICK, *options, "--epochs", 2, "--out", tmp_path) == 0
    history = checkpoint.load(tmp_path / "last.pt")["history"]
    assert history[1]["output"] < history[0]["output"]


def test_tensorboard_gets_the_history(tmp_path, monkeypatch, one_thread):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--tensorboard", "--out", tmp_path) == 0
    log = events.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    history = checkpoint.load(tmp_path / "last.pt")["history"]
    shown = [(e.step, e.value) for e in log.Scalars("output")]
    assert shown == [(i + 1, pytest.approx(row["output"])) for i, row in enumerate(history)]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), sampled([("SIGKILL", -9), ("SIGINT", 130)], 1))
def test_killed_run_resumes_bit_for_bit(
    name, code, tmp_path, monkeypatch, one_thread, script_environment
):
    out = tmp_path / "killed"
    command = [sys.executable, EXAMPLE / "train.py", *QUICK, "--epochs", "100000", "--out", out]
    with subprocess.Popen(
        command,
        env=script_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            path = out / "last.pt"
            deadline = time.monotonic() + 60
            while not path.exists() or checkpoint.load(path)["epoch"] < 1:
                assert time.monotonic() < deadline, "the run wrote no checkpoint"
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(getattr(signal, name))
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in error

    epochs = checkpoint.load(path)["epoch"] + 1
    resumed = ["--resume", "--no-cache", "--epochs", epochs, "--out", out]
    assert call(monkeypatch, train, *resumed) == 0
    straight = tmp_path / "straight"
    assert call(monkeypatch, train, *QUICK, "--epochs", epochs, "--out", straight) == 0
    assert_same_training(straight, out)


@pytest.mark.slow
def test_finished_run_resumes_to_the_same_results(tmp_path, monkeypatch, one_thread):
    arguments = [*QUICK, "--epochs", 1, "--out", tmp_path]
    assert call(monkeypatch, train, *arguments) == 0
    before = (tmp_path / "last.pt").read_bytes(), (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").unlink()
    assert call(monkeypatch, train, *arguments, "--resume") == 0
    assert (tmp_path / "last.pt").read_bytes() == before[0]
    assert (tmp_path / "metrics.json").read_text() == before[1]


def test_training_learns(one_thread):
    """A hundred steps on a handful of faces beat the share of the largest class by far."""
    faces = open_dataset("synthetic", None, "train", limit=16)
    view = Whole(faces)
    settings = Settings(model="cnn-s", batch_size=4, epochs=25)
    state = loop.new_state(settings, view.facts(), faces=16)
    saved = []

    def save(state, *, best):
        saved.append(best)

    loop.train(state, faces, faces, view=view, device=torch.device("cpu"), save=save)
    assert len(saved) == 25
    assert state["history"][-1]["output"] < 0.8 * state["history"][0]["output"]
    assert state["history"][-1]["validation"] > (faces.labels == 0).float().mean() + 0.05
