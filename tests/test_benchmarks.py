"""The benchmarks run, are sane, and time nothing that is wrong. No test looks at a time."""

import dataclasses
import json
import sys
from pathlib import Path

import children
import pytest
import torch

from gatedrnn.reference import DIRECTIONS
from gatedrnn.reference import spatial_gated_rnn as reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_memory  # noqa: E402
import bench_scan  # noqa: E402
import peers  # noqa: E402
import roofline  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402

# Compiling takes longer than all other tests here: its chunks are tested uncompiled, below.
QUICK_PEERS = [name for name in peers.PEERS if name != "torch compiled"]


def load(name, shape, inputs):
    runner = peers.PEERS[name](shape, inputs)
    if isinstance(runner, str):
        pytest.skip(f"{name}: {runner}")
    return runner


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_named_shapes_are_sane(name):
    shape = shapes.by_name(name)
    assert shape.name == name
    assert min(shape.n, shape.c, shape.h, shape.w) >= 1
    assert shape.c % shape.groups == 0
    assert shape.why


def test_default_shapes_exist():
    assert set(shapes.DEFAULT) <= set(shapes.SHAPES)


def test_flops_and_bytes_equal_hand_count():
    full = shapes.by_name("2,3,5,7")
    assert full.flops("forward") == 70 * 4 * (2 * 9 + 2 * 3)
    assert full.flops("backward") == 3 * full.flops("forward")
    assert full.flops("train") == 4 * full.flops("forward")
    assert full.fewest_bytes("forward", 4) == 3 * 4 * 210
    assert full.fewest_bytes("backward", 4) == 5 * 4 * 210 + 210
    diagonal = shapes.by_name("2,3,5,7,3")
    assert diagonal.flops("forward") == 70 * 4 * (2 * 3 + 2 * 3)


@pytest.mark.parametrize("name", ["1,8,8", "1,0,8,8", "1,8,8,8,3", "1,8,8,8,0", "a,b,c,d", "face"])
def test_bad_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"unknown shape|sizes of at least 1"):
        shapes.by_name(name)


def test_given_shapes_are_named_by_their_sizes():
    names = ["2,3,5,7", "2, 6,5,7,2", "2,6,5,7"]
    made = [shapes.by_name(name) for name in names]
    assert [shape.name for shape in made] == ["2,3,5,7", "2,6,5,7,2", "2,6,5,7"]
    rows = [
        {"shape": s.name, "phase": "train", "contender": "gatedrnn", "median": 1e-3, "ratio": 1}
        for s in made
    ]
    assert len(bench_scan.markdown(rows).splitlines()) == 2 + len(names)


def test_unknown_shape_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown shape 'face'; known: .*parser-1.*face-8"):
        shapes.by_name("face")


def test_inputs_repeat_and_keep_the_norms():
    shape = shapes.by_name("2,6,5,7,2")
    first, second = shapes.make_inputs(shape), shapes.make_inputs(shape)
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))
    assert first.g.abs().max() <= 1
    norms = torch.linalg.matrix_norm(first.weight.view(4, 2, 3, 3), 2)
    torch.testing.assert_close(norms, torch.ones(4, 2))


# Square (one loop for four directions), H != W with groups, diagonal weights over more lines than
# fill a block of lanes.
@pytest.mark.parametrize("sizes", ["2,3,6,6", "1,4,5,7,2", "2,6,3,37,6"])
@pytest.mark.parametrize("name", QUICK_PEERS)
def test_peer_equals_reference(name, sizes):
    shape = shapes.by_name(sizes)
    inputs = shapes.make_inputs(shape)
    peers.check(name, load(name, shape, inputs), peers.expected(inputs), torch.float32)


@pytest.mark.parametrize("name", ["torch loop", "torch batched"])
def test_peer_equals_reference_in_double(name):
    shape = shapes.by_name("1,4,5,7")
    inputs = shapes.make_inputs(shape, torch.float64)
    peers.check(name, load(name, shape, inputs), peers.expected(inputs), torch.float64)


@pytest.mark.parametrize("name", ["torch loop", "torch batched"])
def test_peer_carries_16_bit_maps_in_float32(name):
    shape = shapes.by_name("1,4,5,7")
    inputs = shapes.make_inputs(shape, torch.bfloat16)
    y = load(name, shape, inputs).forward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference(*inputs.tensors()))


@pytest.mark.parametrize("name", QUICK_PEERS)
def test_peer_splits_a_tie_of_all_directions_evenly(name):
    # Where the gate is zero every direction gives x: dx is the gradient itself, whole.
    shape = shapes.by_name("2,3,6,6")
    inputs = shapes.make_inputs(shape)
    inputs.g.zero_()
    runner = load(name, shape, inputs)
    dx = runner.to_torch(runner.train()[1][0])
    torch.testing.assert_close(dx, inputs.grad)


