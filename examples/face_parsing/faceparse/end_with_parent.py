"""Runs a script that ends with the process that started it: end_with_parent.py PID SCRIPT ARG...

The watch begins before the script imports anything: the imports take seconds.
"""

import os
import runpy
import signal
import sys
import threading
import time

PAUSE = 0.2  # seconds
GRACE = 2.0  # seconds for a training to save; `checkpoint.PATIENCE` is longer


def end_with(parent):
    """When a process is no longer the parent of this one, stop as on request, then at once."""
    while os.getppid() == parent:
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    del sys.argv[:2]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as if the script ran itself
    runpy.run_path(sys.argv[0], run_name="__main__")
