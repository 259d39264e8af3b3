"""What reproduce.py makes: tables 1 and 2 of the paper, and what these print."""

from typing import NamedTuple

MEASURES = ("skin", "hair", "background", "accuracy")


class Row(NamedTuple):
    """One parser, trained in one way."""

    title: str
    parser: str  # as in parsers.PARSERS
    config: str  # a file below configs/, without its ending; rows that share it share a training
    dataset: str | None = None  # what it is trained on; None: the table's
    printed: tuple[float, ...] | None = None  # MEASURES in percent, as the paper has them


class Table(NamedTuple):
    title: str
    dataset: str  # what its rows are measured on
    rows: dict[str, Row]
    remark: str


TABLES = {
    "1": Table(
        title="Table 1, one face",
        dataset="lfw-pl",
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
}
