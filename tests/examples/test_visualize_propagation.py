"""The pictures of how a pixel spreads: what they show is what the layer does."""

import importlib
import io
import sys

import numpy as np
import pytest
import torch
import train
from comparison import F64, assert_close
from example_scripts import QUICK, ROOT, call, refused
from PIL import Image

from faceparse.data import COARSE
from faceparse.data.labels import POINTS
from faceparse.reporting import evaluation
from faceparse.training import checkpoint, loop
from faceparse.training.config import Settings
from gatedrnn import SpatialGatedRNN
from gatedrnn.reference import spatial_gated_rnn


@pytest.fixture(autouse=True)
def quick(one_thread):
    pass


@pytest.fixture
def propagation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import propagation

    return propagation


@pytest.fixture
def pictures(propagation):
    import propagation_pictures

    return propagation_pictures


@pytest.fixture
def command(propagation):
    import visualize_propagation

    return visualize_propagation


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """RNN-G after one short epoch on drawn faces, and networks that cannot be shown, by name."""
    out = tmp_path_factory.mktemp("trained")
    arguments = [*QUICK, "--limit", 2, "--model", "rnn-g", "--epochs", 1, "--out", out]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, train, *arguments) == 0
    paths = {"rnn-g": out / "best.pt"}
    face = {"classes": list(COARSE.names), "side": 128, "layout": {}}
    layout = {"shape": [[150, 100], [100, 100], [125, 130], [145, 160], [105, 160]]}
    layout |= {key: [0, 0, 60, 60] for key in ("eye", "nose", "mouth")}
    part = {"classes": ["background", "upper lip", "inner mouth", "lower lip"], "side": 64}
    for name, settings, facts in (
        ("rnn", {"model": "rnn"}, face),
        ("cnn-s", {"model": "cnn-s"}, face),
        ("mouth", {"model": "rnn-g", "view": "mouth"}, {**part, "layout": layout}),
        ("points", {"model": "points"}, {"classes": list(POINTS), "side": 64, "layout": {}}),
    ):
        paths[name] = out / f"{name}.pt"
        state = loop.new_state(Settings(**settings), facts, faces=2)
        checkpoint.save(paths[name], state)
    return paths


@pytest.fixture
def image(tmp_path):
    """A grey image, 6 pixels high and 9 wide, with a closed column."""
    grey = np.full((6, 9), 255, np.uint8)
    grey[:, 5] = 0
    Image.fromarray(grey).save(tmp_path / "gate.png")
    return tmp_path / "gate.png"


def random_scene(propagation, *, layers, channels=2, gates=2, size=(4, 5)):
    generator = torch.Generator().manual_seed(layers)
    x, g = (torch.randn(1, c, *size, generator=generator, dtype=F64) for c in (channels, gates))
    weight = 0.5 * torch.randn(4, channels, channels, generator=generator, dtype=F64)
    bias = torch.randn(4, channels, generator=generator, dtype=F64)
    return propagation.Scene(x, g.clamp(-1, 1), weight, bias, layers)


@pytest.mark.parametrize(("layers", "gates"), [(1, 2), (2, 2), (3, 1)])
def test_influence_is_the_slope_of_finite_differences(layers, gates, propagation):
    scene = random_scene(propagation, layers=layers, gates=gates)

    def target(x, g):
        for _ in range(layers):
            x = spatial_gated_rnn(x, g, scene.weight, scene.bias)
        return x[0, :, 2, 3].sum()

    slopes = {"x": torch.zeros_like(scene.x), "g": torch.zeros_like(scene.g)}
    for name, slope in slopes.items():
        for i in range(slope.numel()):
            values = []
            for step in (1e-6, -1e-6):
                inputs = {"x": scene.x.clone(), "g": scene.g.clone()}
                inputs[name].view(-1)[i] += step
                values.append(target(**inputs))
            slope.view(-1)[i] = (values[0] - values[1]) / 2e-6
    found = propagation.influence(scene, (2, 3))
    for ours, slope in zip(found, slopes.values(), strict=True):
        torch.testing.assert_close(ours, slope[0].square().sum(0).sqrt(), rtol=1e-6, atol=1e-7)
        assert (ours > 0).any()


def test_influence_at_rest_is_that_of_the_mean_of_the_directions(propagation):
    """Where all directions tie, the maximum's gradient is the mean's, which no x changes."""
    scene = random_scene(propagation, layers=2)._replace(bias=None)
    found, _ = propagation.influence(scene._replace(x=torch.zeros_like(scene.x)), (1, 1))
    x = scene.x.requires_grad_()
    y = x
    for _ in range(2):
        y = spatial_gated_rnn(y, scene.g, scene.weight, merge="mean")
    (slope,) = torch.autograd.grad(y[0, :, 1, 1].sum(), x)
    assert_close(found, slope[0].norm(dim=0))


