"""Runs named cases in child processes: a case that hangs or crashes is named, the rest go on.

A child prints a line when a case begins and one when it ends. When a child dies or takes too long
over a case, the parent ends its process group and starts another one for the cases left.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback

import children

MARK = "@case "
OK, WRONG, CRASHED, HUNG, CUT = "ok", "wrong", "crashed", "hung", "no time left"
FAULTS = (WRONG, CRASHED, HUNG)


def fault_of(error):
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


# ---- in the child ------------------------------------------------------------------------------


def serve(cases, names, wrong=(AssertionError,)):
    """Runs cases by name and reports each; `wrong`: errors after which the process is still good.

    Args:
        cases: dict of name -> function; what it returns is reported, and must be plain values.
    """
    for name in names:
        _say(name, None)
        try:
            result = cases[name]()
        except wrong as error:
            _say(name, WRONG, detail=fault_of(error))
        except Exception as error:
            traceback.print_exc()
            _say(name, CRASHED, detail=fault_of(error))
            sys.exit(1)  # a GPU that has reported a fault gives nothing but faults
        else:
            _say(name, OK, result=result)


def _say(name, status, **more):
    print(MARK + json.dumps({"name": name, "status": status, **more}), flush=True)


# ---- in the parent -----------------------------------------------------------------------------


STOP = threading.Event()  # set by a signal: every child ends, and who reads it is interrupted


class Interrupted(KeyboardInterrupt):
    """STOP is set."""


class Child:
    """A child in its own process group, whose lines are read with a time limit."""

    def __init__(self, command, env=None, cwd=None):
        if STOP.is_set():
            raise Interrupted
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def next_line(self, seconds):
        """A line; None at the end. Raises queue.Empty when there is none in time."""
        end = time.monotonic() + seconds
        while not STOP.is_set():
            left = end - time.monotonic()
            try:
                return self.lines.get(timeout=min(max(left, 0.01), 0.2))
            except queue.Empty:
                if left <= 0.2:
                    raise
        self.end()
        raise Interrupted

    def end(self, patience=3):
        """Ends the process group; returns the exit code."""
        children.stop(self.process, signal.SIGINT, patience)
        return self.process.wait()


def run_cases(command, names, limit, until, report, env=None, start=60):
    """Runs `command NAME...` until each case is reported.

    Args:
        limit: seconds for a case.
        start: seconds that a child may take until its first case begins.
        until: time.monotonic() at which what is left is reported as cut off.
        report: report(name, status, result or None, detail or "") for each case.
    """
    left = list(names)
    while left and time.monotonic() < until:
        _run_child(command, left, limit, until, report, env, start)
    for name in left:
        report(name, CUT, None, "")


def _run_child(command, left, limit, until, report, env, start):
    """Reports, and takes from `left`, what one child does: at least one case, if there is time."""
    child = Child([*command, *left], env)
    begun, any_begun, output, hung = None, False, [], False
    deadline = time.monotonic() + start
    try:
        while (line := child.next_line(min(deadline, until) - time.monotonic())) is not None:
            if not line.startswith(MARK):
                output.append(line)
                continue
            said = json.loads(line[len(MARK) :])
            begun, any_begun, deadline = said["name"], True, time.monotonic() + limit
            if said["status"] is not None:
                left.remove(begun)
                report(begun, said["status"], said.get("result"), said.get("detail", ""))
                begun = None
    except queue.Empty:
        hung = True
    code = child.end()
    if hung and time.monotonic() >= until:
        return
    if hung:
        why = f"more than {limit:g} s" if begun else f"nothing begun after {start:g} s"
    else:
        why = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    lost = [begun] if begun else [] if any_begun else list(left)
    for name in lost:
        left.remove(name)
        report(name, HUNG if hung else CRASHED, None, "; ".join([why, *output[-3:]]))
