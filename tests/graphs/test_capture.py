"""Captured models on a device that only pretends to capture: keys, buffers, eviction, weights, errors."""

import threading

import pytest
import torch
from fake_device import FakeDevice
from torch import nn

import heedful
from heedful.graphs import Buckets, CaptureError, capture, compare


def model(width=4, **options):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, **options)).eval()


def captured(function, sample, **options):
    device = FakeDevice()
    return capture(function, sample, device=device, **options), device


def test_gives_what_the_model_gives():
    net = model()
    fast, device = captured(net, torch.randn(3, 4))
    for _ in range(3):
        x = torch.randn(3, 4)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=0, atol=0)
    assert len(fast) == fast.captures == 1
    assert device.graphs[0].replays == 3


def test_runs_before_the_capture_as_often_as_asked():
    runs = []
    fast, device = captured(lambda x: runs.append(1) or x + 1, torch.zeros(2), warmup=5)
    assert len(runs) == 6
    assert device.log == ["aside", "capture in pool 1"]
    assert fast.captures == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.randn(2, 4), None, "a"),
        (torch.randn(3, 4).double(), None, "a"),
        (torch.randn(3, 4), torch.randn(3, 4), "a"),
        (torch.randn(3, 4), None, "b"),
        (torch.randn(3, 4), None, 1),
        (torch.randn(3, 4), None, True),
    ],
)
def test_shapes_dtypes_and_values_have_graphs_of_their_own(other):
    def function(x, y, z):
        return x if y is None else x + y

    fast, _ = captured(function, (torch.randn(3, 4), None, "a"))
    torch.testing.assert_close(fast(*other), function(*other))
    assert len(fast) == 2
    fast(*other)
    assert fast.captures == 2


def test_nesting_and_names_are_part_of_the_key():
    def function(pair, *, scale):
        a, rest = pair
        return {"sum": (a + rest["b"]) * scale, "kept": 7}

    x = torch.randn(3)
    fast, _ = captured(function, {"pair": (x, {"b": x + 1}), "scale": 2.0})
    y, z = torch.randn(3), torch.randn(3)
    found = fast(pair=(y, {"b": z}), scale=2.0)
    torch.testing.assert_close(found, {"sum": (y + z) * 2, "kept": 7})
    assert len(fast) == 1
    assert found["kept"] == 7
    fast(pair=[y, {"b": z}], scale=2.0)
    assert len(fast) == 2


def test_the_same_tensor_twice_stays_the_same_tensor():
    def function(x, y):
        return x * 2 if x is y else x * 3

    x = torch.ones(2)
    fast, device = captured(function, (x, x))
    assert fast(x + 0, x + 1).tolist() == [3, 3]
    z = torch.full((2,), 5.0)
    assert fast(z, z).tolist() == [10, 10]
    assert len(fast) == 2
    assert [len(replay.inputs) for replay in fast._replays.values()] == [2, 1]
    assert len(device.graphs) == 2


def test_two_models_that_print_alike_share_nothing():
    x = torch.randn(3, 4)
    one, other = model(), model()
    assert str(one) == str(other)
    device = FakeDevice()
    first, second = capture(one, x, device=device), capture(other, x, device=device)
    with torch.no_grad():
        torch.testing.assert_close(first(x), one(x))
        torch.testing.assert_close(second(x), other(x))
    assert device.pools == 2


def test_outputs_are_the_callers_unless_he_says_so():
    net = model()
    fast, _ = captured(net, torch.randn(3, 4))
    first = fast(torch.randn(3, 4))
    kept = first.clone()
    fast(torch.randn(3, 4))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    sharing, _ = captured(net, torch.randn(3, 4), copy_outputs=False)
    assert sharing(torch.randn(3, 4)).data_ptr() == sharing(torch.randn(3, 4)).data_ptr()


def test_the_callers_inputs_are_not_written():
    fast, _ = captured(lambda x: x.mul_(2), torch.ones(3))
    x = torch.ones(3)
    assert fast(x).tolist() == [2, 2, 2]
    assert fast(x).tolist() == [2, 2, 2]
    assert x.tolist() == [1, 1, 1]


