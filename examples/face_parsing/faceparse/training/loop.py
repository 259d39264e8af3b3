"""The training loop: from a state to a later one, step by step, in one process or several."""

import contextlib
import errno
import math
import time

import torch
from tqdm import tqdm

from faceparse.console import say
from faceparse.data.batches import Epoch, batches
from faceparse.models import build_model
from faceparse.reporting import evaluation

from .checkpoint import CheckpointError
from .config import Settings
from .distributed import Processes, StoppedError, StopRequest
from .losses import losses_of

WARM_UP = 50  # steps
AVERAGING = 8  # the average spans about the last 1 / (AVERAGING + 1) of all steps so far
SAVE_SECONDS = 120  # a longer epoch is saved in between
SAVED = "saved; --resume goes on from here"
KILLED = "a process that makes the batches (--workers) was killed"
NO_SHARED_MEMORY = (
    "the processes that make the batches (--workers) share them in /dev/shm, which is full or "
    "missing: make it larger (docker run --shm-size=2g), or use --workers 0"
)


def new_state(settings, facts, *, faces, world=1):
    """A training that has not begun, as ``checkpoint.save`` takes it.

    Args:
        settings: ``Settings``.
        facts: ``view.facts()``.
        faces: in the training split.
        world: processes.
    """
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, len(facts["classes"]), side=facts["side"])
    return {
        "settings": vars(settings).copy(),
        **facts,
        "faces": faces,
        "world": world,
        "epoch": 0,  # whole epochs done
        "batch": 0,  # batches done of the next one
        "step": 0,
        "seconds": 0.0,  # in train_epoch
        "sums": {},  # over those batches: each mean loss times the faces in it
        "seen": 0,  # faces in those batches
        "history": [],  # one dict an epoch
        "best": -1.0,  # the highest validation accuracy
        "model": model.state_dict(),
        "average": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": {},  # by a parameter's number: AdamW's tensors for it
        "scaler": {},
    }


