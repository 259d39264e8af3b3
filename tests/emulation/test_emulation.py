"""The emulation itself: it runs right kernels right, and reports or shows what wrong ones break."""

import platform
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulation_build import HERE, load

SEEDS = range(20)


@pytest.fixture(scope="module", autouse=True)
def toys():
    load("toys", [HERE / "toy_kernels.cu"])


@pytest.fixture
def seeded(monkeypatch):
    """Runs a toy for one seed."""

    def run(seed, name, data, *numbers, finds_races=True):
        monkeypatch.setenv("GATEDRNN_EMULATION_SEED", str(seed))
        monkeypatch.setenv("GATEDRNN_EMULATION_RACES", str(int(finds_races)))
        torch.ops.gatedrnn_toys.run(name, data, list(numbers))
        return data

    return run


def ints(count):
    return torch.arange(count, dtype=torch.int32)


def zeros(count=8):
    return torch.zeros(count, dtype=torch.int32)


def always(outcomes):
    return all(outcomes)


def sometimes_not(outcomes):
    return not all(outcomes)


# ---- what no barrier orders happens in either order ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "expectation"), [("reverse", always), ("reverse_without_barrier", sometimes_not)]
)
def test_block_barrier_orders_shared_memory(seeded, name, expectation):
    expected = ints(5 * 128).view(5, 128).flip(1).flatten()
    runs = (seeded(seed, name, ints(5 * 128), 5, finds_races=False) for seed in SEEDS)
    assert expectation(torch.equal(run, expected) for run in runs)


@pytest.mark.parametrize(
    ("name", "expectation"),
    [("reverse_warp", always), ("reverse_warp_without_barrier", sometimes_not)],
)
def test_warp_barrier_orders_shared_memory(seeded, name, expectation):
    runs = (seeded(seed, name, ints(32), finds_races=False) for seed in SEEDS)
    assert expectation(torch.equal(run, ints(32).flip(0)) for run in runs)


@pytest.mark.parametrize(
    ("name", "expectation"), [("pipeline", always), ("pipeline_without_barrier", sometimes_not)]
)
def test_warps_keep_in_step_by_block_barriers_alone(seeded, name, expectation):
    runs = (seeded(seed, name, zeros(32), finds_races=False) for seed in SEEDS)
    assert expectation((run == 30 * 31 // 2).all() for run in runs)


@pytest.mark.parametrize(
    ("name", "expectation"), [("promise", always), ("promise_without_meeting", sometimes_not)]
)
def test_flag_of_one_lane_promises_what_its_warp_wrote(seeded, name, expectation):
    runs = (seeded(seed, name, zeros(65), 2, finds_races=False) for seed in range(60))
    assert expectation(torch.equal(run[32:64], 32 - ints(32)) for run in runs)


@pytest.mark.parametrize("resident", ["1", "2", "3", "9"])
def test_blocks_wait_for_each_other_in_ticket_order(seeded, monkeypatch, resident):
    monkeypatch.setenv("GATEDRNN_EMULATION_RESIDENT_BLOCKS", resident)
    for seed in SEEDS:
        data = seeded(seed, "ticket", zeros(2 + 7 * 128), 7)
        assert torch.equal(data[2:].view(7, 128), ints(7)[:, None].expand(7, 128))


def test_grid_has_three_dimensions(seeded):
    assert (seeded(0, "grid", zeros(24)) == 7).all()


# ---- and is reported as a race, whatever the order -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("reverse", 5 * 128, 5),
        ("reverse_warp", 32, 1),
        ("pipeline", 32, 1),
        ("promise", 65, 2),
        ("flag", 3, 2),
        ("count", 9, 6),
        ("shift", 128, 1),
        ("neighbours_8", 32, 1),
        ("neighbours_16", 64, 1),
    ],
)
def test_ordered_accesses_are_no_race(seeded, name, size, blocks):
    for seed in SEEDS:
        seeded(seed, name, zeros(size), blocks)


RACE = re.compile(
    r"thread \d+ of block \(\d+, 0, 0\)(?:, last met at toy_kernels.cu:\d+ .*)?: "
    r"races: nothing orders its (.*) at toy_kernels.cu:\d+ after the (.*) at toy_kernels.cu:\d+ "
    r"by thread \d+ of block \(\d+, 0, 0\), of (.*) memory"
)


@pytest.mark.parametrize(
    ("name", "size", "blocks", "memory"),
    [
        ("reverse_without_barrier", 5 * 128, 5, "shared"),
        ("reverse_warp_without_barrier", 32, 1, "shared"),
        ("reverse_warp_by_vote", 32, 1, "shared"),
        ("pipeline_without_barrier", 32, 1, "shared"),
        ("promise_without_meeting", 65, 2, "global"),
        ("flag_by_plain_write", 3, 2, "global"),
        ("count_without_release", 9, 6, "global"),
        ("shift_without_barrier", 128, 1, "global"),
    ],
)
def test_race_is_reported(seeded, name, size, blocks, memory):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=RACE.pattern) as error:
            seeded(seed, name, zeros(size), blocks)
        one, other, where = RACE.search(str(error.value)).groups()
        assert {one, other} == {"atomic read" if name.startswith("flag") else "read", "write"}
        assert where.endswith(memory)