def test_strided_and_expanded_inputs():
    fast, _ = captured(lambda x: x * 1, torch.randn(4, 5))
    for x in (torch.randn(5, 4).T, torch.randn(1, 5).expand(4, 5), torch.randn(8, 10)[::2, ::2]):
        torch.testing.assert_close(fast(x), x)
    assert len(fast) == 1


def test_the_least_recently_used_graph_goes():
    fast, device = captured(lambda x: x + 1, torch.zeros(1), limit=2)
    fast(torch.zeros(2))
    fast(torch.zeros(1))
    before = len(device.log)
    fast(torch.zeros(3))
    assert "synchronize" in device.log[before:]
    assert len(fast) == 2
    assert fast.captures == 3
    fast(torch.zeros(1))
    assert fast.captures == 3
    fast(torch.zeros(2))
    assert fast.captures == 4


def test_all_graphs_share_one_pool():
    fast, device = captured(lambda x: x + 1, torch.zeros(1))
    fast(torch.zeros(2))
    assert [line for line in device.log if line.startswith("capture")] == ["capture in pool 1"] * 2


def test_weights_written_in_place_need_no_capture():
    net = model()
    fast, _ = captured(net, torch.randn(3, 4))
    with torch.no_grad():
        net[0].weight.mul_(2)
        net.load_state_dict({name: torch.randn_like(value) for name, value in net.state_dict().items()})
        x = torch.randn(3, 4)
        torch.testing.assert_close(fast(x), net(x))
    assert fast.captures == 1


def _replace_data(net):
    net[0].weight.data = torch.randn(4, 4)


def _assign(net):
    net.load_state_dict({name: torch.randn_like(value) for name, value in net.state_dict().items()}, assign=True)


def _move(net):
    net.double().float()


def _replace_module(net):
    net[1] = nn.Tanh()


def _replace_parameter(net):
    net[2].bias = nn.Parameter(torch.randn(4))


def _remove_parameter(net):
    net[2].bias = None


def _train(net):
    net[1].train()


@pytest.mark.parametrize(
    "change", [_replace_data, _assign, _move, _replace_module, _replace_parameter, _remove_parameter, _train]
)
def test_what_is_not_in_place_is_captured_anew(change):
    net = model()
    fast, device = captured(net, torch.randn(3, 4))
    fast(torch.randn(2, 4))
    change(net)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert fast.captures == 3
    assert len(fast) == 1
    assert device.log[-3] == "aside"
    fast(x)
    assert fast.captures == 3


def test_unwatched_weights_and_reset():
    net = model()
    fast, _ = captured(net, torch.randn(3, 4), watch_weights=False)
    _replace_data(net)
    fast(torch.randn(3, 4))
    assert fast.captures == 1
    fast.reset()
    assert len(fast) == 0
    fast(torch.randn(3, 4))
    assert fast.captures == 2


def test_modules_of_functions_and_methods():
    net = model()
    fast, _ = captured(lambda x: net(x), torch.randn(3, 4), modules=[net])
    method, _ = captured(net.forward, torch.randn(3, 4))
    _replace_data(net)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
        torch.testing.assert_close(method(x), net(x))
    assert fast.captures == method.captures == 2


