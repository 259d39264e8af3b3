"""Two processes train as one does with the doubled batch."""

import json
import sys

import children
import pytest
import torch
import two_processes
from example_scripts import EXAMPLE, QUICK

from faceparse.training import checkpoint


def torchrun(environment, count, script, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return children.run(command, env=environment, timeout=200)


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, script_environment, one_thread):
    # Ten faces in batches of four: the last has two, one for each process.
    two_processes.main(tmp_path, 4)  # one process: this one
    done = torchrun(script_environment, 2, two_processes.__file__, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert one["step"] == first["step"] == 2 * 3
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
        # Sums in another order, and Adam divides by their size: a few float32 roundings.
        torch.testing.assert_close(value, one["model"][name], rtol=1e-3, atol=1e-4)
    for a, b in zip(one["history"], first["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_train_runs_under_torchrun_and_one_process_writes(tmp_path, script_environment):
    out = tmp_path / "out"
    arguments = [*QUICK, "--epochs", 2, "--out", out]
    done = torchrun(script_environment, 2, EXAMPLE / "train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert json.loads((out / "metrics.json").read_text())["epochs"] == 2
    state = checkpoint.load(out / "last.pt")
    assert (state["world"], state["step"]) == (2, 2)

    # One process would see other batches: not the same training.
    command = [sys.executable, EXAMPLE / "train.py", "--resume", "--no-cache", "--out", out]
    alone = children.run(command, env=script_environment)
    assert alone.returncode == 2
    assert "was trained with processes 2, here: 1" in alone.stderr


@pytest.mark.slow
def test_fewer_faces_than_processes_is_one_line(tmp_path, script_environment):
    arguments = [*QUICK, "--limit", 1, "--epochs", 1, "--out", tmp_path / "out"]
    done = torchrun(script_environment, 2, EXAMPLE / "train.py", *arguments)
    assert done.returncode != 0
    assert "error: 1 training faces are too few for 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()
