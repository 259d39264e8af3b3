"""Exported networks run without the example, and give its logits."""

import os
import sys

import children
import export
import numpy as np
import pytest
import torch
from example_scripts import EXAMPLE, call, refused
from test_checkpoint import STATE

from faceparse.models import build_model, exporting
from faceparse.reporting import evaluation
from faceparse.training import checkpoint
from faceparse.training.config import Settings

# What a user of the file has; argv: the file, the images, where the logits go.
TORCH = """
import sys
import numpy, torch, gatedrnn
images = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    logits = LOAD(images)
numpy.save(sys.argv[3], logits.numpy())
assert not {"models", "transforms", "onnx", "onnxscript"} & sys.modules.keys()
"""
USERS = {
    "export": TORCH.replace("LOAD", "torch.export.load(sys.argv[1]).module()"),
    "aoti": TORCH.replace("LOAD", "torch._inductor.aoti_load_package(sys.argv[1])"),
    "onnx": """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
(logits,) = session.run(None, {"images": numpy.load(sys.argv[2])})
numpy.save(sys.argv[3], logits)
assert not {"torch", "gatedrnn", "onnx", "onnxscript"} & sys.modules.keys()
""",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of RNN-G whose clamp has work to do; tests may not change it."""
    torch.manual_seed(0)
    network = build_model("rnn-g", 3)
    torch.nn.init.normal_(network.rnn.raw_weight)
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    settings = vars(Settings(model="rnn-g", epochs=2))
    checkpoint.save(path, STATE | {"settings": settings, "average": network.state_dict()})
    return path


# AOTInductor compiles for half a minute.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k == "onnx" else pytest.mark.slow) for k in exporting.KINDS],
)
def test_exported_network_runs_elsewhere(
    kind, trained, tmp_path, monkeypatch, capsys, script_environment
):
    out = tmp_path / f"network{exporting.ENDINGS[kind]}"
    result = call(monkeypatch, export, "--checkpoint", trained, "--to", kind, "--out", out)
    if kind == "aoti" and "compiler" in str(result).lower():
        pytest.skip("AOTInductor finds no working C++ compiler here")
    assert result == 0
    assert "largest difference: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]

    images = np.random.default_rng(0).integers(0, 256, (3, 3, 128, 128), np.uint8)
    np.save(tmp_path / "images.npy", images)
    arguments = [out, tmp_path / "images.npy", tmp_path / "logits.npy"]
    children.run(
        [sys.executable, "-W", "ignore", "-c", USERS[kind], *arguments],
        cwd=tmp_path,
        env=script_environment,
        check=True,
    )
    network = evaluation.load_model(checkpoint.load(trained), "cpu", path=trained)
    with torch.no_grad():
        expected = network(torch.from_numpy(images) / 255 - 0.5).logits
    logits = torch.from_numpy(np.load(arguments[-1]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("rnn-g+small", 128), ("rnn", 512), ("points", 128)])
def test_scenes_points_and_batch_normalisation_are_exported_too(name, side, tmp_path):
    network = exporting.FromPixels(build_model(name, 5, side=side))
    pixels = torch.randint(256, (1, 3, side, side), dtype=torch.uint8)
    path = tmp_path / "network.onnx"
    assert exporting.export_network(network, pixels, path, "onnx").difference <= 1e-4
    assert path.stat().st_size > 0


class Two(torch.nn.Module):
    """Two outputs of one input."""

    def forward(self, x):
        return x * 2, x.sum(1, keepdim=True)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", ["export", "onnx"])
def test_other_networks_with_several_outputs_are_exported_too(kind, dynamic, tmp_path):
    path = tmp_path / f"two{exporting.ENDINGS[kind]}"
    found = exporting.export_network(Two(), torch.randn(1, 5), path, kind, dynamic=dynamic)
    assert found.difference <= 1e-6
    written = exporting.KINDS[kind][1](path)
    x = torch.randn(4 if dynamic else 1, 5)
    torch.testing.assert_close(tuple(written(x)), Two()(x))


@pytest.mark.parametrize("added", [1e-3, float("nan")])
def test_file_that_differs_is_an_error_and_the_old_one_stays(
    added, trained, tmp_path, monkeypatch, capsys
):
    def load(file):
        written = exporting.load_export(file)
        return lambda images: written(images) + added

    monkeypatch.setitem(exporting.KINDS, "export", (exporting.write_export, load))
    out = tmp_path / "old.pt2"
    out.write_text("old")
    arguments = ["--checkpoint", trained, "--to", "export", "--batch", 1, "--out", out]
    assert call(monkeypatch, export, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: what was written differs from the network by")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_onnx_export_writes_no_device_id(trained, tmp_path, script_environment):
    home = tmp_path / "home"
    home.mkdir()
    environment = script_environment | dict.fromkeys(["HOME", "TMPDIR", "XDG_CACHE_HOME"], home)
    for name in ("ORT_DISABLE_TELEMETRY", "CI"):
        environment.pop(name, None)
    out = tmp_path / "best.onnx"
    script = [EXAMPLE / "export.py", "--checkpoint", trained, "--to", "onnx", "--out", out]
    children.run([sys.executable, *script], env=environment, timeout=280, check=True)
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_telemetry_is_off_before_onnxruntime_is_imported(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(exporting.ExportError, match="needs onnxruntime"):
        exporting.load_onnx("best.onnx")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_missing_package_is_named(missing, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path / "best.onnx"
    arguments = ["--checkpoint", trained, "--to", "onnx", "--out", out]
    error = refused(monkeypatch, capsys, export, *arguments)
    assert error == f"error: {missing} is not installed: in the checkout, pip install -e '.[onnx]'"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "tensorrt"], "--to"),
        (["--to", "onnx", "--out", "network.pt2"], "--out must end in .onnx"),
        (["--to", "aoti", "--out", "network.pt"], "--out must end in .pt2"),
        (["--to", "onnx", "--out", "/nonexistent/network.onnx"], "no folder /nonexistent"),
        (["--to", "onnx", "--batch", "0"], "--batch"),
        (["--to", "onnx", "--batch", "many"], "--batch"),
        (["--to", "onnx"], "no checkpoint at"),
        (["--to", "onnx", "--checkpoint", "."], "--checkpoint must be a file, got ."),
        (["--to", "onnx", "--batch", "1000000000"], "1000000000 is not in 1 .. 65536"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    given = ["--checkpoint", tmp_path / "none.pt", *arguments]
    assert words in refused(monkeypatch, capsys, export, *given)
    assert list(tmp_path.iterdir()) == []
