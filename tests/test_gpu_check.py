"""The GPU check without a GPU: its dry run, and what it makes of children that fail."""

import json
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE / "gpu"), str(HERE.parent / "benchmarks")]

import case_runs  # noqa: E402
import check_report  # noqa: E402
import gpu_check  # noqa: E402

FAKE = f"""
import os, sys, time
sys.path[:0] = [{str(HERE / "gpu")!r}, {str(HERE)!r}]
from case_runs import serve

def wrong():
    assert 1 == 2, "y should be 2"

def refused():
    raise ValueError("no such shape")

cases = dict(
    good=lambda: 7,
    wrong=wrong,
    refused=refused,
    crashed=os.abort,
    left=lambda: os._exit(3),
    hung=lambda: time.sleep(100),
)
serve(cases, sys.argv[1:])
"""


def reports(command, names, limit=60, seconds=250, start=60):
    found = {}

    def report(name, status, result, detail):
        assert name not in found
        found[name] = status, result, detail

    case_runs.run_cases(command, names, limit, time.monotonic() + seconds, report, start=start)
    return found


def fake(*names, **limits):
    return reports([sys.executable, "-c", FAKE], names, **limits)


def test_cases_that_fail_are_named_and_the_rest_go_on():
    names = ("wrong", "good", "crashed", "refused", "left")
    found = fake(*names)
    assert list(found) == list(names)
    assert found["good"] == (case_runs.OK, 7, "")
    assert found["wrong"][0] == case_runs.WRONG
    assert "y should be 2" in found["wrong"][2]
    assert found["crashed"][0] == case_runs.CRASHED
    assert "SIGABRT" in found["crashed"][2]
    assert found["refused"][::2] == (case_runs.CRASHED, "ValueError: no such shape")
    assert found["left"][::2] == (case_runs.CRASHED, "exit code 3")


def test_case_that_hangs_is_ended_and_the_rest_go_on():
    found = fake("hung", "good", limit=0.5)
    assert found["hung"][::2] == (case_runs.HUNG, "more than 0.5 s")
    assert found["good"][0] == case_runs.OK


def test_cases_without_time_are_cut_off():
    found = fake("hung", "good", seconds=0.5)
    assert {status for status, *_ in found.values()} == {case_runs.CUT}


def test_child_that_cannot_start_is_reported_for_every_case():
    command = [sys.executable, "-c", "raise SystemExit('no PyTorch')"]
    found = reports(command, ["a", "b"])
    assert found["a"] == found["b"] == (case_runs.CRASHED, None, "exit code 1; no PyTorch")


def test_child_that_begins_nothing_is_ended():
    found = reports(["sh", "-c", "sleep 100"], ["a"], start=0.2)
    assert found["a"] == (case_runs.HUNG, None, "nothing begun after 0.2 s")


def test_what_a_child_has_started_ends_with_it(tmp_path):
    child = case_runs.Child(["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/pid; wait"])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    child.end()
    assert children.has_ended(int((tmp_path / "pid").read_text()))


# ---- the steps ---------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check on a GPU, of which nothing has run."""
    monkeypatch.setattr(gpu_check.timing, "gpu_state", lambda: {"clocks.sm": "1980 MHz"})
    return gpu_check.Check(gpu_check.parse(["--out", str(tmp_path)]))


def report_of(check):
    assert not list(check.args.out.glob("*.part"))
    return json.loads((check.args.out / "gpu_check.json").read_text())


