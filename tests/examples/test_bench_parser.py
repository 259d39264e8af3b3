"""The benchmark of the parsers runs, counts what it says and times nothing that is wrong."""

import json
import os
import sys

import children
import pytest
import torch
from example_scripts import EXAMPLE
from torch import nn

BENCHMARKS = EXAMPLE / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_parser  # noqa: E402
import chain_contenders  # noqa: E402
import parser_contenders as contenders  # noqa: E402

from faceparse.data.transforms import normalise  # noqa: E402

OPTIONS = {"layouts": ["contiguous"], "dtypes": ["float32"], "threads": 1}


@pytest.fixture
def photos():
    return contenders.photographs(128, 1)


@pytest.mark.slow
def test_quick_run_writes_valid_json(tmp_path):
    script = str(BENCHMARKS / "bench_parser.py")
    options = ["--quick", "--models", "rnn-g", "--sides", "128", "--json", "--out", str(tmp_path)]
    done = children.run(
        [sys.executable, script, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "parser.json").read_text())
    assert report["machine"]["commit"]
    assert report["left_out"] == []

    assert [(each["mode"], each["layout"], each["dtype"]) for each in report["frames"]] == [
        ("eager", layout, dtype)
        for layout in ("contiguous", "channels_last")
        for dtype in ("float32", "bfloat16")
    ]
    for each in report["frames"]:
        assert (each["model"], each["side"], each["batch"]) == ("rnn-g", 128, 1)
        assert each["threads"] == 1
        assert each["frames"] == pytest.approx(1 / each["median"])
        assert 0 < each["low"] <= each["median"] <= each["high"]
        assert 0 <= each["differs"] <= 0.1

    (layers,) = report["layers"]
    assert {"convolutions", "deconvolutions", "scan", "heads", "the rest", "maximum"} <= set(
        layers["shares"]
    )
    assert sum(layers["shares"].values()) == pytest.approx(1)

    rows = [each for each in report["chain"] if each["what"] == chain_contenders.ALIGNED]
    assert [(each["layout"], each["dtype"]) for each in rows] == [
        ("channels_last", "float32"),  # among the steps, which come first
        ("contiguous", "float32"),
        ("contiguous", "bfloat16"),
        ("channels_last", "bfloat16"),
    ]
    assert all(0 <= each["differs"] <= 0.1 for each in rows)
    steps = {each["what"]: each for each in report["chain"]}
    assert len(steps) == len(chain_contenders.steps())
    for each in report["chain"]:
        assert each["frames"] == pytest.approx(each["faces"] / each["median"])

    assert [each["what"] for each in report["training"]] == ["cnn-s", "rnn-g", "batches"]
    assert report["training"][0]["ratio"] == 1
    text = (tmp_path / "parser.md").read_text()
    assert "| rnn-g | 128 | 1 | 1 |" in text
    assert ">= 500 frames/s" in text


def test_wrong_labels_are_not_timed(photos, monkeypatch):
    made = contenders.labelling

    def inverted(model, images, mode="eager", threads=None):
        if threads is not None:  # not the plain network
            model.head.weight.neg_()
            model.head.bias.neg_()
        return made(model, images, mode, threads)

    monkeypatch.setattr(contenders, "labelling", inverted)
    with pytest.raises(contenders.WrongResult, match=r"cnn-s eager contiguous float32: \d"):
        contenders.networks("cnn-s", 128, photos, modes=["eager"], **OPTIONS)


def test_compiler_that_fails_is_a_word(photos, monkeypatch):
    def fails(function, **options):
        def call(images):
            raise RuntimeError("no C++ compiler\nmany lines")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    calls, _, missing = contenders.networks(
        "cnn-s", 128, photos, modes=["eager", "frozen"], **OPTIONS
    )
    assert [setting.mode for setting in calls] == ["eager"]
    assert list(missing.values()) == ["RuntimeError: no C++ compiler"]


def test_untrained_network_gives_every_class(photos):
    images = normalise(photos)
    labels = contenders.labelling(contenders.network("rnn-g", 128, images), images)()
    assert labels.unique().tolist() == [0, 1, 2]


def test_photographs_of_scenes_are_whole_faces():
    scene, faces = contenders.photographs(512, 1), contenders.photographs(128, 16)
    assert torch.equal(scene[0, :, :128, 128:256], faces[1])
    assert torch.equal(scene[0, :, 128:256, :128], faces[4])


def test_converted_network_keeps_the_recurrence_in_float32():
    images = torch.zeros(1, 3, 32, 32)
    model = contenders.convert(contenders.network("rnn-g+", 128, images), torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["x_head.weight"] == torch.bfloat16
    assert {d for name, d in kinds.items() if "rnns" in name or "norms" in name} == {torch.float32}
    assert model(images.bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        ("trunk.0", nn.Conv2d(3, 3, 1), "convolutions"),
        ("x_head", nn.Conv2d(3, 3, 1), "heads"),
        ("trunk.7", nn.ConvTranspose2d(3, 3, 2), "deconvolutions"),
        ("pool", nn.MaxPool2d(2), "pooling"),
        ("trunk.9", nn.Identity(), "the rest"),
    ],
)
def test_layers_are_told_apart(name, module, part):
    assert contenders.kind(name, module) == part


def test_training_step_trains():
    batch = contenders.epoch(2, 2)[0]
    step = contenders.training_step("cnn-s", batch)
    model = next(
        cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, nn.Module)
    )
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_batches_begin_again_after_the_last():
    make = contenders.making_batches(contenders.epoch(1, 2))
    faces = [make().faces.item() for _ in range(4)]
    assert faces[:2] == faces[2:]
    assert sorted(faces[:2]) == [0, 1]


def test_best_of_the_settings_stands_beside_the_target():
    row = {"model": "rnn-g", "side": 128, "batch": 1, "threads": 2, "dtype": "float32"}
    report = {
        "frames": [
            {**row, "mode": "eager", "layout": "contiguous", "frames": 100.0},
            {**row, "mode": "frozen", "layout": "channels_last", "frames": 600.0},
            {**row, "mode": "eager", "layout": "contiguous", "frames": 900.0, "threads": 1},
            {**row, "mode": "eager", "layout": "contiguous", "frames": 900.0, "batch": 32},
        ]
    }
    words, asked, measured = bench_parser.targets(report)[0]
    assert "128 x 128" in words
    assert words.endswith("frozen channels_last")
    assert (asked, measured) == (">= 500 frames/s", "600 frames/s")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "vgg"], "choose from"),
        (["--sides", "256"], "choose from"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be 1 to"),
    ],
)
def test_bad_argument_is_one_clear_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_parser.parse(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_chains_wrong_labels_are_not_timed(monkeypatch):
    made = chain_contenders.face_parser

    def inverted(setting=contenders.PLAIN, threads=None):
        parser = made(setting, threads)
        if threads is not None:  # not the plain one
            parser.networks["face"].network.head.weight.neg_()
            parser.networks["face"].network.head.bias.neg_()
        return parser

    monkeypatch.setattr(chain_contenders, "face_parser", inverted)
    with pytest.raises(contenders.WrongResult, match=r"two stages eager contiguous float32: \d"):
        chain_contenders.settings(modes=["eager"], **OPTIONS)
