"""Files are whole or as before; damage is one clear line."""

import hashlib
import io
import json
import os
import struct
import zipfile

import pytest
import torch

from faceparse.training import checkpoint
from faceparse.training.checkpoint import CheckpointError, write_atomically
from faceparse.training.config import Settings

STATE = {
    "settings": vars(Settings(model="rnn", epochs=2)),
    "classes": ["background", "skin", "hair"],
    "side": 128,
    "layout": {},
    "faces": 8,
    "world": 1,
    "epoch": 1,
    "batch": 2,
    "step": 6,
    "seconds": 1.5,
    "sums": {"output": 1.25},
    "seen": 4,
    "history": [{"output": 0.5}],
    "best": 0.75,
    "model": {"w": torch.arange(2000.0)},
    "average": {"w": torch.ones(3), "count": torch.tensor(2**40)},
    "optimizer": {"0": {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 0)}},
    "scaler": {},
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_checkpoint_round_trip(path):
    state = checkpoint.load(path)
    assert state.keys() == STATE.keys()
    for place in ("model", "average"):
        for name, value in STATE[place].items():
            assert state[place][name].dtype == value.dtype
            assert torch.equal(state[place][name], value)
    assert state["optimizer"]["0"]["step"].shape == ()
    assert state["optimizer"]["0"]["exp_avg"].shape == (3, 0)
    plain = [n for n in STATE if n not in ("model", "average", "optimizer")]
    assert {n: state[n] for n in plain} == {n: STATE[n] for n in plain}
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


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "small.pt"
    checkpoint.write(path, "a kind", {"w": torch.arange(3.0), "words": "skin", "best": 0.5})
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.read(path, "a kind")
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            checkpoint.read(path, "a kind")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def empty(path):
    path.write_bytes(b"")


def put_text(path):
    path.write_text("not a checkpoint")


def put_a_pickle(path):
    torch.save({"kind": checkpoint.KIND, **STATE}, path)


def put_a_bomb(path):
    """A zip of 100 kB whose entries all are the same compressed 100 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    data = buffer.getvalue()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry = data[start:end]
    counts = struct.pack("<HHII", 300, 300, 300 * len(entry), start)
    path.write_bytes(data[:start] + 300 * entry + data[end : end + 8] + counts + b"\0\0")


FOREIGN = [truncate, empty, put_text, put_a_pickle, put_a_bomb]


@pytest.mark.parametrize("damage", FOREIGN)
def test_damaged_or_foreign_file_is_one_line(path, damage):
    damage(path)
    assert_one_line(path)


def assert_one_line(path):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def written(path, text, numbers=b""):
    """A file with a digest that fits, whatever the JSON says."""
    content = text.encode() + b"\n" + numbers
    digest = hashlib.sha256(content).hexdigest()
    path.write_bytes(f"{checkpoint.KIND}\n{digest}\n".encode() + content)


PLAIN = STATE | {"model": {}, "average": {}, "optimizer": {}}
FACE = {"settings": {**STATE["settings"], "view": "face"}}
ONE = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("tensor", "numbers"),
    [
        (["float32", [2]], ONE),  # not there
        (["float32", [1]], 2 * ONE),  # too many
        (["float32", [10**30, 0]], b""),
        (["float32", [10**30]], ONE),
        (["int64", [10**18]], ONE),
        (["float32", [-1]], ONE),
        (["float32", [-1, -1]], ONE),
        (["float32", [1.0]], ONE),
        (["float32", ["1"]], ONE),
        (["float32", 1], ONE),
        (["float32"], ONE),
        (["object", [1]], 8 * b"\0"),
        ([["float32"], [1]], ONE),
        (["float32", [1]], struct.pack("<f", float("nan"))),
        (["float32", [1]], struct.pack("<f", float("inf"))),
        (["float32", [1] * 100], ONE),
        (None, b""),
    ],
)
def test_a_tensor_that_cannot_be_is_one_line(tensor, numbers, path):
    written(path, json.dumps(PLAIN | {"average": {"w": {"tensor": ["float32", [1]]}}}), ONE)
    checkpoint.load(path)
    written(path, json.dumps(PLAIN | {"average": {"w": {"tensor": tensor}}}), numbers)
    assert_one_line(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"average": None},
        {"average": {"w": 1.0}},
        {"model": {"w": {"w": []}}},
        {"model": []},
        {"step": -1},
        {"step": True},
        {"step": 1.0},
        {"step": 10**400},
        {"best": float("nan")},
        {"best": -5.0},
        {"seconds": float("inf")},
        {"classes": [1, 2]},
        {"settings": {**STATE["settings"], "colour": "red"}},
        {"settings": {**STATE["settings"], "lr": 10**400}},
        {"settings": {**STATE["settings"], "lr": "fast"}},
        {"sums": {"output": "many"}},
        {"sums": {"output": [1.0]}},
        {"sums": {}},
        {"batch": 0},
        {"seen": 0},
        {"history": []},
        {"history": [[0.5]]},
        {"history": [{"output": "low"}]},
        {"history": [{"output": {"a": 0.5}}]},
        {"layout": {"shape": [[0.0, 0.0]] * 5}},
        {
            "layout": {"shape": [[10**400, 0.0]] * 5},
            "settings": {**STATE["settings"], "view": "face"},
        },
        {"layout": []},
        FACE,
    ],
)
def test_an_entry_that_cannot_be_is_one_line(changes, path):
    written(path, json.dumps(PLAIN | changes))
    assert_one_line(path)


@pytest.mark.parametrize("text", ["[]", "1", "", "{", 10**5 * "[", "1" * 5000, "1e999"])
def test_a_text_that_is_no_state_is_one_line(text, path):
    written(path, text)
    assert_one_line(path)


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