@pytest.mark.parametrize(
    ("command", "budget", "status", "detail"),
    [
        ("exit 0", 60, "ok", ""),
        ("echo nvcc fatal; exit 2", 60, "crashed", "nvcc fatal"),
        ("echo compiling; sleep 100", 0.5, "hung", "not done after 0.5 s: compiling"),
    ],
)
def test_build_that_fails_ends_the_check(command, budget, status, detail, check, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILD", ["sh", "-c", command])
    monkeypatch.setitem(gpu_check.BUDGETS, "build", budget)
    assert check.step("build", gpu_check.build) == (status == "ok")
    step = report_of(check)["steps"]["build"]
    assert (step["status"], step["detail"]) == (status, detail)


def test_faults_of_the_small_cases_are_in_the_report(check, monkeypatch):
    code = f"import sys; del sys.argv[1:3]{FAKE}"
    monkeypatch.setattr(gpu_check, "CASES", [sys.executable, "-c", code])
    monkeypatch.setattr(gpu_check, "SIDE_BY_SIDE", 1)
    check.smoke_names = ["good", "wrong", "crashed"]
    assert check.step("smoke", gpu_check.smoke)
    report = report_of(check)
    assert report["steps"]["smoke"]["status"] == "wrong"
    assert [case["status"] for case in report["cases"]] == ["ok", "wrong", "crashed"]
    text = (check.args.out / "gpu_check.md").read_text()
    assert "- smoke, wrong: wrong: AssertionError: y should be 2" in text
    assert "| smoke | wrong |" in text
    assert "1 ok, 1 wrong, 1 crashed" in text


def test_step_that_raises_is_a_fault_and_the_next_ones_run(check):
    def performance(check, until):
        raise ZeroDivisionError("no bandwidth")

    assert check.step("performance", performance)
    assert check_report.faults(report_of(check)) == [
        "performance: crashed: ZeroDivisionError: no bandwidth"
    ]


def rows_of(shape, phase, median, **more):
    row = {"shape": shape, "dtype": "float32", "phase": phase, "median": median, "ratio": 1.0}
    return [row | {"contender": "gatedrnn", "copy_share": 0.5} | more]


def test_targets_shares_and_ways_are_in_the_tables(check, monkeypatch):
    rows = rows_of("parser-1", "forward", 20e-6)
    rows += rows_of("parser-1", "forward", 14e-6, contender="gatedrnn, graph", copy_share=0.1)
    check.report["copy"] = 3.0e12
    check.report["performance"]["rows"] = rows
    check.report["ways"]["rows"] = rows_of("face-8", "forward", 5e-5, contender="strips")
    check.save()
    text = (check.args.out / "gpu_check.md").read_text()
    assert "Copy: 3000 GB/s" in text
    assert "| parser-1 forward | <= 15 us | 14 us | yes |" in text  # the graph's time
    assert "| plane-1024 forward | <= 0.86 ms | - | - |" in text  # 0.60 ms at 4.3 TB/s
    assert "| plane-1024-full forward | <= 1.39 ms | - | - |" in text  # 7 volumes at 90 %
    assert "| parser-1 | float32 | forward | 14 | 10.0% |" in text
    assert "| face-8 | float32 | forward | 50 (1.00) |" in text


def test_shapes_that_miss_their_targets_by_most_are_profiled(check):
    report = check.report
    report["copy"] = 4.3e12
    for shape, times in (("parser-1", 3e-5), ("multi-face", 3.3e-5), ("plane-1024", 5e-3)):
        report["performance"]["rows"] += rows_of(shape, "forward", times)
    check.save()
    assert gpu_check.worst_shapes(report) == ["plane-1024", "parser-1"]


def test_named_shapes_of_the_check_exist():
    import shapes

    assert set(gpu_check.SHAPES) == set(shapes.CUDA)
    assert len(set(map(shapes.by_name, gpu_check.WAYS))) == len(gpu_check.WAYS)


FAKE_PYTEST = """
case "$0" in
good) echo "t.py::test_a[x y] PASSED [ 50%]"; echo "t.py::test_b SKIPPED (no) [ 100%]";;
wrong) echo "t.py::test_a FAILED [ 50%]"; echo "t.py::test_b PASSED"; exit 1;;
hung) echo "t.py::test_a PASSED"; printf "t.py::test_b "; sleep 100;;
crashed) echo "t.py::test_a PASSED"; echo "t.py::test_b Fatal Python error: Aborted"; kill -6 $$;;
esac
"""


def test_tests_that_fail_hang_or_crash_are_named(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "PYTEST", ["sh", "-c", FAKE_PYTEST])
    monkeypatch.setattr(gpu_check, "SANITIZER", ["echo", "compute-sanitizer: NOT RUN"])
    monkeypatch.setattr(gpu_check, "SILENCE", 3)
    monkeypatch.setattr(gpu_check, "SIDE_BY_SIDE", 1)
    check.args.tests = ["good", "wrong", "hung", "crashed"]
    check.step("suite", gpu_check.suite)
    found = {case["name"]: (case["status"], case["detail"]) for case in report_of(check)["cases"]}
    assert found["good"] == ("ok", "1 passed, 1 skipped")
    assert found["wrong"] == ("wrong", "1 failed, 1 passed; t.py::test_a")
    assert found["hung"][0] == "hung"
    assert "at t.py::test_b" in found["hung"][1]
    assert found["crashed"][0] == "crashed"
    assert "at t.py::test_b Fatal Python error" in found["crashed"][1]
    assert found["compute-sanitizer"] == ("ok", "compute-sanitizer: NOT RUN")


def test_tests_without_time_are_cut_off_and_no_fault(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "PYTEST", ["sh", "-c", 'echo "t.py::a PASSED"; sleep 100'])
    check.args.tests, check.end = ["one", "two"], time.monotonic() + 1
    check.step("suite", gpu_check.suite)
    report = report_of(check)
    assert {case["status"] for case in report["cases"]} == {case_runs.CUT}
    assert check_report.faults(report) == []


def test_findings_of_the_sanitizer_are_a_fault(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "SANITIZER", ["sh", "-c", "echo memcheck: FAILED; exit 1"])
    check.step("suite", gpu_check.suite)
    assert check_report.faults(report_of(check)) == [
        "suite, compute-sanitizer: wrong: memcheck: FAILED"
    ]


@pytest.mark.slow
def test_dry_run_goes_through_every_step(tmp_path):
    tests = [str(HERE / "test_growth.py")]
    command = [sys.executable, gpu_check.HERE / "gpu_check.py", "--device", "cpu", "--quick"]
    command += ["--profile", "--seconds", "600", "--out", tmp_path, "--tests", *tests]
    children.run(command, cwd=HERE, timeout=600, check=True)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: step["status"] for name, step in report["steps"].items()} == {
        "build": "not run",
        **dict.fromkeys(("facts", "smoke", "performance", "ways", "profile", "suite"), "ok"),
    }
    assert report["copy"] > 0
    assert {row["phase"] for row in report["performance"]["rows"]} == {"forward", "backward"}
    assert {row["contender"] for row in report["ways"]["rows"]} >= {"chosen", "wavefront"}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "## Share of the copy bandwidth" in text
    assert "## Profile of tiny float32" in text


def test_interrupted_check_ends_its_children_and_leaves_a_report(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(HERE / "gpu")!r}]
import gpu_check
gpu_check.BUILD = ["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 100"]
sys.exit(gpu_check.command(["--out", {str(tmp_path)!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        run.terminate()
        assert "interrupted" in run.communicate(timeout=60)[0]
    assert run.returncode == 1
    assert children.has_ended(int((tmp_path / "pid").read_text()))
    assert json.loads((tmp_path / "gpu_check.json").read_text())["steps"]["build"]["status"]


def test_small_cases_name_every_way_and_dtype():
    import small_grid

    names = list(small_grid.CASES)
    assert len(names) == 7 * 4 + 5 * 3 + 3 + 4
    assert {"strips, block 16, bfloat16", "chunks, block 1, float16"} <= set(names)
