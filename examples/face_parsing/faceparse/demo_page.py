"""The page of demo.py: a photograph, its parts, recoloured, and the maps of the layer."""

import argparse
import hashlib
import html
import io
import os
from pathlib import Path

import cv2
import gradio as gr
import torch
from PIL import Image

from faceparse.inference.detect import as_array
from faceparse.inference.image_io import PhotographError, as_tensor, read
from faceparse.inference.recolouring import RECOLOURED, colour_of, recolour_part
from faceparse.reporting import layer_inspection, writers

SIDE = 1600  # pixels of a photograph's longer side: the detector looks at no more


def make_page(parser):
    """The page, to be launched.

    Args:
        parser: ``FaceParser``.
    """
    with gr.Blocks(title="Face parsing", analytics_enabled=False, fill_width=True) as page:
        seen = gr.State()  # the photograph and its parsed faces
        gr.Markdown("# Face parsing\nThe photograph stays on this machine.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = gr.File(
                    label="Drop a photograph", elem_id="upload", type="filepath", height=150
                )
                which = gr.Radio(["largest", "all"], value="largest", label="Faces")
                message = gr.Markdown("No photograph yet.", elem_id="message")
                areas = gr.HTML(elem_id="areas", padding=False)
            with gr.Column(scale=3):
                with gr.Tab("Parts"):
                    parts = before_and_after("Photograph and parts", "parts")
                with gr.Tab("Recolour"):
                    with gr.Row():
                        part = gr.Radio(list(RECOLOURED), value="hair", label="Part", scale=2)
                        colour = gr.ColorPicker("#8b2252", label="Colour")
                        strength = gr.Slider(0, 1, 0.8, step=0.05, label="Strength")
                    recoloured = before_and_after("Photograph and recoloured", "recoloured")
                with gr.Tab("Inside the layer"):
                    gr.Markdown(
                        "The first stage of the largest face, in its aligned frame. The layer "
                        "spreads X in four directions, through open gates; of the four maps each "
                        "pixel and channel keeps the maximum. Shown: the mean magnitude over "
                        "channels, all on one scale."
                    )
                    layer = gr.Image(
                        show_label=False,
                        elem_id="layer",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                    )

        def parsed(image, which):
            """What changes on the page with a photograph or the choice of faces."""
            if image is None:
                return {message: gr.skip()}
            faces = parser.all_faces(image)
            found = len(faces)
            faces = faces if which == "all" else faces[:1]
            height, width = image.shape[1:]
            words = {0: "No face found.", 1: "1 face found."}.get(found, f"{found} faces found.")
            labels = writers.compose(faces, (height, width))
            propagation = (
                layer_inspection.propagation_of(parser, image, faces[0]) if faces else None
            )
            return {
                seen: (image, faces),
                message: f"{words} {width} x {height} pixels.",
                parts: (
                    stored(as_array(image)),
                    stored(writers.overlay(image, labels, parser.label_set)),
                ),
                areas: table(labels, parser.label_set) if faces else "",
                layer: stored(layer_inspection.draw(propagation)) if propagation else None,
            }

        def opened(path, which):
            try:
                image = read(path)
            except PhotographError as error:
                words = str(error).replace(str(path), Path(path).name)
                return {upload: None, message: f"**{html.escape(words)}**"}
            return {upload: None, **parsed(reduced(image), which)}

        def chosen(seen, which):
            return parsed(seen[0] if seen else None, which)

        def changed(seen, part, colour, strength):
            if not seen:
                return None
            image, faces = seen
            try:
                result = recolour_part(image, faces, part, colour_of(colour), strength)
            except argparse.ArgumentTypeError as error:
                gr.Warning(f"The colour {error}")
                return gr.skip()
            return stored(as_array(image)), stored(as_array(result))

        # One at a time: the detector is not made for two.
        options = dict(concurrency_id="parser", concurrency_limit=1, api_visibility="private")
        outputs = [seen, message, parts, areas, layer]
        show = dict(fn=changed, inputs=[seen, part, colour, strength], outputs=recoloured)
        show |= dict(show_progress="hidden", **options)  # the picture stays while a slider moves
        upload.upload(opened, [upload, which], [upload, *outputs], **options).then(**show)
        which.change(chosen, [seen, which], outputs, **options).then(**show)
        controls = [part.change, colour.change, strength.change]
        gr.on(controls, trigger_mode="always_last", **show)
    return page


def before_and_after(label, name):
    """Two pictures with a line between them that can be drawn over either."""
    return gr.ImageSlider(label=label, elem_id=name, interactive=False, max_height=640)


def stored(picture):
    """The file of a picture: an array (H, W, 3) uint8, or Pillow's.

    Gradio itself would write the file of a picture that it has shown before once more, also while
    a browser is being sent it.
    """
    data = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(data, "webp")
    name = hashlib.sha256(data.getbuffer()).hexdigest()
    path = Path(os.environ["GRADIO_TEMP_DIR"], f"{name}.webp")
    try:
        os.utime(path)  # used again, so that `privacy.sweep` leaves it
    except FileNotFoundError:
        path.write_bytes(data.getbuffer())
    return path


def reduced(image):
    """A photograph (3, H, W) uint8 within ``SIDE`` pixels."""
    height, width = image.shape[1:]
    factor = SIDE / max(height, width)
    if factor >= 1:
        return image
    size = max(1, round(factor * width)), max(1, round(factor * height))
    return as_tensor(cv2.resize(as_array(image), size, interpolation=cv2.INTER_AREA))


def table(labels, label_set):
    """The area of each class in labels (H, W) uint8, as HTML."""
    rows = ["<tr><th>class</th><th>%</th><th>pixels</th></tr>"]
    counts = torch.bincount(labels.flatten(), minlength=len(label_set.names))
    columns = label_set.names, label_set.colours, counts.tolist()
    for name, colour, count in zip(*columns, strict=True):
        swatch = f'<i style="background: rgb{colour}"></i>'
        share = 100 * count / labels.numel()
        rows.append(f"<tr><td>{swatch}{name}</td><td>{share:.2f}</td><td>{count:,}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
