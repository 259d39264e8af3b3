"""Hair or lips in another colour: recolour.py --models DIR PHOTO --part hair --colour '#8b2252'."""

import argparse
import io
import sys
from pathlib import Path

import torch
from PIL import Image

from faceparse import cli
from faceparse.console import say
from faceparse.inference.face_parser import FaceParser
from faceparse.inference.image_io import (
    NoFaceError,
    PhotographError,
    is_ours,
    mark,
    read_with_profile,
    set_limit,
)
from faceparse.inference.recolouring import RECOLOURED, colour_of, converted, recolour_part
from faceparse.training.checkpoint import write_atomically

LONGEST_SIDE = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535}  # pixels that a format has room for
FORMATS = {  # by the suffix of --out
    ".png": dict(format="png", compress_level=3),
    ".jpg": dict(format="jpeg", quality=95, subsampling=0),
    ".jpeg": dict(format="jpeg", quality=95, subsampling=0),
    ".webp": dict(format="webp", quality=95),
}


def picture(text):
    """An argparse type: the path of a picture to write."""
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(FORMATS)}, got {text!r}")
    return path


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("photo", metavar="PHOTO", type=cli.path)
    cli.add_models_argument(parser)
    cli.add_limit_argument(parser)
    parser.add_argument("--part", required=True, choices=RECOLOURED)
    parser.add_argument("--colour", required=True, type=colour_of, metavar="'#RRGGBB'")
    parser.add_argument("--strength", type=cli.number(float, 0, 1), default=1.0)
    parser.add_argument("--all", action="store_true", help="every face, not the largest alone")
    parser.add_argument("--out", type=picture, metavar="FILE", help="default: PHOTO-PART.png")
    parser.add_argument("--device", type=cli.device, default="cpu")
    args = parser.parse_args()
    out = args.out or args.photo.with_name(f"{args.photo.stem}-{args.part}.png")
    if out.is_dir() or not out.parent.is_dir():  # found out before the work, not after it
        parser.error(f"--out must be a file in a folder that is there, got {out}")
    if args.out is None and out.exists() and not is_ours(out):
        parser.error(f"{out} exists, and this program did not write it: give --out")

    set_limit(args.max_megapixels)
    image, profile = read_with_profile(args.photo)
    longest = LONGEST_SIDE.get(out.suffix.lower())
    if longest and max(image.shape) > longest:
        raise PhotographError(
            f"--out: a {out.suffix} picture has {longest} pixels a side at most, and {args.photo} "
            f"is {image.shape[2]} x {image.shape[1]}"
        )
    faces = FaceParser.load(args.models, device=args.device)
    plain = converted(image, profile)  # the wanted colour is in sRGB too
    parsed_faces = faces.all_faces(plain)[: None if args.all else 1]
    if not parsed_faces:
        raise NoFaceError(f"no face found in {args.photo}")
    changed = recolour_part(plain, parsed_faces, args.part, args.colour, args.strength)
    new = (changed != plain).any(0)
    if args.strength and not new.any():
        say(f"note: no {args.part} found in {args.photo}", file=sys.stderr)
    changed = torch.where(new, converted(changed, profile, back=True), image)
    buffer = io.BytesIO()
    Image.fromarray(changed.permute(1, 2, 0).contiguous().numpy()).save(
        buffer, icc_profile=profile, pnginfo=mark(), **FORMATS[out.suffix.lower()]
    )
    write_atomically(out, buffer.getvalue())
    say(out)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
