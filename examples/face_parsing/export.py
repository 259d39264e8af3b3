"""Write a trained network so that it runs without the example: export.py --checkpoint F --to onnx.

What is written takes images (N, 3, H, W) uint8, RGB, as they come from a file, at the size that it
was trained for. It gives the logits (N, classes, H, W) float32, for a scene at half the size; or
the key points (N, 5, 2).
"""

import argparse
import sys

import torch

from faceparse import cli
from faceparse.console import say
from faceparse.inference.face_crops import PARTS
from faceparse.models.exporting import ENDINGS, KINDS, ExportError, FromPixels, export_network
from faceparse.reporting import evaluation
from faceparse.training import checkpoint


def batch(text):
    """An argparse type: a number of images, or None for any."""
    return None if text == "dynamic" else cli.number(int, 1, 2**16)(text)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", type=cli.path)
    parser.add_argument("--to", required=True, choices=KINDS)
    parser.add_argument(
        "--out", metavar="PATH", type=cli.path, help="default: next to the checkpoint"
    )
    parser.add_argument(
        "--batch",
        metavar="{dynamic,N}",
        type=batch,
        help="images that it takes at a time; default: dynamic, any number",
    )
    args = parser.parse_args()
    if not args.checkpoint.name:
        parser.error(f"--checkpoint must be a file, got {args.checkpoint}")
    default = args.checkpoint.with_suffix(ENDINGS[args.to])
    out = args.out or default
    if out.suffix != default.suffix:
        parser.error(f"--out must end in {default.suffix} with --to {args.to}, got {out}")
    if not out.parent.is_dir():  # found out before the work, not after it
        parser.error(f"--out: there is no folder {out.parent}")

    if args.to == "onnx":
        cli.require("onnx", "onnxscript", "onnxruntime")
    state = checkpoint.load(args.checkpoint)
    network = FromPixels(evaluation.load_model(state, "cpu", path=args.checkpoint))
    part = PARTS.get(state["settings"]["view"])
    size = part.size if part else (state["side"], state["side"])
    shape = (args.batch or 1, 3, *size)
    pixels = torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        found = export_network(network, pixels, out, args.to, dynamic=args.batch is None)
    except ExportError as error:
        say(f"error: {cli.one_line(error)}", file=sys.stderr)
        sys.exit(1)
    say(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
    say(f"largest difference: {found.difference:.2g}")
    say(f"frames/s: {found.frames:.0f}, of the network itself {found.network_frames:.0f}")


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
