"""The page in a real browser: a photograph, another colour, what is no photograph; nobody else."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import demo
import pytest
import small_parser
from example_scripts import EXAMPLE, refused
from PIL import Image

from faceparse import demo_page, privacy

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
    uploads.mkdir(exist_ok=True)
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


def left_in(uploads):
    """The files in a folder for temporary files, and the page's own folders."""
    return [p for p in uploads.rglob("*") if p.is_file() or p.name.startswith(privacy.FOLDER)]


@pytest.fixture(scope="module")
def environment():
    path = os.pathsep.join(filter(None, [str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def url(folder, environment):
    with running(folder, environment=environment) as (process, url):
        yield url
    # Ended by a signal, it has taken the photographs with it and talked to nobody.
    log = (folder / "log.txt").read_text()
    assert process.returncode == 0, log
    assert left_in(folder / "uploads") == []
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


def ask(url, method="GET", path="/", body=None, **headers):
    """The status and the text of an answer; headers as given, Host too."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def send(url, content, **headers):
    """Upload a file, as a form does."""
    form = f'--X\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n{content}'
    headers["Content-Type"] = "multipart/form-data; boundary=X"
    return ask(url, "POST", "/gradio_api/upload", f"{form}\r\n--X--\r\n", **headers)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_page_answers_to_its_own_names(url, name):
    port = urllib.parse.urlsplit(url).port
    host = f"{name}:{port}"
    assert ask(url, Host=host)[0] == 200
    assert send(url, name, Host=host, Origin=f"http://{host.lower()}")[0] == 200


@pytest.mark.parametrize("path", ["/", "/gradio_api/info"])
@pytest.mark.parametrize(
    "host", ["evil.example:{}", "127.0.0.1", "localhost:1", "127.0.0.1.x:{}", ""]
)
def test_another_host_is_refused(url, path, host):
    host = host.format(urllib.parse.urlsplit(url).port)
    status, words = ask(url, path=path, Host=host)
    assert status == 403
    assert words.startswith("Host must be 127.0.0.1:")
    assert words.endswith(f"got {host!r}: open {url.rstrip('/')}")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{}", "file://"],
)
def test_uploads_of_another_site_are_refused(url, folder, origin):
    origin = origin.format(urllib.parse.urlsplit(url).port)
    before = set((folder / "uploads").rglob("*"))
    status, words = send(url, origin, Origin=origin)
    assert status == 403
    assert words.startswith("Origin must be http://127.0.0.1:")
    assert set((folder / "uploads").rglob("*")) == before


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files, empty."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


needs_locks = pytest.mark.skipif(privacy.fcntl is None, reason="needs locks of folders")


@needs_locks
def test_folders_of_killed_pages_go_and_others_stay(temporary):
    killed = temporary / f"{privacy.FOLDER}killed"
    (killed / "a").mkdir(parents=True)
    (killed / "a" / "photo.png").touch()
    other = temporary / "other"
    other.mkdir()
    (temporary / f"{privacy.FOLDER}link").symlink_to(other)
    (temporary / f"{privacy.FOLDER}file").touch()
    with privacy.photograph_folder() as first:
        (first / "photo.png").touch()
        with privacy.photograph_folder() as second:
            assert first != second
            assert (first / "photo.png").exists()
            assert not killed.exists()
        assert not second.exists()
    left = {path.name for path in temporary.iterdir()}
    assert left == {"other", f"{privacy.FOLDER}link", f"{privacy.FOLDER}file"}


@needs_locks
def test_folder_of_another_user_stays(temporary, monkeypatch):
    folder = temporary / f"{privacy.FOLDER}x"
    folder.mkdir()
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    privacy.remove_stale_folders()
    assert folder.exists()


def test_old_files_go_while_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    picture = Image.new("RGB", (8, 8), "grey")
    again, idle = demo_page.stored(picture), demo_page.stored(Image.new("RGB", (8, 8), "red"))
    upload = tmp_path / "upload" / "photo.png"
    upload.parent.mkdir()
    upload.touch()
    new = tmp_path / "new.png"
    new.touch()
    long_ago = time.time() - privacy.KEEP - 60
    for path in (again, idle, upload, upload.parent):
        os.utime(path, (long_ago, long_ago))
    content = again.read_bytes()
    assert demo_page.stored(picture) == again  # shown again
    privacy.sweep(tmp_path)
    os.utime(upload.parent, (long_ago, long_ago))  # its file went a while ago
    privacy.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {again, new}
    assert again.read_bytes() == content
    again.unlink()
    assert demo_page.stored(picture).read_bytes() == content


@pytest.mark.parametrize("name", privacy.STOPS)
def test_signals_end_the_page_in_order(name):
    if not hasattr(signal, name):
        pytest.skip(f"there is no {name} here")
    number, ended = getattr(signal, name), []
    # A shell ignores some in what it starts in the background.
    given = signal.signal(number, signal.SIG_DFL)

    def page():
        with privacy.stoppable():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # the second must not break the end off
                signal.raise_signal(signal.SIGTERM)
                ended.append(name)

    try:
        with pytest.raises(KeyboardInterrupt):
            page()
        assert ended == [name]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, given)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with SIGHUP
    try:
        with privacy.stoppable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@needs_locks
@pytest.mark.slow
def test_closed_terminal_takes_the_photographs_and_a_kill_leaves_them_to_the_next(
    folder, environment, tmp_path
):
    for path in folder.glob("*.pt"):
        shutil.copy(path, tmp_path)
    uploads = tmp_path / "uploads"
    for number in (signal.SIGKILL, signal.SIGHUP):
        with running(tmp_path, environment=environment) as (process, url):
            assert send(url, "not a photograph")[0] == 200
            folders = [path for path in left_in(uploads) if path.is_dir()]
            assert len(folders) == 1  # the killed page's is gone
            assert len(left_in(uploads)) == 2
            process.send_signal(number)
            process.wait(PATIENCE)
        assert len(left_in(uploads)) == (2 if number == signal.SIGKILL else 0)


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
