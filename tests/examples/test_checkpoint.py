"""Files are whole or as before; damage is one clear line."""

import os

import checkpoint
import pytest
import torch
from checkpoint import CheckpointError, write_atomically
from settings import Settings

STATE = {
    "settings": vars(Settings(model="rnn", epochs=2)),
    "classes": ["background", "skin", "hair"],
    "side": 128,
    "layout": {},
    "faces": 8,
    "world": 1,
    "epoch": 2,
    "batch": 0,
    "step": 10,
    "seconds": 1.5,
    "sums": {},
    "seen": 0,
    "history": [{"output": 0.5}],
    "best": 0.75,
    "model": {"w": torch.arange(2000.0)},
    "average": {"w": torch.ones(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    "scaler": {},
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_checkpoint_round_trip(path):
    state = checkpoint.load(path)
    assert state.keys() == STATE.keys()
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert state["settings"] == STATE["settings"]
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]  # no temporary left


@pytest.mark.parametrize("name", [n for n in STATE["settings"] if n != "limit"])
def test_checkpoint_without_a_setting_is_refused_by_name(tmp_path, name):
    settings = {key: value for key, value in STATE["settings"].items() if key != name}
    checkpoint.save(tmp_path / "last.pt", STATE | {"settings": settings})
    with pytest.raises(CheckpointError, match=f"{name} must be .*, got None"):
        checkpoint.load(tmp_path / "last.pt")


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_write_atomically_survives_an_interrupt(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(2000.0).numpy().tobytes()) + 3001
    data[at] ^= 4
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def put_text(path):
    path.write_text("not a checkpoint")


def put_other_tensors(path):
    torch.save({"w": torch.ones(3)}, path)


def put_code(path):
    torch.save({"kind": checkpoint.KIND, "settings": os.system}, path)


def drop_an_entry(path):
    torch.save({"kind": checkpoint.KIND, **STATE, "average": None}, path)


def add_a_setting(path):
    settings = {**STATE["settings"], "colour": "red"}
    torch.save({"kind": checkpoint.KIND, **STATE, "settings": settings}, path)


def put_a_negative_step(path):
    torch.save({"kind": checkpoint.KIND, **STATE, "step": -1}, path)


def put_numbers_for_names(path):
    torch.save({"kind": checkpoint.KIND, **STATE, "classes": [1, 2]}, path)


def put_nan(path):
    torch.save({"kind": checkpoint.KIND, **STATE, "average": {"w": torch.tensor(torch.nan)}}, path)


DAMAGE = [add_a_setting, put_a_negative_step, put_numbers_for_names, put_nan]
DAMAGE += [truncate, flip_one_bit, empty, put_text, put_other_tensors, put_code, drop_an_entry]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_foreign_checkpoint_is_one_line(path, damage):
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_is_one_line(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoint.load(path)


@pytest.mark.parametrize("number", checkpoint.NO_LOCKS)
def test_a_file_system_without_locks_is_a_note(number, tmp_path, monkeypatch, capsys):
    def refuse(handle, operation):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with checkpoint.claimed(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert f"note: {tmp_path / 'out'} cannot be locked" in capsys.readouterr().err
