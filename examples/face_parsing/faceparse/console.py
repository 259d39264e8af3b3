"""The one way to print: a file's name may hold commands to the terminal, which are not sent."""

import sys

from tqdm import tqdm


def say(*lines, file=None):
    """Print lines, above a progress bar if there is one; see :func:`printable`."""
    file = file or sys.stdout
    for line in lines:
        tqdm.write(printable(line), file=file)
    file.flush()


def printable(text):
    """A text in one line, with escapes of Python for all that does not print, as ``\\\\x1b``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def accept_every_name():
    """Print characters that the terminal's encoding lacks as escapes, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
