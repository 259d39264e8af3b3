"""Train and measure every row of a table of the paper: reproduce.py --table 1 --root DIR.

Writes to --out: a folder for each training, table.json, table.md and table.png (the labels of each
row). Run again, it goes on where it was stopped.
"""

import sys
from pathlib import Path

from faceparse import cli
from faceparse.data import DataError
from faceparse.inference import postprocess
from faceparse.reporting.reproduction import jobs_of, measure, measure_chain, write_table
from faceparse.reporting.tables import TABLES
from faceparse.training import checkpoint
from faceparse.training.jobs import train_all


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, required=True)
    cli.add_data_arguments(parser)
    parser.add_argument("--epochs", type=cli.number(int, 1), help="default: the configs'")
    parser.add_argument("--limit", type=cli.number(int, 1), help="use N images of each split")
    parser.add_argument(
        "--jobs",
        type=cli.number(int, 1, 64),
        default=1,
        help="trainings at a time; default: 1",
    )
    parser.add_argument("--rows", nargs="+", help="some rows only")
    parser.add_argument("--out", type=cli.path, help="default: runs/table-N")
    args = parser.parse_args()
    if args.root is None:
        parser.error("--root DIR is needed: the folder that holds the data sets")
    table = TABLES[args.table]
    rows = args.rows or list(table.rows)
    for row in rows:
        if row not in table.rows:
            parser.error(f"--rows: table {args.table} has {', '.join(table.rows)}; got {row!r}")
    cli.require("matplotlib")
    if any(postprocess.needs_graph_cut(table.rows[row].parser) for row in rows):
        cli.require("maxflow")
    args.out = args.out or Path("runs") / f"table-{args.table}"
    needed = jobs_of(table, args.root, rows)
    for row, networks in needed.items():
        for job in networks.values():
            if not job.root.is_dir():
                raise DataError(
                    f"{table.rows[row].title} needs the folder {job.root}, which is not there"
                )
    given = {name: getattr(args, name) for name in ("epochs", "limit")}
    given = {name: value for name, value in given.items() if value is not None}
    with checkpoint.claimed(args.out):
        every = [job for networks in needed.values() for job in networks.values()]
        train_all(args, every, given)
        measured = (measure_chain if args.table == "3" else measure)(args, table, needed)
        write_table(args, table, *measured, whole=rows == list(table.rows))


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