def test_winner_is_the_largest_map_of_the_channel_that_differs_most(propagation):
    scene = random_scene(propagation, layers=1, channels=3, gates=1)
    scene.g[0, 0, 2] = 0
    found = propagation.winners(scene)
    maps = spatial_gated_rnn(scene.x, scene.g, scene.weight, scene.bias, merge=None)[0]
    for row, column in np.ndindex(4, 5):
        here = maps[:, :, row, column].numpy()  # (4, 3)
        channel = np.argmax(here.max(0) - here.min(0))
        expected = propagation.TIE if row == 2 else np.argmax(here[:, channel])
        assert found[row, column] == expected
    assert set(found.unique().tolist()) == {0, 1, 2, 3, propagation.TIE}


def test_winner_on_an_open_map_is_the_direction_from_the_farthest_border(propagation):
    """By hand, for x = 1: each direction has collected as many pixels as lie behind."""
    found = propagation.winners(propagation.scene_of_gate(torch.ones(3, 5)))
    right, left, tie = 0, 1, propagation.TIE
    # All four are as long in the middle of 3 x 3; here rows are longer than columns.
    assert found[1].tolist() == [left, left, tie, right, right]
    assert found[0].tolist() == [left, left, tie, right, right]
    tall = propagation.winners(propagation.scene_of_gate(torch.ones(5, 3)))
    down, up = 2, 3
    assert tall[:, 1].tolist() == [up, up, tie, down, down]


def test_impulse_fades_along_its_row_and_column_and_stops_at_a_closed_gate(propagation):
    gate = torch.ones(3, 6, dtype=F64)
    gate[:, 4] = 0
    maps, merged = propagation.spread(propagation.scene_of_gate(gate), (1, 1))
    w = propagation.WEIGHT
    assert_close(maps[0, 0, 1], torch.tensor([0, 1, w, w * w, 0, 0], dtype=F64))
    assert_close(maps[1, 0, 1], torch.tensor([w, 1, 0, 0, 0, 0], dtype=F64))
    assert_close(maps[2, 0, :, 1], torch.tensor([0, 1, w], dtype=F64))
    assert_close(maps[3, 0, :, 1], torch.tensor([w, 1, 0], dtype=F64))
    assert_close(merged[0, 0, 1], torch.tensor([w, 1, w, w * w, 0, 0], dtype=F64))
    assert len(merged) == propagation.LAYERS
    assert (merged[..., 4:] == 0).all()
    assert (merged[1:, ..., :4] > 0).all()


def test_closed_room_stays_zero_outside_in_and_inside_out(propagation):
    scene = propagation.scene_of_gate(propagation.walls())
    room = torch.zeros(propagation.SIZE, propagation.SIZE, dtype=torch.bool)
    room[20:34, 29:37] = True
    for pixel, closed in (((propagation.ROW, propagation.COLUMN), room), ((25, 33), ~room)):
        _, merged = propagation.spread(scene, pixel)
        assert (merged[:, 0, closed] == 0).all()
        heard, _ = propagation.influence(scene._replace(x=torch.zeros_like(scene.x)), pixel)
        # The walls' own x is heard, on the side that they face.
        assert (heard[closed & (scene.gate == 1)] == 0).all()
        assert (heard[~closed] > 0).float().mean() > 0.9


def test_steps_hold_what_is_near_and_end_in_the_scan(propagation):
    scene = random_scene(propagation, layers=1)
    states = list(propagation.steps(scene.x, scene.g, scene.weight))
    whole = spatial_gated_rnn(scene.x, scene.g, scene.weight, merge=None)[0]
    assert len(states) == 5  # pixels of the longer lines
    assert torch.equal(states[0], scene.x.expand(4, -1, -1, -1))
    assert_close(states[-1], whole)
    for k, state in enumerate(states):  # a line's first pixels have nothing farther behind
        assert_close(state[0, ..., : k + 1], whole[0, ..., : k + 1])
        assert_close(state[3, ..., max(0, 3 - k) :, :], whole[3, ..., max(0, 3 - k) :, :])


def test_waves_are_the_impulse_under_way(propagation):
    scene = propagation.scene_of_gate(propagation.walls())
    pixel = (propagation.ROW, propagation.COLUMN)
    waves = propagation.waves(scene, pixel)
    _, merged = propagation.spread(scene, pixel)
    assert len(waves[0]) == 31  # the right border is 30 pixels away
    rows, columns = torch.meshgrid(*[torch.arange(propagation.SIZE)] * 2, indexing="ij")
    distance = (rows - pixel[0]).abs() + (columns - pixel[1]).abs()
    for step, wave in enumerate(waves[0]):
        assert torch.equal(wave[0] > 0, (merged[0, 0] > 0) & (distance <= step))
    for wave, end in zip(waves, merged, strict=True):
        torch.testing.assert_close(wave[-1], end)


