"""Parse the faces of photographs and videos: predict.py --models DIR PHOTO... [--out DIR]."""

import functools
import sys
from pathlib import Path

from faceparse import cli
from faceparse.inference import image_io
from faceparse.inference.face_parser import FaceParser
from faceparse.inference.prediction import expand, is_video, parse_faces, run_camera, run_files
from faceparse.reporting import writers
from faceparse.training.checkpoint import claimed


def parse_arguments():
    parser = cli.Parser(
        description=__doc__,
        epilog="Exit code: 0, every source is parsed; 2, an argument is wrong or a source cannot "
        "be read; 3, all can be read, and in some is no face; 130, interrupted.",
    )
    parser.add_argument(
        "photos", metavar="PHOTO", nargs="*", help="files, folders of photographs, globs, videos"
    )
    cli.add_models_argument(parser)
    cli.add_limit_argument(parser)
    parser.add_argument("--out", metavar="DIR", type=cli.path, default=Path("parsed"))
    parser.add_argument("--all-faces", action="store_true", help="not only the largest face")
    parser.add_argument(
        "--points",
        metavar="FILE",
        type=cli.path,
        action="append",
        default=[],
        help="use the key points in this JSON, see the README; may be repeated",
    )
    parser.add_argument(
        "--camera", metavar="N", type=cli.number(int, 0, 999), help="parse what a camera sees"
    )
    parser.add_argument(
        "--every",
        metavar="N",
        type=cli.number(int, 1, 10**6),
        default=1,
        help="of a video, take each N-th frame",
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what an earlier run has done"
    )
    parser.add_argument("--device", type=cli.device, default="cpu")
    args = parser.parse_args()
    if bool(args.photos) == (args.camera is not None):
        parser.error("either PHOTO or --camera N must be given" + ", not both" * bool(args.photos))
    if args.camera is not None and args.points:
        parser.error("--points goes with photographs, not with --camera")
    return args


def main():
    args = parse_arguments()
    image_io.set_limit(args.max_megapixels)
    paths = expand(args.photos)
    points = writers.read_points(args.points, [path for path in paths if not is_video(path)])
    parser = FaceParser.load(args.models, device=args.device)
    parse = functools.partial(parse_faces, parser, everyone=args.all_faces)
    with claimed(args.out):
        if args.camera is not None:
            run_camera(args, parse)
        else:
            run_files(args, parse, parser.label_set, paths, points)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
