"""The report of gpu_check.py: JSON, and its tables in Markdown, written whole after every step."""

import json
import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / "benchmarks")]

import targets
from case_runs import CUT, FAULTS, OK
from timing import write_atomically


def save(report, folder):
    """Writes gpu_check.json and gpu_check.md."""
    report["targets"] = targets.target_rows(report["performance"]["rows"], report["copy"])
    write_atomically(folder / "gpu_check.json", json.dumps(report, indent=1) + "\n")
    write_atomically(folder / "gpu_check.md", markdown(report))


def faults(report):
    """A line for each thing that is wrong."""
    found = [(f"{e['step']}, {e['name']}: {e['status']}", e) for e in report["cases"]]
    told = {case["step"] for case in report["cases"] if case["status"] in FAULTS}
    steps = report["steps"].items()
    found += [(f"{name}: {step['status']}", step) for name, step in steps if name not in told]
    return [
        f"{what}{': ' if each['detail'] else ''}{each['detail']}"
        for what, each in found
        if each["status"] in FAULTS
    ]


def counts(cases):
    """Such as "45 ok, 1 hung"."""
    statuses = [case["status"] for case in cases]
    order = dict.fromkeys((OK, *FAULTS, CUT))
    return ", ".join(f"{statuses.count(s)} {s}" for s in order if s in statuses) or "none"


def markdown(report):
    parts = ["# GPU check\n"]
    named = {**report["facts"].get("gpu", {}), **report["facts"].get("machine", {})}
    named |= {"commit": report["commit"] or named.get("commit"), "sources": report["sources"]}
    named |= {f"clocks {when}": state for when, state in report["clocks"].items()}
    parts.append(targets.table(("", ""), [(k, _plain(v)) for k, v in named.items()]))

    lines = []
    for name, step in report["steps"].items():
        cases = [case for case in report["cases"] if case["step"] == name]
        done = counts(cases) if cases else step["detail"]
        lines.append((name, step["status"], f"{step['seconds']:.0f} s", _cell(done)))
    parts += ["## Steps\n", targets.table(("step", "status", "time", ""), lines)]

    wrong = faults(report)
    parts.append("## Faults\n")
    parts.append("\n".join(f"- {_cell(line)}" for line in wrong) + "\n" if wrong else "None.\n")

    rows = report["performance"]["rows"]
    if report["copy"]:
        parts += ["## Targets\n", f"Copy: {report['copy'] / 1e9:.0f} GB/s, read and written.\n"]
        parts.append(targets.target_table(report["targets"]))
    if rows:
        parts += ["## Share of the copy bandwidth\n", targets.share_table(rows)]
        parts += ["## Microseconds (ratio to ours)\n", targets.time_table(rows)]
        parts += [f"- {_cell(line)}" for line in report["performance"]["left_out"]]
    if report["ways"]["rows"]:
        parts.append("## Each way forward, in microseconds (ratio to the chosen one)\n")
        parts.append(targets.time_table(report["ways"]["rows"]))
    suite = [case for case in report["cases"] if case["step"] == "suite"]
    if suite:
        lines = [(c["name"], c["status"], _cell(c["detail"])) for c in suite]
        parts += ["## Tests\n", targets.table(("file", "status", ""), lines)]
    for name, table in report["profile"].items():
        parts += [f"## Profile of {name}\n", f"```\n{table}\n```\n"]
    return "\n".join(parts)


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return _cell(str(value))


def _cell(text):
    """On one line, without what would end a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