def test_paint_is_paper_where_nothing_is_and_darker_with_each_value(pictures):
    values = torch.tensor([[0.0, 1e-9, 0.01, 0.1, 1.0]])
    painted = pictures.paint(values, torch.ones(1, 5)).sum(-1)[0]
    assert painted[0] == 3
    assert (np.diff(painted) < 0).all()
    closed = pictures.paint(torch.zeros(1, 5), torch.zeros(1, 5))
    assert (closed == pictures.CLOSED).all()


def decode(data):
    """All frames of an animation, RGB arrays, and the milliseconds of each."""
    with Image.open(io.BytesIO(data)) as file:
        pages, times = [], []
        for i in range(file.n_frames):
            file.seek(i)
            pages.append(np.array(file.convert("RGB")))
            times.append(file.info["duration"])
        return pages, times


def test_animation_has_a_frame_a_step_and_ends_in_the_final_state(propagation, pictures):
    scene = propagation.scene_of_gate(torch.ones(5, 7))._replace(layers=1)
    pages, times = decode(pictures.gif(scene, (2, 1)))
    assert len(pages) == 6  # the farthest pixel of the cross is 5 steps away
    assert times == [pictures.STEP] * 5 + [pictures.END]
    _, merged = propagation.spread(scene, (2, 1))
    end = pictures.paint(merged[0, 0], scene.gate, ink=pictures.INK.resampled(24))
    zoom = 80  # 400 // 5
    top, left = pictures.HEADER, pictures.MARGIN
    panel = pages[-1][top : top + 5 * zoom, left : left + 7 * zoom]
    expected = (255 * end).round().astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
    assert (panel == expected).all()
    # The first frame is the impulse alone.
    inked = (pages[0][top : top + 5 * zoom, left : left + 7 * zoom] != 255).any(-1)
    assert inked.sum() == zoom * zoom
    assert inked[2 * zoom : 3 * zoom, zoom : 2 * zoom].all()


def test_long_animation_leaves_out_steps_but_not_the_first_and_the_last(
    propagation, pictures, monkeypatch
):
    monkeypatch.setattr(pictures, "FRAMES", 4)
    scene = propagation.scene_of_gate(torch.ones(3, 23))
    pages, times = pictures.frames(scene, (1, 0))
    assert len(pages) <= 3 * 5
    assert [pages[0][0, 1, column].sum() < 3 * 255 for column in (0, 1)] == [True, False]
    assert times.count(pictures.PAUSE) == 2
    _, merged = propagation.spread(scene, (1, 0))
    for page, y in zip(pages[-1], merged[:, 0], strict=True):
        painted = pictures.paint(y, scene.gate, ink=pictures.INK.resampled(24))
        assert np.array_equal(page, (255 * painted).round())


def test_default_pictures_are_written_and_small(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, command) == 0
    names = ["propagation.gif", "propagation.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "propagation.gif").stat().st_size < 300_000
    with Image.open(tmp_path / "propagation.png") as file:
        assert file.width > 1000
    assert capsys.readouterr().out.split() == names[::-1]


def test_pictures_without_a_network_need_no_package_of_the_networks(
    propagation, image, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "visualize_propagation", raising=False)
    for name in ("cv2", "maxflow", "evaluate", "onnx", "gradio", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    command = importlib.import_module("visualize_propagation")
    monkeypatch.delitem(sys.modules, "visualize_propagation")
    assert call(monkeypatch, command, "--gate", image, "--out", tmp_path / "new") == 0


def test_missing_matplotlib_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(monkeypatch, capsys, command, "--out", tmp_path / "new")
    assert error.endswith("pip install -e '.[plot]'")
    assert not (tmp_path / "new").exists()


def test_drawn_gate_map_keeps_its_shape_and_its_walls(command, propagation, image, tmp_path):
    gate = command.read_gate(image)
    assert gate.shape == (6, 9)
    assert gate.unique().tolist() == [0, 1]
    _, merged = propagation.spread(propagation.scene_of_gate(gate), (3, 2))
    assert (merged[..., 5:] == 0).all()
    # Transparent is open.
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (command.read_gate(tmp_path / "clear.png") == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1)])
@pytest.mark.filterwarnings("error")
def test_thin_gate_map_is_drawn(size, pictures, propagation):
    scene = propagation.scene_of_gate(torch.ones(size))
    pages, _ = decode(pictures.gif(scene, (0, 0)))
    assert len(pages) >= max(size)
    assert Image.open(io.BytesIO(pictures.png(scene, (0, 0)))).format == "PNG"


