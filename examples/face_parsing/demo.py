"""A page on this machine, to try a face parser on photographs: demo.py --models DIR."""

import html
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import commands
import cv2
import gradio as gr
import inside
import numpy as np
import torch
from datasets import FINE, DataError
from face_parser import FaceParser
from photographs import PhotographError, read
from PIL import ImageColor
from recolour import PARTS, recolour_part

ADDRESS = "127.0.0.1"
SIDE = 1600  # pixels of a photograph's longer side: the detector looks at no more
SESSIONS = 20  # pages whose photograph is kept in memory
FADED = 0.5  # how much of the photograph shows through its labels
CSS = """
#areas table {width: 100%; border-collapse: collapse}
#areas * {border: none !important}
#areas td, #areas th {padding: 0.1em 0; text-align: right}
#areas td:first-child, #areas th:first-child {text-align: left}
#areas i {display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em}
footer {display: none !important}
"""


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
                        part = gr.Radio(list(PARTS), value="hair", label="Part", scale=2)
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
            photo = image.permute(1, 2, 0).numpy()
            labels = joined(faces) if faces else None
            propagation = inside.propagation_of(parser, image, faces[0]) if faces else None
            return {
                seen: (image, faces),
                message: f"{words} {width} x {height} pixels.",
                parts: (photo, overlay(photo, labels)) if faces else (photo, photo),
                areas: table(labels) if faces else "",
                layer: inside.draw(propagation) if propagation else None,
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
            result = recolour_part(image, faces, part, rgb(colour), strength)
            return tuple(v.permute(1, 2, 0).numpy() for v in (image, result))

        # One at a time: the detector is not made for two.
        options = dict(concurrency_id="parser", concurrency_limit=1, api_visibility="private")
        results = [seen, message, parts, areas, layer]
        shown = dict(fn=changed, inputs=[seen, part, colour, strength], outputs=recoloured)
        upload.upload(opened, [upload, which], [upload, *results], **options).then(
            **shown, **options
        )
        which.change(chosen, [seen, which], results, **options).then(**shown, **options)
        controls = [part.change, colour.change, strength.change]
        gr.on(controls, **shown, **options, trigger_mode="always_last")
    return page


def before_and_after(label, name):
    """Two pictures with a line between them that can be drawn over either."""
    return gr.ImageSlider(label=label, elem_id=name, interactive=False, max_height=640)


def reduced(image):
    """A photograph (3, H, W) uint8 within ``SIDE`` pixels."""
    height, width = image.shape[1:]
    factor = SIDE / max(height, width)
    if factor >= 1:
        return image
    size = max(1, round(factor * width)), max(1, round(factor * height))
    array = image.permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(cv2.resize(array, size, interpolation=cv2.INTER_AREA)).permute(2, 0, 1)


def joined(faces):
    """The labels (H, W) uint8 of all faces; where two overlap, those of the larger, nearer one."""
    labels = torch.zeros_like(faces[0].labels)
    for face in reversed(faces):
        labels = torch.where(face.labels > 0, face.labels, labels)
    return labels.numpy()


def overlay(photo, labels):
    """Labels (H, W) in their colours over a photograph (H, W, 3); the background as it is."""
    colours = np.array(FINE.colours, np.uint8)[labels]
    mixed = cv2.addWeighted(photo, FADED, colours, 1 - FADED, 0)
    return np.where((labels > 0)[..., None], mixed, photo)


def table(labels):
    """The area of each class in labels (H, W), as HTML."""
    rows = ["<tr><th>class</th><th>%</th><th>pixels</th></tr>"]
    counts = np.bincount(labels.ravel(), minlength=len(FINE.names))
    for name, colour, count in zip(FINE.names, FINE.colours, counts.tolist(), strict=True):
        swatch = f'<i style="background: rgb{colour}"></i>'
        share = 100 * count / labels.size
        rows.append(f"<tr><td>{swatch}{name}</td><td>{share:.2f}</td><td>{count:,}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def rgb(colour):
    """What the colour field sends, '#rrggbb' or 'rgba(r, g, b, a)' with decimals, as integers."""
    if colour.startswith("rgb"):
        values = colour.partition("(")[2].rstrip(")").split(",")[:3]
        return tuple(min(255, max(0, round(float(v)))) for v in values)
    return ImageColor.getrgb(colour)[:3]


def main():
    parser = commands.Parser(description=__doc__)
    parser.add_argument("--models", required=True, metavar="DIR", help="what train.py --all left")
    parser.add_argument(
        "--port", type=commands.number(int, 1, 65535), help="default: a free one from 7860"
    )
    parser.add_argument("--device", type=commands.device, default="cpu")
    args = parser.parse_args()

    faces = FaceParser.load(args.models, device=args.device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory() as folder:  # the photographs go when the page does
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(faces)
        try:
            _, url, _ = page.launch(
                server_name=ADDRESS,
                server_port=args.port,
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                run_history=False,
                max_file_size="100mb",
                state_session_capacity=SESSIONS,
                theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
                css=CSS,
            )
        except OSError:
            raise DataError(f"--port must be free, {args.port or 'none from 7860 on'} is") from None
        print(url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(commands.exit_code(main))
