"""Every Python block of the README and the docs runs, and the API page names the public API."""

import re
from pathlib import Path

import pytest
import torch

import gatedrnn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


# It trains a network.
SLOW = {"network.md"}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ()) for page in WITH_CODE],
    ids=name_of,
)
def test_blocks_run_one_after_another(page, threads):
    threads(2)
    torch.use_deterministic_algorithms(False)
    names = {"__name__": "__docs__"}
    text = page.read_text()
    try:
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
    finally:
        torch.use_deterministic_algorithms(True)


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
