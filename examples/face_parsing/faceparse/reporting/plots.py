"""Pictures of a training: parsed test faces or their key points, and the losses by epoch."""

import io

import torch

from faceparse.training.checkpoint import write_atomically

from .metrics import point_errors


def new_figure(**options):
    """A figure of matplotlib, which is imported here, where it is needed."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save_faces(path, images, labels, gate, *, label_set):
    """One row a face: photo, its labels in one or more columns and, where there is one, the gate.

    Args:
        path: the PNG to write.
        images: (N, 3, H, W) uint8.
        labels: dict of a column's title to (N, h, w) labels, integer.
        gate: (N, h, w), 0 (closed) to 1 (open), or None.
        label_set: ``data.LabelSet``.
    """
    colours = torch.tensor(label_set.colours, dtype=torch.uint8)
    columns = {"photo": images.permute(0, 2, 3, 1).numpy()}
    columns |= {title: colours[maps.long()].numpy() for title, maps in labels.items()}
    if gate is not None:
        columns["gate"] = gate.numpy()
    figure = new_figure(figsize=(1.7 * len(columns), 1.6 * len(images)))
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title)
        for i, picture in enumerate(pictures):
            shown = axes[i, j].imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes[i, j].set_axis_off()
    if gate is not None:
        figure.colorbar(shown, ax=axes[:, -1], shrink=0.5, fraction=0.05)
    _write(figure, path)


def save_points(path, images, points, *, shown):
    """Key points on some faces, and how many of all have an error below a bound.

    Args:
        path: the PNG to write.
        images: (N, 3, H, W) uint8.
        points: dict with "truth" and "prediction", (N, 5, 2) in pixels.
        shown: how many faces.
    """
    figure = new_figure(figsize=(11, 4))
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = left.subplots(2, -(-shown // 2), squeeze=False).flat
    for i, axis in enumerate(axes):
        axis.set_axis_off()
        if i < min(shown, len(images)):
            axis.imshow(images[i].permute(1, 2, 0).numpy())
            for (title, places), mark in zip(points.items(), "+x", strict=True):
                axis.plot(*places[i].T.numpy(), mark, label=title)
    axes[0].legend(fontsize=7, loc="lower left")
    draw_error_curve(right.subplots(), point_errors(points["prediction"], points["truth"]))
    _write(figure, path)


def save_error_curve(path, errors):
    """The share of faces below each error; errors (N, 5) from ``metrics.point_errors``."""
    figure = new_figure(figsize=(4.5, 3.6))
    draw_error_curve(figure.subplots(), errors)
    _write(figure, path)


def draw_error_curve(axes, errors):
    """The share of faces whose mean error is below a bound.

    Args:
        axes: of matplotlib.
        errors: (N, 5) from ``metrics.point_errors``.
    """
    mean = 100 * errors.nanmean(1)
    mean = mean[~mean.isnan()].sort().values
    share = 100 * torch.arange(1, len(mean) + 1) / max(1, len(mean))
    axes.step(mean, share, where="post", label=f"mean {mean.mean():.1f} %")
    axes.set(xlabel="error, % of the distance between the eyes", ylabel="% of faces")
    axes.set(xlim=(0, 20), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def save_losses(path, history):
    """The training losses and the validation accuracy by epoch.

    Args:
        path: the PNG to write.
        history: one dict an epoch, name to value; "validation" is a score, the rest losses.
    """
    figure = new_figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for name in history[0]:
        axes = right if name == "validation" else left
        axes.plot(epochs, [row[name] for row in history], marker=".", label=name)
    left.set(title="training losses", xlabel="epoch", ylim=(0, None))
    left.legend()
    right.set(title="validation", xlabel="epoch")
    _write(figure, path)


def _write(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