def test_checkpoint_shows_its_own_layer(command, checkpoints, image, tmp_path, monkeypatch):
    scene, shown = command.read_scene(checkpoints["rnn-g"], image)
    assert shown["photograph"].shape == shown["labels"].shape == (128, 128, 3)
    model = evaluation.load_model(checkpoint.load(checkpoints["rnn-g"]), "cpu", path=None)
    seen = []
    model.rnn.register_forward_hook(lambda layer, inputs, y: seen.append(y))
    pixels = torch.from_numpy(shown["photograph"].copy()).permute(2, 0, 1)[None]
    parse = model(pixels.float() / 255 - 0.5)
    assert isinstance(model.rnn, SpatialGatedRNN)
    torch.testing.assert_close(scene.g, parse.gate.clamp(-1, 1))
    y = spatial_gated_rnn(scene.x, scene.g, scene.weight, scene.bias)
    torch.testing.assert_close(y, seen[0], rtol=1e-4, atol=1e-5)

    out = tmp_path / "new" / "folder"
    arguments = ["--checkpoint", checkpoints["rnn-g"], "--image", image, "--pixel", 40, 9]
    assert call(monkeypatch, command, *arguments, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["propagation.gif", "propagation.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pixel", "41", "0"], "--pixel must be in 0 .. 40, 0 .. 40 on a map of 41 x 41"),
        (["--pixel", "-1", "0"], "--pixel must be in 0 .. 40, 0 .. 40 on a map of 41 x 41"),
        (["--pixel", "1.5", "0"], "--pixel: invalid int value: '1.5'"),
        (["--pixel", "1"], "--pixel: expected 2 arguments"),
        (["--gate", "GATE", "--pixel", "6", "0"], "0 .. 5, 0 .. 8 on a map of 6 x 9, got 6 0"),
        (["--gate", "none.png"], "--gate must be an image, cannot read none.png: No such file"),
        (["--gate", "TEXT"], "--gate must be an image, cannot read"),
        (["--gate", "CUT"], "--gate must be an image, cannot read"),
        (["--gate", "DEEP"], "--gate must have 8 bits a channel"),
        (["--gate", "LARGE"], "--gate must have at most 256 x 256 pixels"),
        (["--gate", "GATE", "--checkpoint", "TEXT"], "--gate must not be given with --checkpoint"),
        (["--checkpoint", "TEXT"], "--checkpoint must be given with --image FILE, got none"),
        (["--image", "GATE"], "--image must be given with --checkpoint FILE, got none"),
        (["--checkpoint", "none.pt", "--image", "GATE"], "--checkpoint: no checkpoint at none.pt"),
        (
            ["--checkpoint", "TEXT", "--image", "GATE"],
            "is not a checkpoint of this program, or is damaged",
        ),
        (["--checkpoint", "rnn-g", "--image", "TEXT"], "--image must be an image, cannot read"),
        (
            ["--checkpoint", "rnn", "--image", "GATE"],
            "must hold a network with a gate",
        ),
        (["--checkpoint", "cnn-s", "--image", "GATE"], "holds cnn-s"),
        (["--checkpoint", "points", "--image", "GATE"], "must hold a network with a gate"),
        (["--checkpoint", "mouth", "--image", "GATE"], "must hold a network for the whole face"),
        (["--checkpoint", "rnn-g", "--image", "GATE", "--pixel", "64", "0"], "a map of 64 x 64"),
        (["--surprise"], "--surprise"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    arguments, words, command, checkpoints, image, tmp_path, monkeypatch, capsys
):
    files = {name: tmp_path / f"{name}.png" for name in ("TEXT", "CUT", "DEEP", "LARGE")}
    files["TEXT"].write_text("not an image")
    files["CUT"].write_bytes(image.read_bytes()[:-30])
    Image.new("I;16", (4, 4)).save(files["DEEP"])
    Image.new("L", (257, 3)).save(files["LARGE"])
    places = {"GATE": image, **files, **checkpoints}
    arguments = [places.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    assert words in refused(monkeypatch, capsys, command, *arguments, "--out", out)
    assert not out.exists()


def test_out_that_is_no_folder_is_refused_before_any_work(command, image, monkeypatch, capsys):
    def work(*arguments):
        raise AssertionError("too late")

    monkeypatch.setattr(command.propagation, "scene_of_gate", work)
    for out in (image, image / "below"):
        error = refused(monkeypatch, capsys, command, "--out", out)
        assert error == f"error: --out must be a folder that can be written to, got {out}"


def test_old_pictures_survive_a_full_disk(command, image, tmp_path, monkeypatch, capsys):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)  # the default
    (here / "propagation.png").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full_disk)
    assert "No space left" in refused(monkeypatch, capsys, command, "--gate", image)
    assert [p.name for p in here.iterdir()] == ["propagation.png"]
    assert (here / "propagation.png").read_bytes() == b"old"