# ---- warps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sum_int", torch.int32),
        ("sum_int64", torch.int64),
        ("sum_float", torch.float32),
        ("sum_double", torch.float64),
    ],
)
def test_warp_sums_by_shuffles(seeded, name, dtype):
    values = torch.arange(32, dtype=dtype)
    if dtype == torch.int64:
        values <<= 40
    for seed in SEEDS:
        assert (seeded(seed, name, values.clone()) == values.sum()).all()


def test_shuffles_and_votes_give_what_cuda_documents(seeded):
    lane = ints(32)
    first, place = lane // 8 * 8, lane % 8
    thirds = sum(1 << i for i in range(0, 32, 3))
    expected = torch.stack(
        [
            torch.where(place >= 3, lane - 3, lane),
            torch.where(place < 5, lane + 3, lane),
            torch.where((lane ^ 12) < first + 8, lane ^ 12, lane),
            first + 3,
            torch.full_like(lane, thirds - 2**32 if thirds >= 2**31 else thirds),
            torch.full_like(lane, 1 + 8),
            lane ^ 15,
            torch.ones_like(lane),
        ]
    )
    for seed in SEEDS:
        assert torch.equal(seeded(seed, "shuffles", zeros(256)).view(8, 32), expected)


# ---- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deadlock", r"every thread waits:\n.*\n  127 of block .* wait for their block at toy_k"),
        ("deadlock", r"1 of block \(0, 0, 0\) poll at toy_kernels.cu:\d+ in .*deadlock_kernel"),
        ("ended", "in __syncthreads"),
        ("two_barriers", "others of its block in that at toy_kernels.cu"),
        ("barrier_in_warp", "__syncthreads, and its warp waits|which waits in __syncthreads"),
        ("ended_lane", "ends while its warp waits for it|waits for lane 3, which has ended"),
        ("outside_mask", "asks for the value of lane 20, which is not in the mask"),
        ("foreign_mask", "is not in the mask that it gives"),
        ("two_masks", "meets its warp with another mask"),
        ("two_meetings", r"at toy_k.*:\d+ < toy_k.*in that at toy_kernels.cu:\d+ < toy_k"),
        ("two_meetings_of_warp", r"another place than lane \d+ at toy_kernels.cu:\d+ < toy_k"),
        ("deep", "its stack is full"),
        ("half_written", r"reads byte 0 of shared memory.*nobody has written, at toy_kernels.cu:"),
        ("wait_by_adding", r"every thread waits:\n  1 of block \(0, 0, 0\) poll at toy_k"),
        ("trap", r"\(0, 0, 0\): is stopped by a trap at toy_kernels.cu:\d+"),
    ],
)
def test_broken_rule_is_reported(seeded, name, message):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=message):
            seeded(seed, name, zeros(128))
    assert torch.equal(seeded(0, "reverse_warp", ints(32)), ints(32).flip(0))  # all is well again


@pytest.mark.parametrize(
    ("threads", "right"), [(0, False), (40, False), (1024, True), (1056, False)]
)
def test_blocks_are_of_whole_warps(seeded, threads, right):
    if right:
        assert seeded(0, "threads", zeros(), threads)[0] == 1
    else:
        with pytest.raises(RuntimeError, match="32 to 1024 threads in x, in whole warps, got"):
            seeded(0, "threads", zeros(), threads or 2**32)


def test_launch_with_too_much_shared_memory_is_refused(seeded, monkeypatch):
    seeded(0, "shared_bytes", zeros(), 49152)
    with pytest.raises(RuntimeError, match="49153 bytes of shared memory, and the kernel may have"):
        seeded(0, "shared_bytes", zeros(), 49153)
    seeded(0, "shared_bytes", zeros(), 49153, 232448)
    with pytest.raises(RuntimeError, match="invalid argument"):
        seeded(0, "shared_bytes", zeros(), 49153, 232449)
    monkeypatch.setenv("GATEDRNN_EMULATION_SHARED_BYTES", "1000")
    with pytest.raises(RuntimeError, match="1001 bytes of shared memory, and the kernel may have"):
        seeded(0, "shared_bytes", zeros(), 1001)


def test_meeting_that_the_compiler_writes_twice_is_one(seeded):
    for seed in SEEDS:
        data = zeros(129)
        data[128] = 5
        sign = 1 - 2 * (ints(128) >= 64)
        assert torch.equal(seeded(seed, "written_twice", data)[:128], 10 * sign)


