"""The cache of decoded faces: the same faces, whatever happens to its files or its writers."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import trees
from example_scripts import EXAMPLE

from faceparse.data import DataError, cache, default_folder, helen, load, open_dataset
from faceparse.inference import image_io

# Reads a HELEN tree through a cache; prints the sum of all pixels.
READER = """
import sys
sys.path.insert(0, sys.argv[1])
from faceparse.data import open_dataset
faces = open_dataset("helen", sys.argv[2], "train", labels="fine", cache=sys.argv[3])
print(faces.images.long().sum().item(), faces.labels.long().sum().item())
"""


@pytest.fixture
def tree(tmp_path):
    return trees.write_tree("helen", tmp_path / "helen")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def read(tree, folder, split="train", **options):
    return open_dataset("helen", tree, split, labels="fine", cache=folder, **options)


def files(folder, ending="*"):
    return sorted((folder / cache.FOLDER).glob(ending))


def assert_same(faces, others):
    assert torch.equal(faces.images, others.images)
    assert torch.equal(faces.labels, others.labels)
    torch.testing.assert_close(faces.points, others.points, rtol=0, atol=0, equal_nan=True)
    assert faces.skipped == others.skipped
    assert faces.label_set is others.label_set


@pytest.fixture
def no_decoding(monkeypatch):
    """Call it, and decoding is an error from then on."""

    def forbid():
        def decode(self, record):
            raise AssertionError("decoded")

        monkeypatch.setattr(load.Decoder, "decode", decode)

    return forbid


def test_cached_faces_are_the_decoded_ones_and_are_read_without_decoding(tree, folder, no_decoding):
    plain = read(tree, None)
    assert_same(read(tree, folder), plain)
    assert [path.suffix for path in files(folder)] == [".json", ".npy"]
    no_decoding()
    again = read(tree, folder)
    assert_same(again, plain)
    with pytest.raises(AssertionError, match="decoded"):
        read(tree, folder, "test")


def test_a_set_without_points_has_none_from_the_cache(tmp_path, folder):
    tree = trees.write_tree("multi-face", tmp_path / "multi-face")
    for _ in range(2):
        assert open_dataset("multi-face", tree, "train", cache=folder).points is None


def test_writing_to_cached_tensors_leaves_the_file_alone(tree, folder):
    faces = read(tree, folder)
    (npy,) = files(folder, "*.npy")
    before, images = npy.read_bytes(), faces.images.clone()
    faces.images.zero_()
    assert npy.read_bytes() == before
    assert torch.equal(read(tree, folder).images, images)


def test_split_limit_and_labels_have_files_of_their_own(tree, folder):
    read(tree, folder)
    read(tree, folder, limit=2)
    read(tree, folder, "test")
    open_dataset("helen", tree, "train", cache=folder)
    assert len(files(folder, "*.npy")) == len(files(folder, "*.json")) == 4
    assert len(read(tree, folder, limit=2).images) == 2


def touch(path):
    """A time stamp that surely differs."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2_000_000_000))


@pytest.mark.parametrize("what", ["photograph", "label", "list"])
def test_a_changed_source_file_is_decoded_anew_and_the_stale_cache_goes(what, tree, folder):
    read(tree, folder)
    other = read(tree, folder, "test")
    before = set(files(folder))
    if what == "photograph":
        path = trees.image("helen", tree, 1)
        path.write_bytes(trees.image("helen", tree, 2).read_bytes())
        touch(path)
    elif what == "label":
        path = trees.label("helen", tree, 1, 10)  # all hair but the very border
        path.write_bytes(trees.label("helen", tree, 1, 0).read_bytes())
        touch(path)
    else:
        lines = (tree / "exemplars.txt").read_text().splitlines()
        (tree / "exemplars.txt").write_text("\n".join(lines[1::-1]))
    plain = read(tree, None)
    assert_same(read(tree, folder), plain)
    after = set(files(folder))
    assert len(after) == 4  # both files of train and of test, and nothing stale
    assert len(after - before) == 2
    assert_same(read(tree, folder, "test"), other)


def test_two_data_sets_of_one_name_keep_their_caches(tree, folder, tmp_path):
    second = trees.write_tree("helen", tmp_path / "second")
    touch(trees.image("helen", second, 0))
    read(tree, folder)
    read(second, folder)
    assert len(files(folder, "*.npy")) == 2


def test_a_moved_data_set_finds_its_cache(tree, folder, no_decoding):
    plain = read(tree, folder)
    moved = tree.rename(tree.with_name("moved"))
    no_decoding()
    assert_same(read(moved, folder), plain)


def write_over(npy, data):
    npy.unlink()  # it is read-only
    npy.write_bytes(data)


