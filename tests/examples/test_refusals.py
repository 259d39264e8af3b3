"""What the scripts refuse: one clear line, exit code 2, nothing lost and nothing half written."""

import json
import os
import signal
import subprocess
import sys

import evaluate
import lfw_tree
import pytest
import torch
import train
from example_scripts import EXAMPLE, QUICK, call, refused

from faceparse.training import checkpoint, loop
from faceparse.training.distributed import Processes
from faceparse.training.losses import Loss


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one epoch; tests may not change it."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", out) == 0
    return out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "rnn"),
        ("--dataset", "lfw-pl"),
        ("--seed", 1),
        ("--limit", 5),
        ("--batch-size", 3),
        ("--lr", 0.5),
        ("--schedule", "cosine"),
        ("--weight-x", 0.5),
        ("--labels", "fine"),
    ],
)
def test_resume_with_another_setting_is_refused_by_name(
    option, value, finished, monkeypatch, capsys
):
    before = (finished / "last.pt").read_bytes()
    error = refused(monkeypatch, capsys, train, "--resume", "--out", finished, option, value)
    assert f"was trained with {option}" in error
    assert f"not {value}" in error
    assert (finished / "last.pt").read_bytes() == before


def test_resume_to_fewer_epochs_is_refused(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, train, *QUICK, "--epochs", 2, "--out", tmp_path) == 0
    arguments = ["--resume", "--epochs", 1, "--out", tmp_path]
    assert "has 2 epochs, more than --epochs 1" in refused(monkeypatch, capsys, train, *arguments)


def test_longer_resume_with_a_schedule_that_knows_its_end_is_refused(tmp_path, monkeypatch, capsys):
    arguments = [*QUICK, "--epochs", 1, "--schedule", "cosine", "--out", tmp_path]
    assert call(monkeypatch, train, *arguments) == 0
    error = refused(monkeypatch, capsys, train, "--resume", "--epochs", 2, "--out", tmp_path)
    assert "was trained with --epochs 1 and a cosine schedule" in error


def test_existing_checkpoint_is_not_overwritten(finished, monkeypatch, capsys):
    before = (finished / "last.pt").read_bytes()
    error = refused(monkeypatch, capsys, train, *QUICK, "--epochs", 1, "--out", finished)
    assert "add --resume, or choose another --out" in error
    assert (finished / "last.pt").read_bytes() == before


