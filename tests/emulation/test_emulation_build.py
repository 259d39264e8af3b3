"""What the emulated kernels are built from, and by what."""

import os
import runpy
import time

import emulation_build
import pytest


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Compiles a source of this text into tmp_path."""
    monkeypatch.setattr(emulation_build, "BUILD", tmp_path)
    source = tmp_path / "a.cpp"

    def compiled(text):
        source.write_text(text)
        return emulation_build.compiled(source)

    return compiled


def test_header_that_changes_during_a_build_is_not_taken_for_the_old_one(built, monkeypatch):
    before_and_after = iter(["before", "after"])
    monkeypatch.setattr(emulation_build, "headers", lambda *folders: next(before_and_after))
    with pytest.raises(RuntimeError, match="has changed while it was compiled"):
        built("int a;")
    assert not list(emulation_build.BUILD.glob("*.o"))


def test_what_was_not_used_for_long_is_removed(built, monkeypatch):
    old, used = built("int a;"), built("int b;")
    monkeypatch.setattr(emulation_build, "EXECUTOR", [])
    long_ago = time.time() - 15 * 24 * 3600
    for path in (old, used):
        os.utime(path, (long_ago, long_ago))
    assert built("int b;") == used
    emulation_build.build("b", [emulation_build.BUILD / "a.cpp"])
    assert not old.exists()
    assert used.exists()


@pytest.mark.parametrize("jobs", ["", "0"])
def test_environment_may_be_empty(monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    monkeypatch.setenv("CXX", "env g++")
    for text, sanitizers in (("", ""), ("0", ""), ("1", "address,alignment")):
        monkeypatch.setenv("GATEDRNN_EMULATION_SANITIZE", text)
        module = runpy.run_path(emulation_build.__file__)
        assert module["SANITIZE"] == sanitizers
    assert module["JOBS"] == 2
    assert "Free Software Foundation" in module["compiler"]()