def test_a_backward_pass_is_refused():
    net = model()
    fast, _ = captured(net, torch.randn(3, 4))
    out = fast(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"has no backward pass; torch\.cuda\.make_graphed_callables"):
        out.sum().backward()
    with torch.no_grad():
        assert not fast(torch.randn(3, 4)).requires_grad
    frozen, _ = captured(net.requires_grad_(False), torch.randn(3, 4))
    assert not frozen(torch.randn(3, 4)).requires_grad
    assert frozen(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_inference_mode_in_and_out():
    net = model()
    with torch.inference_mode():
        fast, _ = captured(net, torch.randn(3, 4))
        fast(torch.randn(3, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert fast.captures == 1


def test_autocast_is_part_of_the_key():
    net = model()
    fast, _ = captured(net, torch.randn(3, 4))
    x = torch.randn(3, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
        torch.testing.assert_close(fast(x), net(x))
        net[0].weight.mul_(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        # No cast of the old weights is kept.
        torch.testing.assert_close(fast(x), net(x))
    assert fast(x).dtype == torch.float32
    assert fast.captures == 2


def test_autocast_keeps_no_casts():
    kept = []
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = captured(lambda x: kept.append(torch.is_autocast_cache_enabled()) or x, torch.zeros(1))
        fast(torch.zeros(1))
        assert torch.is_autocast_cache_enabled()
    assert kept == [False] * 5


def test_what_a_graph_reads_outlives_it():
    tables = {"now": torch.arange(4.0)}
    fast, _ = captured(lambda x: x + tables["now"], torch.zeros(4))
    place = tables["now"].data_ptr()
    del tables["now"]
    (replay,) = fast._replays.values()
    assert place in [tensor.data_ptr() for tensor in replay.held]


def test_operands_of_patterns_outlive_it(monkeypatch):
    from heedful.patterns import moved

    start = torch.tensor([1, 2], dtype=torch.int32)
    pattern = heedful.Padding(start, start + 2)
    q = torch.randn(2, 1, 5, 8)
    fast, _ = captured(lambda q: heedful.attention(q, q, q, pattern=pattern), q)
    (replay,) = fast._replays.values()
    assert start.data_ptr() in [tensor.data_ptr() for tensor in replay.held]
    assert not moved._lists


def test_streams_wait_for_each_other():
    fast, device = captured(lambda x: x + 1, torch.zeros(1))
    fast(torch.zeros(1))
    device.here = "side"
    fast(torch.zeros(1))
    fast(torch.zeros(1))
    assert [line for line in device.log if "waits" in line] == ["side waits for main"]


def test_threads_take_turns():
    net = model(8)
    fast, _ = captured(net, torch.randn(3, 8))
    inputs = [torch.randn(3, 8) for _ in range(8)]
    found = [None] * 8

    def work(n):
        with torch.no_grad():
            for _ in range(20):
                found[n] = fast(inputs[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for x, out in zip(inputs, found, strict=True):
            torch.testing.assert_close(out, net(x))


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4, 4)])
def test_buckets_pad_and_cut(sizes):
    def causal(x, mask, factor):
        return (x * mask).cumsum(1) * factor, factor, x.sum(0, keepdim=True)

    buckets = Buckets(sizes, dim=1, pad={0: 9.0, 1: False}, output_dim=1)
    x, mask = torch.randn(2, 3), torch.rand(2, 3) < 0.5
    fast, device = captured(causal, (x, mask, 2.0), buckets=buckets)
    assert fast._replays.keys() == fast._replays.keys()
    for length in (1, 3, 4, 5, 8):
        x, mask = torch.randn(2, length), torch.rand(2, length) < 0.5
        out, factor, last = fast(x, mask, 2.0)
        torch.testing.assert_close(out, causal(x, mask, 2.0)[0])
        assert factor == 2.0
        assert last.shape == (1, length)
    assert len(fast) == len(device.graphs) == 2
    x, mask = torch.randn(2, 11), torch.rand(2, 11) < 0.5
    torch.testing.assert_close(fast(x, mask, 2.0)[0], causal(x, mask, 2.0)[0])
    assert len(fast) == 3


def test_buckets_by_name_leave_other_inputs():
    def function(ids, table):
        return table[ids]

    buckets = Buckets([6], dim=0, pad={"ids": 0}, output_dim=0)
    table = torch.randn(5, 3)
    fast, _ = captured(function, {"ids": torch.tensor([1, 2]), "table": table}, buckets=buckets)
    ids = torch.tensor([4, 4, 0])
    torch.testing.assert_close(fast(ids=ids, table=table), table[ids])
    assert len(fast) == 1
    uncut, _ = captured(function, {"ids": ids, "table": table}, buckets=Buckets([6], dim=0, pad={"ids": 1}))
    out = uncut(ids=ids, table=table)
    torch.testing.assert_close(out, table[torch.tensor([4, 4, 0, 1, 1, 1])])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"sizes": [], "dim": 0, "pad": {0: 0}}, ValueError, "sizes takes one size or more"),
        ({"sizes": [0], "dim": 0, "pad": {0: 0}}, ValueError, "sizes takes an int from 1"),
        ({"sizes": [1], "dim": -1, "pad": {0: 0}}, ValueError, "dim takes an int from 0"),
        ({"sizes": [1], "dim": 0, "pad": {}}, ValueError, "pad takes one input or more"),
        ({"sizes": [1], "dim": 0, "pad": {1.5: 0}}, TypeError, "pad takes positions and names"),
        ({"sizes": [1], "dim": 0, "pad": {0: "x"}}, TypeError, r"pad\[0\] takes a number"),
    ],
)
def test_wrong_buckets(arguments, error, text):
    with pytest.raises(error, match=text):
        Buckets(**arguments)