def test_default_out_is_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call(monkeypatch, train, *QUICK, "--epochs", 1) == 0
    runs = tmp_path / "runs"
    assert sorted(p.name for p in runs.iterdir()) == ["synthetic-cnn-s", "synthetic-cnn-s-2"]
    assert call(monkeypatch, train, "--model", "cnn-s", "--resume", "--epochs", 2) == 0
    assert checkpoint.load(runs / "synthetic-cnn-s-2" / "last.pt")["epoch"] == 2
    assert checkpoint.load(runs / "synthetic-cnn-s" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "nowhere"], "nowhere"),
        (["--model", "vgg"], "vgg"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "many"),
        (["--limit", "-3"], "--limit"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "nan"], "--lr"),
        (["--weight-boundary", "-1"], "weight_boundary must be in 0 .. 1000000"),
        (["--amp", "int8"], "--amp"),
        (["--workers", "-1"], "--workers"),
        (["--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--dataset", "lfw-pl"], "needs --root"),
        (["--dataset", "lfw-pl", "--root", "/nonexistent"], "/nonexistent"),
        (["--resume"], "no checkpoint"),
        (["--surprise"], "--surprise"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    arguments, words, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert words in refused(monkeypatch, capsys, train, *arguments, "--out", out)
    assert not out.exists()


def test_out_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "file"
    out.write_text("mine")
    assert "file" in refused(monkeypatch, capsys, train, *QUICK, "--epochs", 1, "--out", out)
    assert out.read_text() == "mine"


def test_lfw_pl_trains_evaluates_and_counts_skipped_faces(tmp_path, monkeypatch, capsys):
    root, out = lfw_tree.write_tree(tmp_path / "data"), tmp_path / "out"
    data = ["--dataset", "lfw-pl", "--root", root]
    lfw_tree.image_path(root, "Ann_Lee", 2).write_bytes(b"damaged")
    arguments = [*data, "--model", "cnn-s", "--epochs", 1, "--no-cache", "--out", out]
    assert "Ann_Lee_0002.jpg" in refused(monkeypatch, capsys, train, *arguments)
    assert not out.exists()

    assert call(monkeypatch, train, *arguments, "--skip-bad") == 0
    assert "1 bad faces skipped" in capsys.readouterr().err
    result = json.loads((out / "metrics.json").read_text())
    arguments = ["--checkpoint", out / "best.pt", *data, "--no-cache", "--json"]
    assert call(monkeypatch, evaluate, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["f"] == result["f"]

    # Mended in between: no longer the faces that it was trained on.
    lfw_tree.write_face(root, "Ann_Lee", 2)
    error = refused(monkeypatch, capsys, train, *data, "--resume", "--no-cache", "--out", out)
    assert "was trained with faces 2, here: 3" in error


def test_second_training_into_one_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    with checkpoint.claimed(tmp_path / "out"):
        error = refused(monkeypatch, capsys, train, *QUICK, "--out", tmp_path / "out")
        assert f"another process is writing to {tmp_path / 'out'}" in error
        assert (tmp_path / "out").is_dir()  # still the first one's
    assert not (tmp_path / "out").exists()  # empty: it goes with whoever made it


def test_an_empty_folder_of_the_user_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "made"):
        with checkpoint.claimed(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_is_free_once_its_process_has_gone(tmp_path):
    """Not held by a worker that a killed process has left behind."""
    script = (
        "import sys, os, time, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from faceparse.training import checkpoint\n"
        "with checkpoint.claimed(pathlib.Path(sys.argv[2])):\n"
        "    worker = os.fork() or time.sleep(60)\n"
        "    print(worker, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, EXAMPLE, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        worker = int(killed.stdout.readline())
        try:
            assert killed.wait() == -signal.SIGKILL
            with checkpoint.claimed(tmp_path / "out"):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_another_process_removes_is_made_again(tmp_path, monkeypatch):
    folder, opened = tmp_path / "out", os.open

    def removed_in_between(path, *flags):
        handle = opened(path, *flags)
        monkeypatch.setattr(os, "open", opened)
        folder.rmdir()
        return handle

    monkeypatch.setattr(os, "open", removed_in_between)
    with checkpoint.claimed(folder):
        assert folder.is_dir()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".123-0.gatedrnn-tmp.pt").write_bytes(b"half")
    (tmp_path / ".123-1.gatedrnn-tmp").mkdir()
    mine = [tmp_path / "scan.2023.tmp.jpg", tmp_path / "last.pt.123.tmp"]
    for path in mine:
        path.write_bytes(b"mine")
    with checkpoint.claimed(tmp_path):
        assert sorted(tmp_path.iterdir()) == sorted([*mine, tmp_path / ".123-1.gatedrnn-tmp"])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
    ],
)
def test_several_processes_without_torchrun_are_refused(
    variables, words, tmp_path, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in refused(monkeypatch, capsys, train, *QUICK, "--out", tmp_path / "out")


def test_evaluate_refuses_what_is_not_a_checkpoint(tmp_path, finished, monkeypatch, capsys):
    missing = tmp_path / "none.pt"
    assert str(missing) in refused(monkeypatch, capsys, evaluate, "--checkpoint", missing)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((finished / "last.pt").read_bytes()[:-100])
    assert str(damaged) in refused(monkeypatch, capsys, evaluate, "--checkpoint", damaged)

    state = checkpoint.load(finished / "last.pt")
    state["settings"]["model"] = "rnn"  # the weights are of another network
    other = tmp_path / "other.pt"
    checkpoint.save(other, state)
    error = refused(monkeypatch, capsys, evaluate, "--checkpoint", other)
    assert "holds no network that this program knows" in error


def test_evaluate_refuses_another_model_and_other_classes(finished, monkeypatch, capsys):
    given = ["--checkpoint", finished / "last.pt", "--limit", 2]
    error = refused(monkeypatch, capsys, evaluate, *given, "--model", "rnn-g")
    assert "holds the model cnn-s, not rnn-g" in error
    error = refused(monkeypatch, capsys, evaluate, *given, "--parser", "det+rnn-g")
    assert "holds the model cnn-s; det+rnn-g needs one of rnn-g" in error
    error = refused(monkeypatch, capsys, evaluate, *given, "--labels", "fine")
    assert "has 3 classes (background, skin, hair), these faces have 11" in error
    error = refused(monkeypatch, capsys, evaluate, *given, "--dataset", "synthetic-multi")
    assert "was trained on images of 128 pixels, these have 512" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = 1" + 400 * "0", "lr must be in 1e-09 .. 1000.0, got inf"),
        ("\ufefflr = 'fast'", "lr must be float, got 'fast'"),  # Windows' editor begins so
        ("epochs = 0", "epochs must be in 1 .. inf, got 0"),
        ("epochs = true", "epochs must be int, got True"),
        ("model = 'vgg'", "model must be one of rnn-g"),
        ("speed = 3", "unknown setting 'speed'"),
        ("lr = ", "cannot read the settings"),
    ],
)
def test_config_file_that_cannot_be_is_one_line(text, words, tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    out = tmp_path / "out"
    error = refused(monkeypatch, capsys, train, "--config", file, "--out", out)
    assert str(file) in error
    assert words in error
    assert not out.exists()


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, train, *QUICK, "--epochs", 1, "--out", tmp_path) == 0
    before = (tmp_path / "last.pt").read_bytes()
    original = loop.losses_of

    def losses(*arguments, **options):
        found = original(*arguments, **options)
        return found | {"x": Loss(found["output"].total * torch.nan, found["output"].count)}

    monkeypatch.setattr(loop, "losses_of", losses)
    resumed = ["--resume", "--no-cache", "--epochs", 2, "--out", tmp_path]
    error = refused(monkeypatch, capsys, train, *resumed)
    assert "the loss 'x' is nan at step 3 (epoch 2, batch 1, training faces " in error
    assert (tmp_path / "last.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    def ruin(average, model, step):
        with torch.no_grad():
            next(model.parameters()).fill_(torch.inf)

    monkeypatch.setattr(loop, "update_average", ruin)
    arguments = [*QUICK, "--limit", 2, "--epochs", 1, "--out", tmp_path]
    error = refused(monkeypatch, capsys, train, *arguments)
    assert "weight 'trunk.0.weight' is not finite at step 1" in error
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 0


def put(**tensors):
    return lambda optimizer: optimizer["0"].update(tensors)


@pytest.mark.parametrize(
    "change",
    [
        put(exp_avg=torch.zeros(1)),
        put(exp_avg_sq=torch.full((16, 3, 5, 5), -1.0)),
        put(step=torch.tensor(0.0)),
        put(step=torch.ones(2)),
        put(step="one"),
        put(max_exp_avg_sq=torch.zeros(16, 3, 5, 5)),
        lambda optimizer: optimizer["0"].pop("step"),
        lambda optimizer: optimizer.update({"0": None}),
        lambda optimizer: optimizer.update({"99": optimizer["0"]}),
        lambda optimizer: optimizer.update({"first": optimizer["0"]}),
    ],
)
def test_an_optimizer_that_does_not_fit_is_one_line(change, finished):
    state = checkpoint.load(finished / "last.pt")
    options = {"device": torch.device("cpu"), "processes": Processes()}
    loop.Training(state, **options)
    assert state["optimizer"]["0"]["exp_avg"].shape == (16, 3, 5, 5)
    change(state["optimizer"])
    with pytest.raises(checkpoint.CheckpointError, match="does not fit its settings"):
        loop.Training(state, **options)


def test_an_optimizer_that_overflows_is_never_saved(tmp_path, monkeypatch, capsys):
    original = loop.Training.write_to

    def write_to(live, state):
        next(iter(live.optimizer.state.values()))["exp_avg_sq"].fill_(torch.inf)
        original(live, state)

    monkeypatch.setattr(loop.Training, "write_to", write_to)
    arguments = [*QUICK, "--limit", 2, "--epochs", 1, "--out", tmp_path]
    error = refused(monkeypatch, capsys, train, *arguments)
    assert "AdamW's 'exp_avg_sq' is not finite at step 1" in error
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 0
