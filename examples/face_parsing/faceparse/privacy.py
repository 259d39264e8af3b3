"""What keeps the photographs of the page private: whom it answers, and how long they stay."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from starlette.responses import PlainTextResponse

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = "gatedrnn-page-"  # how the names of folders for photographs begin
KEEP = 3600  # seconds that a file stays there after its last use
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # SIGHUP: the terminal was closed


class OwnPagesOnly:
    """Refuses what another site's page sends: middleware for the server.

    A site can point its own name at this machine (DNS rebinding): then Host has that name. A form
    of a site can send here whatever it likes: then Origin names the site.
    """

    def __init__(self, app, address):
        self.app = app
        self.names = (address, "localhost")

    async def __call__(self, scope, receive, send):
        problem = _foreign(scope, self.names) if scope["type"] in ("http", "websocket") else None
        answer = PlainTextResponse(problem, 403) if problem else self.app
        await answer(scope, receive, send)


def _foreign(scope, names):
    """Why a request is refused, or None for one of this page."""
    port = scope["server"][1]
    hosts = [f"{name}:{port}" for name in names]
    hosts += names if port == 80 else []  # the port that browsers leave out
    allowed = {"host": hosts, "origin": [f"http://{host}" for host in hosts]}
    given = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    for name, value in given:
        if name in allowed and value.lower() not in allowed[name]:
            rule = " or ".join(allowed[name])
            return f"{name.capitalize()} must be {rule}, got {value!r}: open http://{hosts[0]}"
    return None if any(name == "host" for name, _ in given) else "a request must have a Host"


@contextlib.contextmanager
def photograph_folder():
    """A folder for photographs that goes when the page ends. Those of killed pages go first."""
    if fcntl:
        remove_stale_folders()
    draft = Path(tempfile.mkdtemp())
    folder = draft.with_name(FOLDER + draft.name)
    with contextlib.ExitStack() as stack:
        if fcntl:  # the lock comes before the name by which others find the folder
            stack.enter_context(_locked(draft))
        draft.rename(folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextlib.contextmanager
def _locked(folder):
    """Hold the lock of a folder. The lock goes with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_stale_folders():
    """Remove this user's folders whose page was killed: no process has their lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_uid == os.getuid():
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


def sweep(folder):
    """Remove what was last used more than ``KEEP`` seconds ago, uploads that broke off too."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = Path(parent, name)
            with contextlib.suppress(OSError):  # a folder that is not empty
                if time.time() - path.stat().st_mtime > KEEP:
                    path.unlink() if name in files else path.rmdir()


@contextlib.contextmanager
def stoppable():
    """Turn the first of ``STOPS`` into KeyboardInterrupt. Later ones must not break the end off."""

    def stop(*_):
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in heard}
    try:
        for number in heard:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
