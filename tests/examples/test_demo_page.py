"""The page in a real browser: a photograph, another colour, what is no photograph; nobody else."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import demo
import pytest
import small_parser
from example_scripts import EXAMPLE, refused
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 20  # seconds for a server to start or to end
WAIT = 1000 * PATIENCE  # the browser counts in milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    small_parser.save_parser(folder)
    small_parser.save_photo(folder / "photo.png")
    small_parser.save_photo(folder / "two.png", faces=2)
    Image.new("RGB", (300, 200), "grey").save(folder / "plain.png")
    (folder / "notes.png").write_text("not an image")
    (folder / "empty.png").touch()
    Image.new("1", (14000, 14000)).save(folder / "huge.png")
    return folder


@contextlib.contextmanager
def running(folder, *, environment):
    """The page's process and its address; what it prints goes to ``log.txt`` too."""
    uploads = folder / "uploads"
    uploads.mkdir()
    script = [small_parser.__file__, EXAMPLE / "demo.py", "--models", folder]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, script)],
            env={**environment, "TMPDIR": str(uploads), "http_proxy": "http://127.0.0.1:9"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    timer = threading.Timer(2 * PATIENCE, process.kill)  # or readline would wait for ever
    timer.start()
    try:
        url = process.stdout.readline().strip()
        timer.cancel()
        assert url.startswith("http://127.0.0.1:"), (folder / "log.txt").read_text()
        yield process, url
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def url(folder):
    path = os.pathsep.join(filter(None, [str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with running(folder, environment=environment) as (process, url):
        yield url
    # Ended by a signal, it has taken the photographs with it and talked to nobody.
    log = (folder / "log.txt").read_text()
    assert process.returncode == 0, log
    assert [path for path in (folder / "uploads").rglob("*") if path.is_file()] == []
    assert small_parser.LEAVES not in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("needs Chromium (apt-get install chromium) and the Python package playwright")
    with sync_playwright() as playwright:
        # As root, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The page, opened; at the end, whatever it asked for must have been this server's."""
    asked, wrong = [], []
    page = browser.new_page(viewport={"width": 1400, "height": 950})
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert [a for a in asked if not a.startswith((url, "data:", "blob:"))] == []
    assert wrong == []


def drop(page, path, words):
    """Upload a file, and wait for words of the message."""
    page.locator("#upload input[type=file]").set_input_files(path)
    says(page, words)


def says(page, words):
    page.locator("#message").filter(has_text=re.compile(words)).wait_for()


def source(page, name):
    """Where the second picture of a pair comes from; empty without one."""
    pictures = page.locator(f"#{name} img")
    return pictures.last.get_attribute("src") if pictures.count() else ""


def changes(page, name, before):
    """Wait until that is another one; returns it."""
    page.wait_for_function(
        "([name, before]) => {"
        "  const all = document.querySelectorAll(`#${name} img`);"
        "  return all.length && all[all.length - 1].getAttribute('src') !== before;"
        "}",
        arg=[name, before],
    )
    return source(page, name)


@pytest.mark.browser
@pytest.mark.slow
def test_photograph_is_parsed_and_recoloured(page, folder):
    page.wait_for_function("document.title === 'Face parsing'")
    drop(page, folder / "photo.png", "1 face found. 320 x 320 pixels.")
    changes(page, "parts", "")
    assert page.locator("#areas tr").count() == 12
    share, pixels = page.locator("#areas tr", has_text="hair").locator("td").all_inner_texts()[1:]
    assert float(share) == pytest.approx(100 * int(pixels.replace(",", "")) / 320**2, abs=0.01)

    page.get_by_role("tab", name="Recolour").click()
    first = changes(page, "recoloured", "")
    page.get_by_label("lips").check()
    second = changes(page, "recoloured", first)
    page.get_by_label("hair").check()
    third = changes(page, "recoloured", second)
    slider = page.get_by_role("slider")
    slider.focus()
    slider.press("Home")
    changes(page, "recoloured", third)

    page.get_by_role("tab", name="Inside the layer").click()
    changes(page, "layer", "")


@pytest.mark.browser
@pytest.mark.slow
def test_faces_can_be_chosen(page, folder):
    drop(page, folder / "two.png", "2 faces found")
    largest = changes(page, "parts", "")
    page.get_by_label("all").check()
    changes(page, "parts", largest)
    says(page, "2 faces found")


@pytest.mark.browser
def test_a_photograph_without_a_face_is_a_message(page, folder):
    drop(page, folder / "plain.png", "No face found")
    drop(page, folder / "photo.png", "1 face found")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes.png", "empty.png", "huge.png"])
def test_what_is_no_photograph_is_a_message_and_the_page_lives_on(page, folder, name):
    drop(page, folder / name, f"cannot read {name}: ")
    drop(page, folder / "photo.png", "1 face found")
    shown = changes(page, "parts", "")
    drop(page, folder / name, f"cannot read {name}: ")
    assert source(page, "parts") == shown
    drop(page, folder / "two.png", "2 faces found")


@pytest.mark.browser
@pytest.mark.slow
def test_a_colour_that_is_none_is_a_message(page, folder):
    drop(page, folder / "photo.png", "1 face found")
    page.get_by_role("tab", name="Recolour").click()
    before = changes(page, "recoloured", "")
    page.locator("button.dialog-button").click()
    field = page.locator("input[type=text]")
    field.fill("purple-ish")
    field.press("Enter")
    page.get_by_text("must be like '#8b2252', got 'purple-ish'").wait_for()
    field.fill("#00ff00")
    field.press("Enter")
    changes(page, "recoloured", before)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address")
def test_page_is_on_the_loopback_address_only(url):
    port = int(url.rstrip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # what listens on every address would answer
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_port_in_use_is_one_line(monkeypatch, capsys, folder):
    for name in ("GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.setenv(name, "")  # what main sets does not stay
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = refused(monkeypatch, capsys, demo, "--models", folder, "--port", port)
    assert error == f"error: --port must be free, {port} is not"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "nowhere"], "no face parser at nowhere"),
        (["--models", "nowhere", "--port", "70000"], "argument --port: 70000 is not in 1 .. 65535"),
        ([], "required: --models"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, words):
    assert words in refused(monkeypatch, capsys, demo, *arguments)