def damage_byte(npy, facts):
    data = bytearray(npy.read_bytes())
    data[len(data) // 2] ^= 1
    write_over(npy, data)


def damage_length(npy, facts):
    write_over(npy, npy.read_bytes()[:-1])


def damage_empty(npy, facts):
    write_over(npy, b"")


def damage_gone(npy, facts):
    npy.unlink()


def damage_json(npy, facts):
    facts.write_text(facts.read_text()[:20])


def damage_json_kind(npy, facts):
    facts.write_text("[1, 2]")


DAMAGES = [function for key, function in list(globals().items()) if key.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew_with_a_note(damage, tree, folder, capsys):
    plain = read(tree, folder)
    plain = plain._replace(images=plain.images.clone(), labels=plain.labels.clone())
    (npy,), (facts,) = files(folder, "*.npy"), files(folder, "*.json")
    damage(npy, facts)
    capsys.readouterr()
    assert_same(read(tree, folder), plain)
    assert f"{npy} is damaged; it is made anew" in capsys.readouterr().err
    read(tree, folder)
    assert "is damaged" not in capsys.readouterr().err


def test_no_program_of_the_user_cuts_a_mapped_file_off(tree, folder):
    read(tree, folder)
    (npy,) = files(folder, "*.npy")
    assert npy.stat().st_mode & 0o777 == 0o400
    touch(trees.image("helen", tree, 0))
    read(tree, folder)  # and it can still be removed
    assert not npy.exists()


def test_what_was_checked_is_what_is_mapped(tree, folder, no_decoding, monkeypatch):
    before = read(tree, folder)
    no_decoding()
    (npy,) = files(folder, "*.npy")
    check = cache._crc32

    def taken_over(file):
        value = check(file)
        write_over(npy, b"")
        return value

    monkeypatch.setattr(cache, "_crc32", taken_over)
    assert_same(read(tree, folder), before)


def test_npy_without_json_is_not_complete(tree, folder, no_decoding):
    """The .json is what says that the other file was written to its end."""
    read(tree, folder)
    files(folder, "*.json")[0].unlink()
    no_decoding()
    with pytest.raises(AssertionError, match="decoded"):
        read(tree, folder)


def test_bad_faces_are_remembered_and_are_errors_without_skip_bad(tree, folder, no_decoding):
    path = trees.image("helen", tree, 1)
    content = path.read_bytes()
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot decode"):
        read(tree, folder)
    assert files(folder) == []
    plain = read(tree, None, skip_bad=True)
    for _ in range(2):
        assert_same(read(tree, folder, skip_bad=True), plain)
    with pytest.raises(DataError, match="cannot decode"):
        read(tree, folder)
    path.write_bytes(content)
    assert len(read(tree, folder).images) == 3
    no_decoding()
    assert len(read(tree, folder, skip_bad=True).images) == 3


def start_reader(tree, folder, code=READER):
    arguments = [sys.executable, "-c", code, EXAMPLE, tree, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_two_processes_that_write_at_once_agree(tree, folder):
    """Both find no cache before either has written: they wait for one another in between."""
    meeting = """
import time
from pathlib import Path
from faceparse.data import cache
whole = cache._write
def wait(file, rows, count, side):
    (Path(sys.argv[3]) / cache.FOLDER / f"{id(wait)}-{time.time_ns()}.here").touch()
    while len(list(Path(sys.argv[3]).rglob("*.here"))) < 2:
        time.sleep(0.01)
    return whole(file, rows, count, side)
cache._write = wait
"""
    code = READER.replace(
        "from faceparse.data import open_dataset\n", meeting + READER.splitlines()[3] + "\n"
    )
    processes = [start_reader(tree, folder, code) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    plain = read(tree, None)
    sums = f"{plain.images.long().sum().item()} {plain.labels.long().sum().item()}\n"
    assert [out for out, _ in outputs] == [sums, sums]
    for path in files(folder, "*.here"):
        path.unlink()
    assert [path.suffix for path in files(folder)] == [".json", ".npy"]
    assert_same(read(tree, folder), plain)


def test_a_killed_writer_leaves_nothing_that_counts(tree, folder, no_decoding):
    stopping = READER.replace(
        "faces =",
        "from faceparse.data import cache\n"
        "def stop(file, rows, count, side):\n"
        "    file.write(b'begun')\n"
        "    file.flush()\n"
        "    print('writing', flush=True)\n"
        "    import time; time.sleep(600)\n"
        "cache._write = stop\n"
        "faces =",
    )
    process = start_reader(tree, folder, stopping)
    try:
        assert process.stdout.readline() == "writing\n"
        (left,) = files(folder)
        # Long ago, but its writer lives: it stays.
        os.utime(left, (time.time() - 7200,) * 2)
        plain = read(tree, folder)
        assert left.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (npy,) = files(folder, "*.npy")
    npy.unlink()
    assert_same(read(tree, folder), plain)
    assert [path.suffix for path in files(folder)] == [".json", ".npy"]
    no_decoding()
    assert_same(read(tree, folder), plain)


def test_a_fresh_unlocked_temporary_is_left_alone(tmp_path):
    stem = "helen-train-fine-128-all-0123456789abcdef0123"
    young, old, lone = (
        tmp_path / f"{stem}.{ending}" for ending in ("0123456789ab.tmp", "ba9876543210.tmp", "npy")
    )
    for path in (young, old, lone):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    os.utime(lone, (0, 0))
    cache.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [young]


def test_files_of_others_are_left_alone(tree, folder):
    """In the folder that the user names, and in the cache's own."""
    own = folder / cache.FOLDER
    own.mkdir(parents=True)
    stem = "helen-train-fine-128-all"
    names = ["results.npy", "draft.tmp", "helen-train.npy", f"{stem}-mine.npy", f"{stem}-mine.tmp"]
    mine = {path / name for path in (folder, own) for name in names}
    for path in mine:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    read(tree, folder)
    read(tree, folder, limit=2)
    touch(trees.image("helen", tree, 0))
    read(tree, folder)  # removes the stale files of the cache
    assert len(files(folder, "*.json")) == 2
    assert all(path.read_bytes() == b"mine" for path in mine)


def test_the_cache_is_private(tree, folder):
    before = os.umask(0)
    try:
        read(tree, folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    own = folder / cache.FOLDER
    own.chmod(0o777)
    read(tree, folder)
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", [".", cache.FOLDER])
def test_the_folder_of_another_user_is_refused(place, tree, folder, monkeypatch):
    (folder / cache.FOLDER).mkdir(parents=True)
    found = os.lstat

    def lstat(path):
        status = found(path)
        if path == folder / place:
            return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:]])
        return status

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(DataError, match=r"must be yours, it belongs to user .*--no-cache"):
        read(tree, folder)
    assert files(folder) == []


def test_a_link_in_place_of_the_cache_is_refused(tree, folder, tmp_path):
    """Another user could choose where it leads."""
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / cache.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="must not be a link"):
        read(tree, folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_cached(tree, folder, monkeypatch, capsys):
    decode = load.Decoder.decode

    def change(self, record):
        touch(record.image)
        return decode(self, record)

    monkeypatch.setattr(load.Decoder, "decode", change)
    faces = read(tree, folder)
    monkeypatch.undo()
    assert_same(faces, read(tree, None))
    assert files(folder) == []
    assert "changed or failed while it was read" in capsys.readouterr().err


def test_trouble_that_may_pass_is_not_cached(tree, folder, monkeypatch, capsys):
    """A share that is gone for a moment must not leave faces out for good."""
    whole = image_io.open_image

    def fail(path):
        if path == trees.image("helen", tree, 1):
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(image_io, "open_image", fail)
    faces = read(tree, folder, skip_bad=True)
    assert len(faces.images) == 2
    assert len(faces.skipped) == 1
    assert files(folder) == []
    assert "it is not cached" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_note(tree, tmp_path, capsys):
    """A file stands in its way: that holds for root too, which permissions do not bind."""
    (tmp_path / "file").write_text("")
    faces = read(tree, tmp_path / "file" / "cache")
    assert_same(faces, read(tree, None))
    assert "note: cannot write the cache in" in capsys.readouterr().err


def test_a_full_disk_is_a_note(tree, folder, monkeypatch, capsys):
    def full(file, rows, count, side):
        next(iter(rows))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    path = trees.image("helen", tree, 0)
    path.write_bytes(b"damaged")  # skipped once, not once for each attempt
    faces = read(tree, folder, skip_bad=True)
    assert len(faces.images) == 2
    assert len(faces.skipped) == 1
    assert files(folder) == []
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "cache", "images/deep/cache"])
def test_a_cache_in_the_data_sets_own_folder_is_refused(place, tree):
    before = sorted(tree.rglob("*"))
    with pytest.raises(DataError, match="own folder"):
        read(tree, tree / place)
    assert sorted(tree.rglob("*")) == before


def test_a_link_into_the_data_sets_folder_is_refused_too(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    with pytest.raises(DataError, match="own folder"):
        read(tree, tmp_path / "link" / "cache")


def test_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GATEDRNN_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert str(default_folder()) == "/one"
    monkeypatch.delenv("GATEDRNN_CACHE")
    assert str(default_folder()) == "/two/gatedrnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_folder()) == "/home/me/.cache/gatedrnn"


def test_a_user_without_a_home_has_a_default_folder(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GATEDRNN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", home)
    assert default_folder().name == f"gatedrnn-{os.getuid()}"


def test_the_fingerprint_is_of_name_size_time_and_rule(tree):
    records = helen.find(tree, "train")
    marks = [cache.fingerprint(tree, records, "rule"), cache.fingerprint(tree, records, "another")]
    marks.append(cache.fingerprint(tree, records[::-1], "rule"))
    path = trees.label("helen", tree, 2, 5)
    touch(path)
    marks.append(cache.fingerprint(tree, records, "rule"))
    path.unlink()
    marks.append(cache.fingerprint(tree, records, "rule"))
    assert len(set(marks)) == 5
