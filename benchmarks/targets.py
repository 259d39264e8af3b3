"""What the scan should reach on a GPU, and the tables of what it did. Needs no PyTorch."""

from dataclasses import dataclass
from types import SimpleNamespace

OURS = "gatedrnn"
GRAPH = f"{OURS}, graph"
ONE = "one direction at a time"
LOOP, LOOP_GRAPH = "torch loop", "torch batched, graph"
CLAMP = "clamp 8 x 8"
PLANE = 16 * 8 * 1024 * 1024  # elements
H200_COPY = 4.3e12  # bytes a second; the target for diagonal weights was set there


@dataclass(frozen=True)
class Target:
    """`measure` finds its value among the results, which raise KeyError where there is none."""

    what: str
    bound: float
    at_least: bool
    unit: str
    measure: object

    def row(self, results):
        row = {"what": self.what, "target": self.wanted(), "measured": "-", "met": None}
        try:
            value = self.measure(results)
        except KeyError:
            return row | {"miss": None}
        met = value >= self.bound if self.at_least else value <= self.bound
        miss = self.bound / value if self.at_least else value / self.bound
        return row | {"measured": self.text(value), "met": met, "miss": miss}

    def text(self, value):
        return f"{value:.0%}" if self.unit == "%" else f"{value:.3g} {self.unit}".rstrip()

    def wanted(self):
        return (">= " if self.at_least else "<= ") + self.text(self.bound)


class Results:
    """The rows by what they are of."""

    def __init__(self, rows):
        keys = ("shape", "dtype", "phase", "contender")
        self.rows = {tuple(row[key] for key in keys): row for row in rows}

    def seconds(self, shape, phase, contender=OURS, dtype="float32"):
        return self.rows[shape, dtype, phase, contender]["median"]

    def fastest(self, shape, phase, dtype="float32"):
        """Our row of least time. A graph does not wait for the host; a call may."""
        rows = [self.rows.get((shape, dtype, phase, name)) for name in (OURS, GRAPH)]
        rows = [row for row in rows if row is not None]
        if not rows:
            raise KeyError(shape)
        return min(rows, key=lambda row: row["median"])

    def on_device(self, *key):
        return self.fastest(*key)["median"]

    def share(self, *key):
        return self.fastest(*key)["copy_share"]


def targets(copy):
    """All targets, for a device that copies `copy` bytes a second, read and written."""
    found = []

    def add(what, bound, measure, *, at_least=False, unit=""):
        found.append(Target(what, bound, at_least, unit, measure))

    seven_volumes = 7 * 4 * PLANE / (0.9 * copy)
    for shape, most in (
        ("plane-1024", 0.60 * H200_COPY / copy),
        ("plane-1024-full", seven_volumes * 1e3),
    ):
        add(f"{shape} forward", most, lambda r, s=shape: r.on_device(s, "forward") * 1e3, unit="ms")
        add(
            f"{shape} backward to forward",
            2.5,
            lambda r, s=shape: r.on_device(s, "backward") / r.on_device(s, "forward"),
            unit="x",
        )
    for shape in ("batch-128", "batch-64"):
        for phase, least in (("forward", 0.55), ("backward", 0.45)):
            add(
                f"{shape} {phase}, share of the copy bandwidth",
                least,
                lambda r, s=shape, p=phase: r.share(s, p),
                at_least=True,
                unit="%",
            )
    for shape, most in (("parser-1", 15), ("multi-face", 30), (CLAMP, 20)):
        add(f"{shape} forward", most, lambda r, s=shape: r.on_device(s, "forward") * 1e6, unit="us")
    for shape in ("parser-1", "multi-face"):
        for loop, ours, phase, least in (
            (LOOP, OURS, "forward, with the host", 100),
            (LOOP_GRAPH, GRAPH, "forward", 20),
        ):
            add(
                f"{shape} {phase}: {loop} to {ours}",
                least,
                lambda r, s=shape, p=phase, a=loop, b=ours: r.seconds(s, p, a) / r.seconds(s, p, b),
                at_least=True,
                unit="x",
            )
    for shape in ("batch-128", "batch-64", "plane-1024"):
        add(
            f"{shape} forward, bfloat16 to float32",
            0.65,
            lambda r, s=shape: (
                r.on_device(s, "forward", "bfloat16") / r.on_device(s, "forward", "float32")
            ),
            unit="x",
        )
    return found


# ---- tables ------------------------------------------------------------------------------------


def table(heads, rows):
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def target_rows(rows, copy):
    """The targets and what was measured, as plain values; none without a copy bandwidth."""
    return [target.row(Results(rows)) for target in targets(copy)] if copy else []


def target_table(rows):
    met = {True: "yes", False: "no", None: "-"}
    lines = [(row["what"], row["target"], row["measured"], met[row["met"]]) for row in rows]
    return table(("", "target", "measured", "met"), lines)


def time_table(rows):
    """Microseconds: a line for each shape, dtype and phase, a column a contender."""
    names = list(dict.fromkeys(each["contender"] for each in rows))
    cells = {
        (each["shape"], each["dtype"], each["phase"], each["contender"]): each for each in rows
    }
    lines = []
    for line in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((*line, name)) for name in names]
        texts = ["-" if c is None else f"{c['median'] * 1e6:.4g} ({c['ratio']:.2f})" for c in found]
        lines.append((*line, *texts))
    return table(("shape", "dtype", "phase", *names), lines)


def share_table(rows):
    """Of each shape, dtype and phase: our least time, and the share of the copy bandwidth."""
    results = Results(rows)
    keys = [(r["shape"], r["phase"], r["dtype"]) for r in rows if r["contender"] in (OURS, GRAPH)]
    lines = []
    for key in dict.fromkeys(keys):
        best = SimpleNamespace(**results.fastest(*key))
        share = "-" if best.copy_share is None else f"{best.copy_share:.1%}"
        lines.append((best.shape, best.dtype, best.phase, f"{best.median * 1e6:.4g}", share))
    return table(("shape", "dtype", "phase", "us", "of the copy bandwidth"), lines)
