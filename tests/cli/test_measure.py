"""The measuring code itself: statistics, limits, records, files, and checks that must see what is wrong."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

import heedful
from heedful.measure import files, machine, memory, timing
from heedful.measure.checks import Check, all_passed
from heedful.measure.numerics import check_backward, check_forward, select


def test_comparison_is_the_median_of_the_rounds_own_ratios():
    comparison = timing.compare_samples([2.0, 3.0, 10.0], [1.0, 1.0, 1.0])
    assert comparison.ratio == 3.0
    assert (comparison.ratio_low, comparison.ratio_high) == (2.5, 6.5)
    assert (comparison.baseline_seconds, comparison.candidate_seconds, comparison.rounds) == (3.0, 1.0, 3)


@pytest.mark.parametrize("samples", [([], []), ([1.0], [1.0, 2.0])])
def test_comparison_refuses_samples_without_partners(samples):
    with pytest.raises(ValueError, match="same number"):
        timing.compare_samples(*samples)


def test_sides_take_turns_and_the_first_changes():
    calls: list[str] = []
    slow = iter([0.0, 0.01] * 1000)

    def side(name):
        def call():
            calls.append(name)
            torch.zeros(1 + int(next(slow))).sum()
            deadline = timing.time.perf_counter() + 3e-3
            while timing.time.perf_counter() < deadline:
                pass

        return call

    comparison = timing.interleave(side("a"), side("b"), seconds=0.0, min_rounds=4)
    assert comparison.rounds == 4
    assert "".join(calls[-8:]) == "abbaabba"


def test_rotation_takes_every_input_in_turn():
    seen = []
    call = timing.rotation(seen.append, [(1,), (2,), (3,)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_pinning_limits_every_thread_and_restores():
    before, threads = machine.affinity(), torch.get_num_threads()
    with timing.pinned_threads(1) as chosen:
        assert torch.get_num_threads() == 1
        assert chosen is None or (len(chosen) == 1 and machine.affinity() == chosen)
    assert (machine.affinity(), torch.get_num_threads()) == (before, threads)


def test_pinning_refuses_more_threads_than_there_are():
    with (
        pytest.raises(ValueError, match=r"threads must be between 1 and .* got 100000"),
        timing.pinned_threads(100_000),
    ):
        pass


def test_nan_passes_no_check_and_an_empty_list_is_red():
    assert not Check("x", math.nan, 1.0, "").passed
    assert not Check("x", math.nan, 1.0, "", at_least=True).passed
    assert not all_passed([])
    assert json.dumps(Check("x", math.nan, 1.0, "").to_json(), allow_nan=False)


def test_openmp_runtimes_are_found_once_each():
    maps = [
        "7f00-7f01 r-xp 00000000 08:01 11 /site/torch/lib/libgomp.so.1",
        "7f01-7f02 r--p 00000000 08:01 11 /site/torch/lib/libgomp.so.1",
        "7f02-7f03 r-xp 00000000 08:01 12 /opt/intel/libiomp5.so",
        "7f03-7f04 r-xp 00000000 08:01 13 /usr/lib/libc.so.6",
        "7f04-7f05 rw-p 00000000 00:00 0",
    ]
    assert machine.find_openmp_runtimes(maps) == ["/opt/intel/libiomp5.so", "/site/torch/lib/libgomp.so.1"]


@pytest.mark.parametrize(("text", "cpus"), [("0-2,5", [0, 1, 2, 5]), ("3", [3]), ("", [])])
def test_cpu_lists(text, cpus):
    assert machine.expand_cpu_list(text) == cpus


def test_quota_is_the_tightest_on_the_way_up(tmp_path):
    group = tmp_path / "root" / "outer" / "inner"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    assert machine.cgroup_quota(str(tmp_path / "root"), str(membership)) == 1.5


def test_quota_of_the_older_hierarchy(tmp_path):
    group = tmp_path / "cpu,cpuacct" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("200000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    assert machine.cgroup_quota(str(tmp_path), str(membership)) == 2.0
    assert machine.cgroup_quota(str(tmp_path), str(tmp_path / "absent")) is None


def test_environment_is_json_with_the_versions():
    record = json.loads(json.dumps(machine.environment()))
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["heedful"] == heedful.__version__
    assert record["threads"]["torch_threads"] == torch.get_num_threads()


def test_peak_memory_sees_what_was_freed():
    memory.reset_peak()
    before = memory.peak_bytes()
    torch.ones(32 << 20)
    assert memory.peak_bytes() - before > 64 << 20


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    files.write_json(target, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(target, {"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(target, {"a": math.nan})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_is_replaced_between_its_markers_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("top\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbottom\n")
    files.replace_block(page, "bench", "new")
    files.replace_block(page, "bench", "newer")
    assert page.read_text() == "top\n<!-- bench:begin -->\nnewer\n<!-- bench:end -->\nbottom\n"


@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --><!-- bench:begin -->"])
def test_a_file_without_the_markers_is_refused_and_kept(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="bench:begin"):
        files.replace_block(page, "bench", "new")
    assert page.read_text() == text


def tensors(dtype, gradients=False, heads=4, kv_heads=2, length=70):
    torch.manual_seed(0)
    shapes = [(2, heads, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 16)]
    return [torch.randn(shape).to(dtype).requires_grad_(gradients) for shape in shapes]


def sdpa(q, k, v, pattern):
    mask = None if pattern is None else pattern.dense(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


PATTERNS = [None, heedful.Causal(), heedful.SlidingWindow(9, 3)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_right_outputs_are_green(dtype, pattern):
    q, k, v = tensors(dtype)
    out = sdpa(q, k, v, pattern)
    assert all_passed(check_forward("sdpa", q, k, v, out, pattern=pattern, sdpa_out=out))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_gradients_are_green_and_wrong_ones_red(dtype, pattern):
    q, k, v = tensors(dtype, gradients=True)
    grad_out = torch.randn_like(q)
    gradients = torch.autograd.grad(sdpa(q, k, v, pattern), (q, k, v), grad_out)
    q, k, v = q.detach(), k.detach(), v.detach()
    assert all_passed(check_backward("sdpa", q, k, v, grad_out, gradients, pattern=pattern, kv_head=(1, 1)))
    for wrong in range(3):
        changed = [g * 1.5 if index == wrong else g for index, g in enumerate(gradients)]
        assert not all_passed(check_backward("off", q, k, v, grad_out, tuple(changed), pattern=pattern, kv_head=(1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_off_by_one_a_wrong_scale_and_a_nan_are_red(dtype):
    q, k, v = tensors(dtype)
    pattern = heedful.SlidingWindow(4, 4)
    wrong = [
        sdpa(q, k, v, heedful.SlidingWindow(4, 3)),
        sdpa(q * 1.2, k, v, pattern),
        sdpa(q, k, v, pattern).index_fill(2, torch.tensor([0]), math.nan),
    ]
    for out in wrong:
        assert not all_passed(check_forward("off", q, k, v, out, pattern=pattern))


def test_a_row_with_no_key_must_be_zero():
    q, k, v = tensors(torch.float32)
    pattern = heedful.SlidingWindow(0, 0, offset=10_000)
    assert all_passed(check_forward("empty", q, k, v, torch.zeros_like(q), pattern=pattern))
    assert not all_passed(check_forward("empty", q, k, v, torch.full_like(q, 1e-30), pattern=pattern))


def test_selection_holds_the_ends_and_is_reproducible():
    picked = select(2, 8, 5000)
    assert picked == select(2, 8, 5000)
    assert {0, 4999} <= set(picked.rows)
    assert {(0, 0), (1, 7)} <= set(picked.heads)
    assert select(1, 1, 1) == ([(0, 0)], [0])
