"""Parsers that refine: what is searched is kept for the same search, and only for that."""

import json

import pytest
import torch
from tiers import sampled

from faceparse.data import open_dataset
from faceparse.inference import postprocess
from faceparse.models import build_model


@pytest.fixture
def setup(tmp_path, monkeypatch, one_thread):
    """make(name, faces) gives what was found, and counts the searches."""
    monkeypatch.setattr(postprocess, "TRIALS", 2)
    searches, original = [], postprocess.search

    def search(*arguments, **options):
        searches.append(None)
        return original(*arguments, **options)

    monkeypatch.setattr(postprocess, "search", search)
    torch.manual_seed(0)
    models = {
        name: build_model(postprocess.PARSERS[name][0], 3).eval() for name in ("cnn-crf", "mo")
    }
    faces = open_dataset("synthetic", None, "validation", limit=3)

    def make(name, count=3):
        some = faces._replace(images=faces.images[:count], labels=faces.labels[:count])
        state = {"average": models[name].state_dict(), "classes": list(faces.label_set.names)}
        path = tmp_path / "best.pt"
        parse, found = postprocess.make(name, models[name], lambda: some, path=path, state=state)
        labels = parse(some.images)
        assert labels.shape == (count, 128, 128)
        return found, len(searches)

    return make, models, tmp_path


@pytest.mark.parametrize("name", sampled(["cnn-crf", "mo"], 1))
def test_parameters_are_kept_for_the_same_search_only(name, setup):
    make, models, _ = setup
    found, searches = make(name)
    assert searches == 1
    assert make(name) == (found, 1)
    assert make(name, count=2)[1] == 2  # other faces
    with torch.no_grad():
        models[name].head.bias += 1
    assert make(name, count=2)[1] == 3  # other weights


@pytest.mark.parametrize(
    ("name", "key", "value"),
    sampled(
        [
            ("cnn-crf", "steps", 2.5),
            ("cnn-crf", "steps", "5"),
            ("cnn-crf", "smooth_sigma", -1),
            ("cnn-crf", "colour_sigma", float("nan")),
            ("cnn-crf", "surprise", 1),
            ("mo", "smoothness", -1),
            ("mo", "smoothness", "much"),
        ],
        2,
    ),
)
def test_damaged_parameters_are_searched_again(name, key, value, setup):
    make, _, folder = setup
    found, _ = make(name)
    file = folder / f"{name}.json"
    content = json.loads(file.read_text())
    content["parameters"][key] = value
    file.write_text(json.dumps(content))
    assert make(name) == (found, 2)


@pytest.mark.slow
def test_parameters_file_that_is_none_is_searched_again(setup):
    make, _, folder = setup
    found, _ = make("mo")
    (folder / "mo.json").write_text("[")
    assert make("mo") == (found, 2)
