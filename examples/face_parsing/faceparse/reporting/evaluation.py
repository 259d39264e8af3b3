"""What a network makes of a split: labels or key points, and how good they are."""

import math

import torch

from faceparse.data import transforms
from faceparse.data.labels import POINTS
from faceparse.inference import postprocess
from faceparse.models import PointsNet, build_model
from faceparse.training.checkpoint import CheckpointError
from faceparse.training.losses import resize_labels

from .metrics import accuracy, confusion_matrix, f_measures, point_errors

BATCH_PIXELS = 100 * 128 * 128


def batches(images):
    """Images (N, ...) in parts that take a bounded memory."""
    return images.split(max(1, BATCH_PIXELS // images[0, 0].numel())) if len(images) else ()


@torch.inference_mode()
def predict(model, images):
    """The label of each pixel.

    Args:
        model: a network in ``models``.
        images: (N, 3, H, W) uint8, on any device.

    Returns:
        labels (N, h, w) uint8 at the size of the network's logits, and how open the gate is,
        (N, h', w'): the mean of |G| over its channels, 0 to 1, or None without a gate; on the CPU.
    """
    device = next(model.parameters()).device
    labels, gates = [], []
    for batch in batches(images):
        output = model(transforms.network_input(batch.to(device)))
        # argmax is ten times slower than this over a dimension that is not the last in memory.
        labels.append(output.logits.max(1).indices.to("cpu", torch.uint8))
        if output.gate is not None:
            gates.append(output.gate.abs().clamp(max=1).mean(1).cpu())
    return torch.cat(labels), torch.cat(gates) if gates else None


def confusion(model, faces):
    """The confusion matrix of a network over all ``faces``."""
    predicted, _ = predict(model, faces.images)
    return compare(predicted, faces)


def compare(predicted, faces):
    """The confusion matrix of labels (N, h, w) against those of ``faces``, at the former's size."""
    truth = resize_labels(faces.labels, predicted.shape[1:])
    return confusion_matrix(predicted, truth, len(faces.label_set.names))


def scores(matrix, names):
    """Accuracy and F as fractions; an F that does not exist (see ``f_measures``) is None."""
    f = [None if math.isnan(value) else value for value in f_measures(matrix)]
    return {"accuracy": accuracy(matrix), "f": dict(zip(names, f, strict=True))}


@torch.inference_mode()
def predict_points(model, images):
    """The key points of images (N, 3, H, W) uint8: (N, P, 2), x and y in pixels, on the CPU."""
    device = next(model.parameters()).device
    size = torch.tensor([images.shape[3], images.shape[2]])
    points = [model(transforms.network_input(b.to(device))).points.cpu() for b in batches(images)]
    return torch.cat(points) * size


def measure(model, faces):
    """What a network makes of ``faces``: accuracy and F, or the error of its key points.

    The latter are means over the faces, in distances between the eyes' centres; by point and
    ``"mean"``, over all points.
    """
    if not isinstance(model, PointsNet):
        return scores(confusion(model, faces), faces.label_set.names)
    errors = point_errors(predict_points(model, faces.images), faces.points)
    by_point = dict(zip(POINTS, errors.nanmean(0).tolist(), strict=True))
    return {"error": {"mean": errors.nanmean().item(), **by_point}}


def score(model, faces):
    """One number, the larger the better: accuracy, or 1 less the points' mean error."""
    result = measure(model, faces)
    return 1 - result["error"]["mean"] if "error" in result else result["accuracy"]


def summary(model, faces, state, dataset):
    """What metrics.json holds.

    Args:
        model: the network with the state's averaged weights.
        faces: the test split.
        state: as ``checkpoint.load`` returns it.
        dataset: the name of the data set that ``faces`` come from.
    """
    return {
        "dataset": dataset,
        "model": state["settings"]["model"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": state["epoch"],
        "seconds": round(state["seconds"], 2),
        **measure(model, faces),
    }


def load_model(state, device, *, path):
    """The network that a checkpoint describes, with its averaged weights, ready to evaluate."""
    try:
        model = build_model(state["settings"]["model"], len(state["classes"]), side=state["side"])
        model.load_state_dict(state["average"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{path} holds no network that this program knows") from None
    return model.to(device).eval()


def check_fits(state, faces, *, path, scene):
    """CheckpointError if a checkpoint's network cannot parse ``faces``.

    Args:
        scene: whether the parser cuts faces out, so that the sizes may differ.
    """
    names = list(faces.label_set.names)
    if state["classes"] != names and state["settings"]["view"] != "box":
        raise CheckpointError(
            f"{path} has {len(state['classes'])} classes ({', '.join(state['classes'])}), "
            f"these faces have {len(names)} ({', '.join(names)})"
        )
    side = faces.images.shape[-1]
    if state["side"] != side and not scene:
        raise CheckpointError(
            f"{path} was trained on images of {state['side']} pixels, these have {side}"
        )


def summary_of(name, model, faces, state, dataset, faces_of, path):
    """The summary of a parser by name; its parameters are searched on the validation split once.

    Args:
        faces_of: gives the faces of a split.
        path: the checkpoint's, next to which the parameters are kept.
    """
    if postprocess.PARSERS[name][1] is None:
        return summary(model, faces, state, dataset)
    parse, found = postprocess.make(
        name, model, lambda: faces_of("validation"), path=path, state=state
    )
    result = {
        "dataset": dataset,
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": state["epoch"],
        "seconds": round(state["seconds"], 2),
    }
    if found:
        result["refinement"] = found
    return result | scores(compare(parse(faces.images), faces), faces.label_set.names)


def as_lines(result):
    """The summary, one ``key: value`` a line."""
    measures = ("accuracy", "f", "error")
    lines = [f"{key}: {value}" for key, value in result.items() if key not in measures]
    for name, value in result.get("error", {}).items():
        lines.append(f"error {name}: {100 * value:.2f} % of the distance between the eyes")
    if "accuracy" in result:
        lines.append(f"accuracy: {100 * result['accuracy']:.2f} %")
    for name, value in result.get("f", {}).items():
        lines.append(f"F {name}: " + ("-" if value is None else f"{100 * value:.2f} %"))
    return lines
