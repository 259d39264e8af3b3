"""Several trainings, each in a process of its own, that can be stopped and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import checkpoint
import settings as settings_module
from checkpoint import CheckpointError
from console import say
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
POLL_SECONDS = 0.2


class Training(NamedTuple):
    """One call of train.py."""

    name: str  # of its folder
    config: Path
    root: Path | None  # of the data set; None for one that is drawn


def config(name):
    """The file of settings by its place below configs/, without its ending."""
    return HERE / "configs" / f"{name}.toml"


def start(args, training, given):
    """train.py for one training, or to go on with it.

    Args:
        args: the options of ``commands.add_data_arguments``, ``out`` and ``jobs``.
        given: settings that win over the file's.
    """
    out = args.out / training.name
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "watched.py"), str(os.getpid()), str(HERE / "train.py")]
    command += ["--config", str(training.config)]
    command += ["--out", str(out), "--device", str(args.device), "--cache", str(args.cache)]
    if training.root is not None:
        command += ["--root", str(training.root)]
    for name, value in given.items():
        command += [settings_module.option(name), str(value)]
    for name in ("skip_bad", "no_cache"):
        if getattr(args, name):
            command.append("--" + name.replace("_", "-"))
    if (out / "last.pt").exists():
        command.append("--resume")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)  # unless the user has said how many
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with open(log_of(args, training), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def log_of(args, training):
    """The file with what a training says."""
    return args.out / training.name / "log.txt"


def check_epochs(args, needed, given):
    """CheckpointError before anything is trained, if a training cannot be made as long as asked."""
    for training in needed:
        path = args.out / training.name / "last.pt"
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
        needed: :class:`Training` each; the same one twice is trained once.

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
                training = waiting.pop(0)
                running[training] = start(args, training, given)
                say(f"note: {training.name} logs to {log_of(args, training)}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
            for training, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[training]
                bar.update()
                if process.returncode:
                    log = log_of(args, training)
                    lines = log.read_text(errors="replace").splitlines()
                    last = lines[-1] if lines else "no output"
                    if process.returncode < 0:
                        last = f"ended by signal {-process.returncode}"
                    raise CheckpointError(f"training {training.name} failed ({log}): {last}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
        signal.signal(signal.SIGTERM, before)
