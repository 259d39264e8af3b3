"""The GPU benchmark as far as it goes without a GPU: a dry run on the CPU, and its targets."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cuda  # noqa: E402
import peers  # noqa: E402
import shapes  # noqa: E402
import targets  # noqa: E402


def test_dry_run_writes_times_and_targets(tmp_path, capsys):
    assert bench_cuda.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "cuda.json").read_text())
    rows = report["rows"]
    assert {each["phase"] for each in rows} == {"forward", "backward", "train"}
    assert {each["dtype"] for each in rows} == {"float32", "bfloat16"}
    for dtype, names in (("float32", 4), ("bfloat16", 2)):  # not the compiled one
        assert len({each["contender"] for each in rows if each["dtype"] == dtype}) == names
    assert all(each["median"] > 0 for each in rows)
    known = {each["what"] for each in report["targets"] if each["met"] is not None}
    assert known == {"clamp 8 x 8 forward"}
    assert "| tiny | float32 | forward |" in (tmp_path / "cuda.md").read_text()
    assert report["machine"]["commit"] in capsys.readouterr().out


def test_named_shapes_of_the_run_exist():
    assert set(bench_cuda.parse(["--device", "cpu"]).shapes) == set(
        map(shapes.by_name, shapes.CUDA)
    )


def test_targets_are_found_among_the_results_of_a_whole_run():
    rows = [
        {
            "shape": shape,
            "dtype": dtype,
            "phase": phase,
            "contender": name,
            "median": 2e-5 if dtype == "float32" else 1e-5,
            "copy_share": 0.5,
        }
        for shape in (*shapes.CUDA, targets.CLAMP)
        for dtype in ("float32", "bfloat16")
        for phase in ("forward", "backward", "forward, with the host")
        for name in (targets.OURS, targets.GRAPH, targets.ONE, targets.LOOP, targets.LOOP_GRAPH)
    ]
    found = {row["what"]: row for row in targets.target_rows(rows, 4.3e12)}
    assert None not in {row["met"] for row in found.values()}
    assert found["plane-1024 forward"]["measured"] == "0.02 ms"
    assert found["plane-1024 forward"]["met"]
    assert not found["parser-1 forward"]["met"]  # 20 us where 15 are wanted
    assert not found["batch-64 forward, share of the copy bandwidth"]["met"]  # 50 % of 55 %
    assert found["batch-64 backward, share of the copy bandwidth"]["met"]
    assert found["batch-64 forward, bfloat16 to float32"]["measured"] == "0.5 x"
    table = targets.target_table(found.values())
    assert "| parser-1 forward | <= 15 us | 20 us | no |" in table


def test_call_that_waits_for_the_host_is_not_taken_for_the_device():
    row = {"shape": "batch-64", "dtype": "float32", "phase": "backward"}
    rows = [
        row | {"contender": targets.OURS, "median": 9e-4, "copy_share": 0.2},
        row | {"contender": targets.GRAPH, "median": 3e-4, "copy_share": 0.6},
    ]
    found = {row["what"]: row["measured"] for row in targets.target_rows(rows, 4.3e12)}
    assert found["batch-64 backward, share of the copy bandwidth"] == "60%"


def test_targets_of_large_planes_scale_with_the_copy_bandwidth():
    wanted = [{t.what: t.wanted() for t in targets.targets(copy)} for copy in (4.3e12, 3e12)]
    assert [w["plane-1024 forward"] for w in wanted] == ["<= 0.6 ms", "<= 0.86 ms"]
    assert [w["plane-1024-full forward"] for w in wanted] == ["<= 0.971 ms", "<= 1.39 ms"]


def test_way_that_cannot_serve_is_left_out_and_a_wrong_one_ends_the_run(monkeypatch):
    shape, scan = shapes.by_name("tiny"), bench_cuda.spatial_gated_rnn

    def emulated(*tensors):
        way = os.environ.get("GATEDRNN_FORWARD", "")
        if way == "chunks":
            raise RuntimeError("GATEDRNN_FORWARD is chunks, which cannot serve this scan: unset it")
        return scan(*tensors) * factors.get(way, 1)

    monkeypatch.setattr(bench_cuda, "spatial_gated_rnn", emulated)
    factors = {}
    pace = {"budget_s": 0.01, "rounds": 1}
    rows = bench_cuda.bench_ways(shape, torch.float32, False, 1e9, pace, None)
    assert [row["contender"] for row in rows] == ["chosen", "wavefront", "strips"]
    assert "GATEDRNN_FORWARD" not in os.environ
    factors = {"strips": 1.5}
    with pytest.raises(peers.WrongResult, match="strips, forward: y is off by"):
        bench_cuda.bench_ways(shape, torch.float32, False, 1e9, pace, None)


@pytest.mark.parametrize("limit", [0, 2**9, 2**30])
def test_truth_by_loops_is_that_of_the_reference(limit, monkeypatch):
    # Whole or image by image, as for maps that are too large for the reference.
    shape = shapes.by_name("3,4,5,6")
    inputs = shapes.make_inputs(shape)
    expected = bench_cuda.truth(shape, inputs)
    monkeypatch.setattr(bench_cuda, "MOST_FOR_TRUTH", 0)
    monkeypatch.setattr(bench_cuda, "MOST_FOR_PEERS", limit)
    for ours, theirs in zip(bench_cuda.truth(shape, inputs), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_wrong_result_of_ours_ends_the_run(monkeypatch, capsys):
    scan = bench_cuda.spatial_gated_rnn
    monkeypatch.setattr(bench_cuda, "spatial_gated_rnn", lambda *t: scan(*t) * 1.5)
    assert bench_cuda.main(["--device", "cpu", "--quick"]) == 1
    assert "nothing is timed while a result is wrong" in capsys.readouterr().err


def test_peer_that_fails_is_named_and_left_out(monkeypatch, capsys):
    def fails(*tensors):
        raise ValueError("not here")

    monkeypatch.setattr(peers.torch_loop, "per_direction", fails)
    arguments = ["--device", "cpu", "--quick", "--peers", targets.LOOP, "--dtypes", "float32"]
    assert bench_cuda.main(arguments) == 0
    assert "torch loop: left out, ValueError: not here" in capsys.readouterr().out


def test_run_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_cuda.main([])
    assert "PyTorch sees no GPU" in capsys.readouterr().err