class Training:
    """The live objects of a training, made from a state and written back to it."""

    def __init__(self, state, *, device, processes):
        self.settings = Settings(**state["settings"])
        self.device, self.processes = device, processes
        build = (self.settings.model, len(state["classes"]))
        self.model = build_model(*build, side=state["side"]).to(device)
        self.average = build_model(*build, side=state["side"]).to(device).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), weight_decay=self.settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.settings.amp == "float16" and device.type == "cuda"
        )
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self._restore_optimizer(state["optimizer"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            words = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint's state does not fit its settings: {words}"
            ) from None
        self.parallel = processes.wrap(self.model, device)

    def _restore_optimizer(self, stored):
        """Give AdamW back its tensors; ValueError if they are not those of the parameters."""
        (group,) = self.optimizer.param_groups
        parameters = {str(number): value for number, value in enumerate(group["params"])}
        for number, values in stored.items():
            parameter = parameters[str(number)]
            shapes = {name: value.shape for name, value in values.items()}
            expected = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if shapes != expected or (values["exp_avg_sq"] < 0).any() or values["step"] < 1:
                raise ValueError(f"the optimizer's tensors of parameter {number}")
            # With the parameter's strides: others could round otherwise.
            self.optimizer.state[parameter] = {
                "step": values["step"].float(),
                "exp_avg": torch.zeros_like(parameter).copy_(values["exp_avg"]),
                "exp_avg_sq": torch.zeros_like(parameter).copy_(values["exp_avg_sq"]),
            }

    def write_to(self, state):
        """FloatingPointError if a number is not finite: such a state is never saved."""
        optimizer = self.optimizer.state_dict()["state"]
        weights = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        for kind, tensors in (weights | optimizer).items():
            for name, value in tensors.items():
                if not value.isfinite().all():
                    words = f"weight '{name}'" if kind in weights else f"AdamW's '{name}'"
                    raise FloatingPointError(f"{words} is not finite at step {state['step']}")
        state.update(weights, optimizer=optimizer, scaler=self.scaler.state_dict())


def train(state, train_faces, validation, *, view, device, save, processes=None, workers=0):
    """Continue ``state`` to the epochs of its settings.

    With a constant learning rate no step depends on how many are to follow: instead of a decay the
    weights are averaged. So a run that was cut off, and one that is made longer, give the very bits
    of one straight run (on the CPU, same number of threads).

    Args:
        state: from :func:`new_state` or ``checkpoint.load``; brought up to date in place.
        train_faces: ``data.Faces``.
        validation: the validation faces as ``view.still`` gives them.
        view: from ``face_crops.make_view``.
        save: called as ``save(state, best=bool)`` after every epoch, after ``SAVE_SECONDS`` within
            one, and before a requested stop.
        processes: ``Processes`` that has started; None: this one alone.
        workers: processes that make the batches.

    Raises:
        CheckpointError: the state does not fit its own settings.
        FloatingPointError: a loss or a weight is not finite; the last save before that is on disk.
        StoppedError: a process that makes the batches was killed.
        KeyboardInterrupt: on request, after saving.
    """
    processes = processes or Processes()
    training = Training(state, device=device, processes=processes)
    with StopRequest() as stop:
        while state["epoch"] < training.settings.epochs:
            train_epoch(training, state, train_faces, view, save=save, stop=stop, workers=workers)
            row = {name: total / state["seen"] for name, total in state["sums"].items()}
            if processes.first and len(validation.images):
                score = evaluation.score(training.average, validation)
                if math.isfinite(score):  # NaN where no validation face shows a key point
                    row["validation"] = score
            # Without validation the last is the best.
            best = "validation" not in row or row["validation"] > state["best"]
            state["history"] = [*state["history"], row]
            state.update(epoch=state["epoch"] + 1, batch=0, sums={}, seen=0)
            state["best"] = max(state["best"], row.get("validation", -1.0))
            training.write_to(state)
            save(state, best=best)
            if processes.first:
                words = "  ".join(f"{k} {v:.4f}" for k, v in row.items())
                say(f"epoch {state['epoch']}/{training.settings.epochs}  {words}")


def train_epoch(training, state, faces, view, *, save, stop, workers):
    """The batches of the present epoch that ``state`` has not seen."""
    settings, processes = training.settings, training.processes
    training.model.train()
    epoch = Epoch(
        faces,
        view,
        batch_size=settings.batch_size,
        seed=settings.seed,
        epoch=state["epoch"],
        rank=processes.rank,
        world=processes.world,
    )
    bar = tqdm(
        batches(
            epoch, start=state["batch"], workers=workers, pin_memory=training.device.type == "cuda"
        ),
        f"epoch {state['epoch'] + 1}/{settings.epochs}",
        len(epoch),
        initial=state["batch"],
        leave=False,
        disable=None if processes.first else True,
    )
    start = saved = time.perf_counter()
    # Several processes stop after the same step, so none of them can stop while it waits.
    for batch in unbroken(bar, stop.at_once if processes.world == 1 else contextlib.nullcontext):
        stopping = batch is None
        if batch is not None:
            means, stopping = train_step(training, state, batch, len(epoch), stop.requested)
            count = len(epoch.chosen[state["batch"]])
            for name, mean in means.items():
                state["sums"][name] = state["sums"].get(name, 0.0) + mean * count
            state["seen"] += count
            state["batch"] += 1
        now = time.perf_counter()
        if stopping or now - saved > SAVE_SECONDS:
            state["seconds"] += now - start
            start = saved = now
            training.write_to(state)
            save(state, best=False)
            if stopping:
                raise KeyboardInterrupt(SAVED)
    state["seconds"] += time.perf_counter() - start


def unbroken(made, waiting):
    """The batches, and None instead of one if a request to stop came while it was waited for.

    Args:
        waiting: makes the context to wait in.

    Raises:
        StoppedError: a process that makes the batches is gone, or has no memory to share them.
    """
    made = iter(made)
    while True:
        batch = None
        try:
            with waiting():
                batch = next(made)
        except StopIteration:
            return
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:
            if "shared memory" in str(error) or "Bus error" in str(error):
                raise StoppedError(NO_SHARED_MEMORY) from None
            if "is killed by signal" in str(error) or "exited unexpectedly" in str(error):
                raise StoppedError(KILLED) from None
            raise
        except OSError as error:  # of the queues between the processes
            if error.errno in (errno.ENOENT, errno.ENOSPC, errno.ENOSYS):
                raise StoppedError(NO_SHARED_MEMORY) from None
            raise
        yield batch
        if batch is None:
            return


def train_step(training, state, batch, steps, stop_requested):
    """One step on one batch; returns the mean losses by name and whether any process must stop."""
    settings, processes, device = training.settings, training.processes, training.device
    state["step"] += 1
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(settings, state["step"], steps)
    batch = batch.to(device)
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    with torch.autocast(device.type, types.get(settings.amp), enabled=settings.amp != "off"):
        output = training.parallel(batch.images)
    output = output._replace(**{k: v.float() for k, v in output._asdict().items() if v is not None})
    losses = losses_of(output, batch, background=settings.background)
    # Sums over all processes, and with them whether one was asked to stop: all must agree.
    mine = [loss.total.detach() for loss in losses.values()]
    mine += [loss.count for loss in losses.values()]
    mine.append(torch.tensor(float(stop_requested), device=device))
    *sums, stopping = processes.add_up(torch.stack(mine)).tolist()
    totals, counts = sums[: len(losses)], sums[len(losses) :]
    means = {
        name: total / count if count else 0.0
        for name, total, count in zip(losses, totals, counts, strict=True)
    }
    for name, mean in means.items():
        if not math.isfinite(mean):
            shown = ", ".join(map(str, batch.faces[:10].tolist()))
            raise FloatingPointError(
                f"the loss '{name}' is {mean} at step {state['step']} (epoch {state['epoch'] + 1}, "
                f"batch {state['batch'] + 1}, training faces {shown})"
            )
    # The gradients are averaged over the processes; the mean is over the pixels of all of them.
    loss = sum(
        getattr(settings, f"weight_{name}") * processes.world / max(count, 1) * losses[name].total
        for name, count in zip(losses, counts, strict=True)
    )
    training.optimizer.zero_grad()
    training.scaler.scale(loss).backward()
    if settings.clip:
        training.scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), settings.clip)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    update_average(training.average, training.model, state["step"])
    return means, stopping > 0


def learning_rate(settings, step, steps):
    """A linear warm-up, then constant, or a half cosine to zero at the last step."""
    rate = settings.lr * min(1, step / WARM_UP)
    if settings.schedule == "cosine":
        done = min(1, step / (steps * settings.epochs))
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


@torch.no_grad()
def update_average(average, model, step):
    """Polynomial-decay averaging: the weight of a step is proportional to about step ** 8.

    The running statistics of batch normalisation are averaged with the weights.
    """
    share = (AVERAGING + 1) / (AVERAGING + step)
    old, new = average.state_dict().values(), model.state_dict().values()
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], share)