def test_compiled_loop_joins_its_parts(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shape = shapes.by_name("1,3,19,19")
    inputs = shapes.make_inputs(shape)
    runner = load("torch compiled", shape, inputs)
    peers.check("torch compiled", runner, peers.expected(inputs), torch.float32)


def test_missing_peer_is_a_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "peers.numba_scan", raising=False)
    shape = shapes.by_name("tiny")
    assert peers.PEERS["numba"](shape, shapes.make_inputs(shape)) == "not installed (numba)"


def test_check_refuses_wrong_values():
    inputs = shapes.make_inputs(shapes.by_name("1,3,5,7"))
    transposed = dataclasses.replace(inputs, weight=inputs.weight.mT.contiguous())
    runner = peers.torch_runner(reference, transposed)
    with pytest.raises(peers.WrongResult, match="a peer, forward: y is off by"):
        peers.check("a peer", runner, peers.expected(inputs), torch.float32)


def test_check_refuses_wrong_gradients():
    inputs = shapes.make_inputs(shapes.by_name("1,3,5,7"))
    runner = peers.torch_runner(reference, inputs)
    runner.backward = peers.torch_runner(
        reference, dataclasses.replace(inputs, weight=inputs.weight.mT.contiguous())
    ).backward
    with pytest.raises(peers.WrongResult, match="a peer, backward: dx is off by"):
        peers.check("a peer", runner, peers.expected(inputs), torch.float32)


def test_measure_takes_contenders_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.measure(calls, rounds=4, min_sample_s=0)
    assert list(times) == ["a", "b"]
    for each in times.values():
        assert each.rounds == 4
        assert each.repeats == 1
        assert 0 < each.best <= each.low <= each.median <= each.high
    # Three warming calls each, then a waking and a timed one, four rounds long.
    assert "".join(order) == "aaabbb" + "aabb" * 4


def test_measure_lets_a_spent_contender_sit_out():
    times = timing.measure({"a": lambda: None}, rounds=9, min_rounds=2, budget_s=1e-9)
    assert times["a"].rounds == 1


@pytest.mark.parametrize("threads", [0, 100_000])
def test_bad_thread_count_is_refused(threads):
    with pytest.raises(ValueError, match=rf"--threads must be 1 to \d+ .*, got {threads}"):
        timing.use_threads(threads)


def test_facts_can_be_written_down():
    facts = json.loads(json.dumps(timing.facts(2)))
    assert facts["threads"] == 2
    assert facts["versions"]["torch"]


def test_roofline_gives_limits_or_a_word():
    limit = roofline.limits(1, seconds=0.02, mebibytes=4)
    assert limit["bytes"] > 0
    assert (limit["flops"] is None) == (limit["note"] is not None)
    assert "threads" in roofline.describe(limit)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "face"], "unknown shape 'face'; known: tiny, parser-1"),
        (["--peers", "cuda"], "choose from"),
        (["--dtype", "int8"], "choose from"),
        (["--sizes", "0"], "--sizes must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be 1 to"),
        (
            ["--against", "nowhere"],
            "--against must name a directory that holds gatedrnn, got nowhere",
        ),
    ],
)
def test_bad_argument_is_one_clear_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_scan.parse(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_raw_op_is_given_the_directions_in_order():
    assert DIRECTIONS == ("left_to_right", "right_to_left", "top_to_bottom", "bottom_to_top")


@pytest.mark.slow
def test_quick_run_writes_valid_json(tmp_path):
    script = str(BENCHMARKS / "bench_scan.py")
    options = ["--quick", "--shapes", "2,4,5,7", "--sizes", "6", "9", "--out", str(tmp_path)]
    options += ["--against", str(BENCHMARKS.parent)]
    done = children.run([sys.executable, script, *options], check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scan.json").read_text())
    names = ["gatedrnn", "gatedrnn channels_last", "torch loop", "torch batched"]
    assert [(each["phase"], each["contender"]) for each in report["scan"]] == [
        (phase, name) for phase in ("forward", "backward", "train") for name in names
    ]
    assert all(each["median"] > 0 for each in report["scan"] + report["sizes"])
    names.append(f"gatedrnn of {BENCHMARKS.parent.name}")
    assert [(each["sizes"][2], each["phase"], each["contender"]) for each in report["sizes"]] == [
        (size, phase, name)
        for size in (9, 6, 9)
        for phase in ("forward", "train")
        for name in names
    ]
    assert report["sizes"][0]["to_batch"] == 1
    assert all(0 < each["limit_ns_per_pixel"] < each["ns_per_pixel"] for each in report["sizes"])
    assert set(report["layer"][0]["times"]) >= {"layer", "clamp", "functional"}
    assert report["machine"]["commit"]
    assert "| 2,4,5,7 | train |" in (tmp_path / "scan.md").read_text()


@pytest.mark.slow
def test_memory_of_a_step_is_counted():
    assert bench_memory.measure("gatedrnn", shapes.by_name("1,8,64,64"), 1) > 0
