"""The two pictures of a training run: parsed test faces, and the losses by epoch."""

import io

import torch
from checkpoint import write_atomically
from matplotlib.figure import Figure


def save_faces(path, images, labels, gate, *, label_set):
    """One row a face: photo, its labels in one or more columns and, where there is one, the gate.

    Args:
        path: the PNG to write.
        images: (N, 3, H, W) uint8.
        labels: dict of a column's title to (N, h, w) labels, integer.
        gate: (N, h, w), 0 (closed) to 1 (open), or None.
        label_set: ``datasets.LabelSet``.
    """
    colours = torch.tensor(label_set.colours, dtype=torch.uint8)
    columns = {"photo": images.permute(0, 2, 3, 1).numpy()}
    columns |= {title: colours[maps.long()].numpy() for title, maps in labels.items()}
    if gate is not None:
        columns["gate"] = gate.numpy()
    figure = Figure(figsize=(1.7 * len(columns), 1.6 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title)
        for i, picture in enumerate(pictures):
            shown = axes[i, j].imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes[i, j].set_axis_off()
    if gate is not None:
        figure.colorbar(shown, ax=axes[:, -1], shrink=0.5, fraction=0.05)
    _write(figure, path)


def save_losses(path, history):
    """The training losses and the validation accuracy by epoch.

    Args:
        path: the PNG to write.
        history: one dict an epoch, name to value; "validation" is an accuracy, the rest losses.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for name in history[0]:
        axes = right if name == "validation" else left
        axes.plot(epochs, [row[name] for row in history], marker=".", label=name)
    left.set(title="training losses", xlabel="epoch", ylim=(0, None))
    left.legend()
    right.set(title="validation accuracy", xlabel="epoch")
    _write(figure, path)


def _write(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
