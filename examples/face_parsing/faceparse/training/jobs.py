"""Several trainings, each in a process of its own, that can be stopped and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from faceparse.console import say

from . import checkpoint, config
from .checkpoint import CheckpointError

EXAMPLE = Path(__file__).resolve().parents[2]
WATCH = EXAMPLE / "faceparse" / "end_with_parent.py"
POLL_SECONDS = 0.2


class Job(NamedTuple):
    """One call of train.py."""

    name: str  # of its folder
    config: Path
    root: Path | None  # of the data set; None for one that is drawn


def config_file(name):
    """The file of settings by its place below configs/, without its ending."""
    return EXAMPLE / "configs" / f"{name}.toml"


def start(args, job, given):
    """train.py for one training, or to go on with it.

    Args:
        args: the options of ``cli.add_data_arguments``, ``out`` and ``jobs``.
        given: settings that win over the file's.
    """
    out = args.out / job.name
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(WATCH), str(os.getpid()), str(EXAMPLE / "train.py")]
    command += ["--config", str(job.config)]
    command += ["--out", str(out), "--device", str(args.device), "--cache", str(args.cache)]
    if job.root is not None:
        command += ["--root", str(job.root)]
    for name, value in given.items():
        command += [config.option(name), str(value)]
    for name in ("skip_bad", "no_cache"):
        if getattr(args, name):
            command.append("--" + name.replace("_", "-"))
    if (out / "last.pt").exists():
        command.append("--resume")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)  # unless the user has said how many
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(log_of(args, job), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def log_of(args, job):
    """The file with what a training says."""
    return args.out / job.name / "log.txt"


def check_epochs(args, needed, given):
    """CheckpointError before anything is trained, if a training cannot be made as long as asked."""
    for job in needed:
        path = args.out / job.name / "last.pt"
        if "epochs" not in given or not path.exists():
            continue
        before = checkpoint.load(path)["settings"]
        if before["schedule"] != "constant" and before["epochs"] != given["epochs"]:
            raise CheckpointError(
                f"{path} was trained with --epochs {before['epochs']} and a {before['schedule']} "
                f"schedule, which cannot be made {given['epochs']}: choose another --out"
            )


def train_all(args, needed, given):
    """Train what is not trained yet, ``args.jobs`` at a time.

    Args:
        args, given: see :func:`start`.
        needed: :class:`Job` each; the same one twice is trained once.

    Raises:
        CheckpointError: names the first that failed. The others are stopped, and save first.
    """
    needed = list(dict.fromkeys(needed))
    check_epochs(args, needed, given)
    waiting, running = list(needed), {}
    bar = tqdm(desc="trainings", total=len(waiting), disable=None)
    # As Ctrl-C, so that the trainings are stopped, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                running[job] = start(args, job, given)
                say(f"note: {job.name} logs to {log_of(args, job)}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                bar.update()
                if process.returncode:
                    log = log_of(args, job)
                    lines = log.read_text(errors="replace").splitlines()
                    last = lines[-1] if lines else "no output"
                    if process.returncode < 0:
                        last = f"ended by signal {-process.returncode}"
                    raise CheckpointError(f"training {job.name} failed ({log}): {last}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
        signal.signal(signal.SIGTERM, before)