@pytest.mark.parametrize(
    ("name", "bytes"), [("vector_of_ints", 16), ("float4", 16), ("uint2", 8), ("int64", 8)]
)
def test_wrong_alignment_is_reported(seeded, name, bytes):
    for at in range(1, bytes // 4):
        message = rf"which is no multiple of {bytes}, at (runtime.cuh:\d+ < )?toy_kernels.cu:\d+"
        with pytest.raises(RuntimeError, match=message):
            seeded(0, name, ints(32), at)
    assert torch.equal(seeded(0, name, ints(32), bytes // 4)[16:18], ints(8)[bytes // 4 :][:2])


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        (0, 33, "delta of 33"),
        (0, -1, "delta of 4294967295"),
        (1, 32, "delta of 32"),
        (2, 64, "mask of 64"),
        (3, 3, "width of 3"),
        (3, 0, "width of 0"),
        (3, 64, "width of 64"),
    ],
)
def test_shuffle_by_a_number_that_means_nothing_is_reported(seeded, kind, number, message):
    with pytest.raises(RuntimeError, match=rf"at toy_kernels.cu:\d+: shuffles with a {message}"):
        seeded(0, "shuffle_far", zeros(32), kind, number)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others divide by zero")
def test_division_by_zero_is_reported(seeded):
    with pytest.raises(RuntimeError, match=r"divides by zero at toy_kernels.cu:\d+"):
        seeded(0, "divide", zeros())


# ---- waiting -----------------------------------------------------------------------------------


def test_wait_without_a_switch_is_reported(seeded):
    for finds_races in (False, True):
        with pytest.raises(RuntimeError, match=r"every thread waits:\n  1 of .* poll at toy_k"):
            seeded(0, "wait_by_plain_reads", zeros(), finds_races=finds_races)


def test_threads_that_wait_by_adding_zero_see_what_others_add(seeded):
    for seed in SEEDS:
        assert seeded(seed, "counted", zeros(), 2)[0] == 1


def test_reading_many_flags_is_no_wait(seeded):
    count = 200_000
    assert seeded(0, "read_many_flags", ints(count + 1) % 2, count)[count] == count // 2


def test_flag_in_shared_memory_ends_with_its_block(seeded, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_RESIDENT_BLOCKS", "1")
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=RACE.pattern):
            seeded(seed, "flag_of_ended_block", zeros(), 2)


def test_ended_blocks_leave_nothing_behind(seeded, monkeypatch):
    monkeypatch.setenv("GATEDRNN_EMULATION_RESIDENT_BLOCKS", "2")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seeded(0, "meetings", zeros(128), 3000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KB


def test_several_threads_launch():
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(torch.ops.gatedrnn_toys.run, "reverse", ints(128), [1]) for _ in range(400)
        ]
    assert all(call.result() is None for call in calls)


# ---- memory that is not there ------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 4096, 100_000])
def test_shared_memory_ends_where_it_ends(seeded, size):
    last = size // 4 - 1
    inside = torch.tensor([last, 0, 0], dtype=torch.int32)
    assert seeded(0, "shared_access", inside, size, finds_races=False)[2] == -1
    for index in (last + 1, -5000):
        for writes in (0, 1):
            data = torch.tensor([index, writes, 0], dtype=torch.int32)
            with pytest.raises(RuntimeError, match=f"touches byte {4 * index} of {size} of shared"):
                seeded(0, "shared_access", data, size)


def test_write_between_shared_memory_and_its_guards_is_reported(seeded):
    for index, where in ((15, "past the end"), (-1, "before the start")):
        data = torch.tensor([index, 1, 0], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"wrote {where} of its 60 bytes of shared memory"):
            seeded(0, "shared_access", data, 60, finds_races=False)


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("index", [15, -1, -5])
def test_access_between_shared_memory_and_its_guards_has_a_place(seeded, index, writes):
    data = torch.tensor([index, writes, 0], dtype=torch.int32)
    message = rf"touches byte {4 * index} of 60 of shared memory at toy_kernels.cu:\d+"
    with pytest.raises(RuntimeError, match=message):
        seeded(0, "shared_access", data, 60)


def test_reading_shared_memory_that_nobody_wrote_is_reported(seeded):
    assert seeded(0, "unwritten", zeros(32), 16).sum() == 16
    assert seeded(0, "unwritten_pack", zeros())[0] == 1
    assert seeded(0, "unset", zeros())[0] == -1
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=r"reads byte 64 of shared memory.* nobody has writ"):
            seeded(seed, "unwritten", zeros(32), 17)


def test_pointer_to_nowhere_is_reported(seeded):
    with pytest.raises(RuntimeError, match="touches memory that is not there"):
        seeded(0, "device_access", zeros(), 2**40)


# ---- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions_round_as_pytorch_does(seeded, name, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator)
    finite = every[every.isfinite()].sort().values.double()
    halfway = ((finite[1:] + finite[:-1]) / 2).float()
    values = torch.cat(
        [
            every,
            patterns.to(torch.int32).view(torch.float32),
            halfway,
            halfway.nextafter(torch.tensor(float("inf"))),
            halfway.nextafter(torch.tensor(-float("inf"))),
            torch.tensor([65519.99, 65520.0, -65520.0, 3.4028e38, 1e-45, -0.0]),
        ]
    )
    expected = values.to(dtype).float()
    actual = seeded(0, name, values.clone())
    numbers = ~expected.isnan()
    assert torch.equal(actual.isnan(), ~numbers)
    same = actual.view(torch.int32) == expected.view(torch.int32)  # -0.0 is not 0.0
    assert same[numbers].all()