def test_inputs_that_do_not_fit_the_buckets():
    buckets = Buckets([4], dim=1, pad={0: 0, "y": 0})
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="buckets takes calls that have every input of pad, got a call without"):
        captured(lambda x: x, x, buckets=buckets)
    for y, error, text in (
        (torch.zeros(1, 3), ValueError, "buckets takes inputs of one size, got inputs of sizes"),
        (torch.zeros(2), ValueError, r"input 'y' takes more than 1 dimensions, got shape \(2,\)"),
        (3, TypeError, "input 'y' takes a tensor, as buckets pad it, got 3"),
    ):
        with pytest.raises(error, match=text):
            buckets.size_of((x,), {"y": y})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sample": [torch.zeros(1)]}, TypeError, "sample takes a tensor, a tuple of arguments, or a dict"),
        ({"sample": (1, 2)}, ValueError, "inputs takes one tensor or more, got no tensor"),
        ({"sample": (torch.zeros(1), {1, 2})}, TypeError, "inputs takes tensors and hashable values"),
        ({"sample": torch.zeros(1, device="meta")}, ValueError, "on a device of type cpu, got a tensor"),
        ({"sample": torch.zeros(2).to_sparse()}, TypeError, "inputs takes strided tensors"),
        ({"sample": torch.zeros(1), "limit": 0}, ValueError, "limit takes an int from 1"),
        ({"sample": torch.zeros(1), "warmup": 2}, ValueError, "warmup takes an int from 3"),
        ({"sample": torch.zeros(1), "buckets": [1]}, TypeError, "buckets takes a heedful.graphs.Buckets or None"),
        ({"sample": torch.zeros(1), "modules": [3]}, TypeError, "modules takes modules"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        capture(lambda *x: x[0], device=FakeDevice(), **options)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model takes a module or a function"):
        capture(3, torch.zeros(1), device=FakeDevice())


def test_without_cuda_it_says_so():
    with pytest.raises(
        heedful.UnsupportedError, match="CUDA graphs cannot be captured here\n  cuda no device"
    ) as caught:
        capture(model(), torch.zeros(3, 4), device=FakeDevice("no device"))
    assert caught.value.reasons == {"cuda": ["no device"]}
    if not torch.cuda.is_available():
        with pytest.raises(heedful.UnsupportedError, match=r"torch sees no CUDA device|a build without CUDA"):
            capture(model(), torch.zeros(3, 4))


def test_cost_is_measured_behind_a_check():
    net = model()
    x = torch.randn(3, 4)
    fast, device = captured(net, x)
    cost = compare(fast, x, rounds=4, calls=2)
    assert len(cost.eager_samples) == len(cost.graph_samples) == 4
    assert min(cost.eager_samples + cost.graph_samples) > 0
    assert cost.launch_seconds == max(0.0, cost.eager_seconds - cost.graph_seconds)
    assert device.log.count("synchronize") == 2 * 2 * 5
    turns = iter(range(1000))
    wrong, _ = captured(lambda x: x + next(turns), x)
    with pytest.raises(AssertionError):
        compare(wrong, x)


def test_a_capture_that_fails_is_not_kept():
    calls = []

    class Fragile(nn.Module):
        def forward(self, x):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("operation not permitted when stream is capturing")
            return x

    net = Fragile()
    device = FakeDevice()
    with pytest.raises(CaptureError, match="Fragile on inputs"):
        capture(net, torch.zeros(1), device=device)
    fast = capture(net, torch.zeros(1), device=device)
    assert fast.captures == 1
    assert fast(torch.ones(1)).item() == 1
