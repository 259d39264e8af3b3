"""Measure a trained parser: evaluate.py --checkpoint F --dataset D --root DIR."""

import json
import sys

from faceparse import cli
from faceparse.console import say
from faceparse.data import LABELS, SPLITS, DataError
from faceparse.inference import postprocess
from faceparse.inference.face_crops import Layout, how_to_open, make_view
from faceparse.inference.face_parser import FaceParser
from faceparse.models import MODELS, SECOND_STAGE
from faceparse.reporting import table3_metrics
from faceparse.reporting.evaluation import as_lines, check_fits, load_model, summary_of
from faceparse.training import checkpoint
from faceparse.training.checkpoint import CheckpointError


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--checkpoint", metavar="FILE", type=cli.path, help="of one network")
    parser.add_argument("--table", choices=["3"], help="measure the whole chain of --models")
    parser.add_argument("--models", metavar="DIR", type=cli.path, help="what train.py --all made")
    parser.add_argument(
        "--points",
        choices=("predicted", "true"),
        help="with --table 3: found in the photograph, the default, or those of the labels",
    )
    parser.add_argument(
        "--model", choices=(*MODELS, *SECOND_STAGE), help="refuse a checkpoint of another one"
    )
    parser.add_argument(
        "--parser",
        choices=postprocess.PARSERS,
        help="what makes labels of the maps; default: for MO a graph cut, else their maximum",
    )
    cli.add_dataset_argument(parser, help="default: the one it was trained on")
    parser.add_argument("--labels", choices=LABELS, help="default: those it was trained on")
    parser.add_argument("--limit", type=cli.number(int, 1), help="use N faces at most")
    cli.add_data_arguments(parser)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.table:
        if args.models is None or args.checkpoint is not None:
            parser.error("--table 3 needs --models DIR, and no --checkpoint")
        evaluate_chain(args)
    elif args.checkpoint is None or args.models or args.points:
        parser.error("--checkpoint FILE, or --table 3 --models DIR with or without --points")
    else:
        evaluate_network(args)


def evaluate_chain(args):
    """Table 3's row of a whole face parser."""
    face_parser = FaceParser.load(args.models, device=args.device)
    dataset = args.dataset or "helen"
    options = how_to_open("face", face_parser.labels)
    faces = cli.open_faces(args, dataset, args.split, limit=args.limit, **options)
    if not len(faces.images):
        raise DataError(f"{dataset}: no usable face in the {args.split} split")
    result = {"dataset": dataset, "split": args.split, "faces": len(faces.images)}
    result |= table3_metrics.summary(face_parser, faces, points=args.points or "predicted")
    say(*([json.dumps(result)] if args.json else as_lines(result)))
    cli.report_skipped(faces)


def evaluate_network(args):
    """One network, by its checkpoint."""
    state = checkpoint.load(args.checkpoint)
    trained = state["settings"]["model"]
    if args.model not in (None, trained):
        raise CheckpointError(f"{args.checkpoint} holds the model {trained}, not {args.model}")
    model = load_model(state, args.device, path=args.checkpoint)
    name = args.parser or trained
    if postprocess.needs_graph_cut(name):
        cli.require("maxflow")
    network, refinement = postprocess.PARSERS[name]
    if network != trained:
        raise CheckpointError(
            f"{args.checkpoint} holds the model {trained}; {name} needs one of {network}"
        )
    dataset = args.dataset or state["settings"]["dataset"]

    def faces_of(split):
        labels, view = args.labels or state["settings"]["labels"], state["settings"]["view"]
        options = how_to_open(view, labels)
        faces = cli.open_faces(args, dataset, split, limit=args.limit, **options)
        if not len(faces.images):
            raise DataError(f"{dataset}: no usable face in the {split} split")
        if view != "whole":
            layout = Layout.of(state["layout"])
            faces = make_view(view, faces, labels=labels, layout=layout).still(faces)
        check_fits(state, faces, path=args.checkpoint, scene=refinement == "detect")
        return faces

    faces = faces_of(args.split)
    result = summary_of(name, model, faces, state, dataset, faces_of, args.checkpoint)
    result = {"split": args.split, "faces": len(faces.images), **result}
    say(*([json.dumps(result)] if args.json else as_lines(result)))
    cli.report_skipped(faces)


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
