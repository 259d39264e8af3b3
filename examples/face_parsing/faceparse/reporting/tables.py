"""What reproduce.py makes: the three tables of the paper, and what these print."""

import types
from typing import NamedTuple

from faceparse.data import FINE
from faceparse.inference.face_parser import networks_of

FIRST_STAGE = ("skin", "hair", "background", "accuracy")
TABLE_3 = (
    "eyes",
    "brows",
    "nose",
    "in_mouth",
    "upper_lip",
    "lower_lip",
    "mouth",
    "skin",
    "overall",
)


class Row(NamedTuple):
    """One parser, trained in one way."""

    title: str
    parser: str | None  # as in postprocess.PARSERS; None: the chain of face_parser.py
    # A file below configs/, without its ending, or of the chain one for each of its networks. Rows
    # that share a file share a training.
    config: str | dict[str, str]
    dataset: str | None = None  # what it is trained on; None: the table's
    printed: tuple[float, ...] | None = None  # the measures in percent, as the paper has them


class Table(NamedTuple):
    title: str
    dataset: str  # what its rows are measured on
    measures: tuple[str, ...]
    rows: dict[str, Row]
    remark: str
    others: types.MappingProxyType = types.MappingProxyType(
        {}
    )  # what the paper prints of others' work


TABLES = {
    "1": Table(
        title="Table 1, one face",
        dataset="lfw-pl",
        measures=FIRST_STAGE,
        rows={
            "mo": Row("MO", "mo", "table-1/mo", None, (93.93, 80.70, 97.10, 95.09)),
            "cnn-s": Row("CNN-S", "cnn-s", "table-1/cnn-s", None, (90.47, 76.09, 95.42, 92.44)),
            "cnn-deep": Row(
                "CNN-deep", "cnn-deep", "table-1/cnn-deep", None, (91.63, 78.30, 95.95, 93.27)
            ),
            "cnn-crf": Row(
                "CNN-CRF", "cnn-crf", "table-1/cnn-s", None, (91.25, 75.21, 99.58, 92.59)
            ),
            "rnn": Row("RNN", "rnn", "table-1/rnn", None, (93.72, 81.21, 97.15, 94.85)),
            "rnn-g": Row("RNN-G", "rnn-g", "table-1/rnn-g", None, (97.55, 83.43, 94.37, 95.46)),
            "rnn-g+small": Row("RNN-G+ small", "rnn-g+small", "table-1/rnn-g+small"),
            "rnn-g+": Row("RNN-G+", "rnn-g+", "table-1/rnn-g+"),
            "unet": Row("U-Net", "unet", "table-1/unet"),
        },
        remark="The paper's F of skin and of background of RNN-G look swapped, and CNN-CRF's "
        "99.58 looks like a misprint; as printed.",
    ),
    "2": Table(
        title="Table 2, many faces",
        dataset="multi-face",
        measures=FIRST_STAGE,
        rows={
            "cnn-deep": Row(
                "CNN-deep", "cnn-deep", "table-2/cnn-deep", None, (75.56, 64.62, 96.5, 93.39)
            ),
            "cnn-crf": Row(
                "CNN-CRF", "cnn-crf", "table-2/cnn-s", None, (77.84, 61.53, 97.08, 94.5)
            ),
            "rnn": Row("RNN", "rnn", "table-2/rnn", None, (73.33, 62.85, 96.18, 92.78)),
            "det+rnn-g": Row(
                "Det+RNN-G single",
                "det+rnn-g",
                "table-1/rnn-g",
                "lfw-pl",
                (81.02, 55.35, 97.10, 94.42),
            ),
            "rnn-g": Row("RNN-G", "rnn-g", "table-2/rnn-g", None, (87.36, 73.09, 98.19, 96.35)),
        },
        remark="The paper's Multi-Face set was never released.",
    ),
    "3": Table(
        title="Table 3, eleven classes",
        dataset="helen",
        measures=TABLE_3,
        rows={
            "one-stage": Row(
                "1-stage",
                None,
                {"points": "table-3/points", "face": "table-3/one-stage"},
                None,
                (63.3, 53.7, 87.5, 65.7, 54.0, 72.6, 80.6, 91.1, 78.8),
            ),
            "two-stage": Row(
                "2-stage",
                None,
                {name: f"table-3/{name}" for name in networks_of(FINE)},
                None,
                (86.8, 77.0, 93.0, 79.2, 74.3, 81.7, 89.1, 92.1, 88.6),
            ),
        },
        remark="F of both eyes, and of both brows, as one class; overall adds up eyes, brows, "
        "nose, inner mouth and the two lips. Key points as found in the photographs.",
        others={
            "Liu et al. [15]": (77.0, 64.0, 84.3, 60.1, 65.0, 61.8, 74.2, 88.6, 73.8),
            "Smith et al. [24]": (78.5, 72.2, 92.2, 71.3, 65.1, 70.0, 85.7, 88.2, 80.4),
            "Liu et al. [16]": (76.8, 71.3, 90.9, 80.8, 62.3, 69.4, 84.1, 91.0, 84.7),
        },
    ),
}
