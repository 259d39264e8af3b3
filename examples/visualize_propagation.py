"""Draw how a spatial gated RNN spreads a pixel, which direction wins, and whom a pixel hears.

Writes propagation.png and propagation.gif: for a hand-made gate map, for one in an image file, or
for what a trained face parser makes of a photograph.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from gatedrnn import SpatialGatedRNN

ROOT = Path(__file__).resolve().parents[1]
# Its networks and checkpoints, and what its commands share.
sys.path.insert(0, str(ROOT / "examples" / "face_parsing"))

import propagation  # noqa: E402
from propagation import Scene  # noqa: E402

from faceparse import cli  # noqa: E402
from faceparse.data import DataError, labels, transforms  # noqa: E402
from faceparse.inference import image_io  # noqa: E402
from faceparse.training import checkpoint  # noqa: E402
from faceparse.training.checkpoint import CheckpointError  # noqa: E402
from faceparse.training.config import SettingsError  # noqa: E402

LARGEST = 256  # pixels, the side of a gate map: thin walls would leak if they were scaled down


def open_image(option, path):
    """An image file, its header read and its pixels not.

    Raises:
        DataError: it cannot be read, or has more than 8 bits a channel.
    """
    image = attempt(option, path, image_io.open_image, path)
    if image.mode.startswith(("I", "F")):  # converted, these would be cut off at 255
        raise DataError(f"{option} must have 8 bits a channel, {path} is of mode {image.mode}")
    return image


def attempt(option, path, function, *arguments):
    """What the function returns; a damaged file can make Pillow raise nearly anything."""
    try:
        return function(*arguments)
    except Exception as error:
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{option} must be an image, cannot read {path}: {words}") from None


def read_gate(path):
    """A gate map (H, W), 0 .. 1, of an image: white is open, and so is what is transparent."""
    with open_image("--gate", path) as file:
        if max(file.size) > LARGEST:
            raise DataError(
                f"--gate must have at most {LARGEST} x {LARGEST} pixels, "
                f"{path} has {file.width} x {file.height}"
            )
        image = attempt("--gate", path, file.convert, "RGBA")
    paper = Image.new("RGBA", image.size, "white")
    grey = np.array(Image.alpha_composite(paper, image).convert("L"))
    return torch.from_numpy(grey).float() / 255


def read_photograph(path, side):
    """(1, 3, side, side) uint8: all of the photograph, upright, whatever its proportions."""
    with open_image("--image", path) as file:
        image = attempt("--image", path, ImageOps.exif_transpose, file)
        image = attempt("--image", path, image.convert, "RGB")
    # Bilinear in Pillow averages over the whole source area, so shrinking does not alias.
    pixels = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def read_scene(path, photograph):
    """What the layer of a trained network reads on a photograph.

    Args:
        path: the checkpoint.
        photograph: the image file.

    Returns:
        ``propagation.Scene``, and by title what to show next to it: the photograph as the network
        gets it and its labels, (H, W, 3) uint8 each.

    Raises:
        CheckpointError, DataError: a file cannot be used, or the network has no gate or is for
            a part of the face.
    """

    from faceparse.reporting import evaluation  # needs more packages than the other pictures do

    try:
        state = checkpoint.load(path)
        model = evaluation.load_model(state, "cpu", path=path)
    except CheckpointError as error:
        raise CheckpointError(f"--checkpoint: {error}") from None
    layers = [layer for layer in model.modules() if isinstance(layer, SpatialGatedRNN)]
    if layers and state["settings"]["view"] not in ("whole", "face"):
        raise CheckpointError(
            f"--checkpoint must hold a network for the whole face, "
            f"{path} knows {', '.join(state['classes'])}"
        )
    images = read_photograph(photograph, state["side"])
    scenes = []

    def keep(layer, inputs):
        x, g = inputs
        if g is not None:
            # The networks' layers have the default options; this clamp is one.
            scenes.append(Scene(x, g.clamp(-1, 1), layer.weight, layer.bias))

    for layer in layers:
        layer.register_forward_pre_hook(keep)
    parse = model.requires_grad_(False)(transforms.network_input(images))
    if not scenes:
        raise CheckpointError(
            f"--checkpoint must hold a network with a gate, such as rnn-g, "
            f"{path} holds {state['settings']['model']}"
        )
    if not all(t.isfinite().all() for t in (scenes[0].x, scenes[0].g)):
        raise CheckpointError(f"--checkpoint must give finite maps, {path} does not")
    label_set = labels.label_set(*state["classes"])
    painted = np.array(label_set.colours, np.uint8)[parse.logits[0].argmax(0).numpy()]
    shown = {"photograph": images[0].permute(1, 2, 0).numpy(), "labels": painted}
    return scenes[0], shown


def check_pixel(pixel, gate):
    """Refuse a pixel that is not on the map (H, W)."""
    height, width = gate.shape
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise SettingsError(
            f"--pixel must be in 0 .. {height - 1}, 0 .. {width - 1} on a map of {height} x "
            f"{width}, got {pixel[0]} {pixel[1]}"
        )


def check_folder(folder):
    """Refuse a folder that nothing can be written to, or that cannot be made."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise SettingsError(f"--out must be a folder that can be written to, got {folder}")


def parse_arguments():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gate", metavar="FILE", type=Path, help="a grey image as the gate map; white is open"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="of train.py, a network with a gate: its layer's own X, G and weights",
    )
    parser.add_argument(
        "--image", metavar="FILE", type=Path, help="the photograph that the network is given"
    )
    parser.add_argument(
        "--pixel",
        metavar=("ROW", "COLUMN"),
        nargs=2,
        type=int,
        help="of the map that the layer reads, from 0; default: its middle",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="default: the current folder",
    )
    args = parser.parse_args()
    if args.gate and args.checkpoint:
        parser.error(f"--gate must not be given with --checkpoint, got {args.gate}")
    if args.checkpoint and not args.image:
        parser.error("--checkpoint must be given with --image FILE, got none")
    if args.image and not args.checkpoint:
        parser.error("--image must be given with --checkpoint FILE, got none")
    return args


def main():
    args = parse_arguments()
    cli.require("matplotlib")
    import propagation_pictures

    check_folder(args.out)
    shown, pixel = None, args.pixel
    if args.checkpoint:
        scene, shown = read_scene(args.checkpoint, args.image)
    elif args.gate:
        scene = propagation.scene_of_gate(read_gate(args.gate))
    else:
        scene = propagation.scene_of_gate(propagation.walls())
        pixel = pixel or (propagation.ROW, propagation.COLUMN)
    pixel = pixel or [length // 2 for length in scene.gate.shape]
    check_pixel(pixel, scene.gate)
    files = {
        "propagation.png": propagation_pictures.png(scene, pixel, shown),
        "propagation.gif": propagation_pictures.gif(scene, pixel),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        checkpoint.write_atomically(args.out / name, data)
        cli.say(args.out / name)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
