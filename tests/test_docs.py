"""Every Python block of the README and the docs runs; API, links and messages are the code's."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import gatedrnn

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "face_parsing")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


# It trains a network.
SLOW = {"network.md"}


# Not ours, or no message.
SYMPTOMS = {"torch.nn.init", "layer.weight", "Illegal instruction"}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ()) for page in WITH_CODE],
    ids=name_of,
)
def test_blocks_run_one_after_another(page, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    torch.use_deterministic_algorithms(False)
    try:
        run_blocks(page)
    finally:
        torch.use_deterministic_algorithms(True)


def run_blocks(page):
    """What the blocks of a page define together."""
    names = {"__name__": "__docs__"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    return names


def test_the_loader_of_the_docs_reads_a_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from faceparse.data import DataError, load

    loader = SimpleNamespace(**run_blocks(ROOT / "docs/face-parsing/extending.md"))
    values = np.arange(5, dtype=np.uint8).repeat(4)[:, None].repeat(20, 1)  # five stripes
    for folder in ("photos", "labels"):
        (tmp_path / folder).mkdir()
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (tmp_path / f"{split}.txt").write_text(f"{name}\n")
        Image.new("RGB", (20, 20), (10, 20, 30)).save(tmp_path / "photos" / f"{name}.jpg")
        Image.fromarray(values).save(tmp_path / "labels" / f"{name}.png")
    faces = load.load(loader, tmp_path, "train", labels="own", side=20, progress=False)
    assert faces.label_set.names[3:] == ("scarf", "microphone")
    np.testing.assert_array_equal(faces.labels[0], values)
    with pytest.raises(DataError, match="labels 'coarse'"):
        load.load(loader, tmp_path, "train", labels="coarse", side=20)


def test_api_page_names_the_public_api():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in gatedrnn.__all__:
        assert f"gatedrnn.{name}" in text, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), target


def test_readme_is_short_and_soon_shows_code():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert len(text.split()) <= 900
    assert len(text.partition("```python")[0].split()) <= 150


def test_troubleshooting_quotes_messages_of_the_code():
    files = [ROOT / "setup.py", ROOT / "build_cuda.py"]
    files += [*(ROOT / "gatedrnn").glob("*.py"), *(ROOT / "csrc").rglob("*.c*")]
    files += [ROOT / "csrc" / "cuda" / "torch_device.h"]
    files += (ROOT / "examples" / "face_parsing" / "faceparse").rglob("*.py")
    code = "\n".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in files)
    page = (ROOT / "docs" / "troubleshooting.md").read_text().replace("\\|", "|")
    quoted = set(re.findall(r"^\| (`.*?`) \| |^(`gatedrnn has .*?`)", page, re.MULTILINE))
    assert len(quoted) > 40
    for message in re.findall(r"`([^`]+)`", " ".join("".join(pair) for pair in quoted)):
        for piece in filter(None, map(str.strip, message.split("..."))):
            assert piece in code or message in SYMPTOMS, message
