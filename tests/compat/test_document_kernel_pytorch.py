"""The names of kernel_pytorch's guide that stand for CUDA graphs."""

import pytest
import torch
from fake_device import FakeDevice
from torch import nn

import heedful
from heedful.compat.kernel_pytorch.compiler_integration import (
    GraphDeploymentStrategy,
    PyGraphCUDAOptimizer,
    WorkloadAnalysis,
)
from heedful.graphs import CaptureError


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def optimizer(**options):
    return PyGraphCUDAOptimizer(**options, device=FakeDevice())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("method", ["analyze_workload", "create_cuda_graph", "benchmark_vs_eager"])
def test_without_cuda_there_are_no_numbers(method):
    with pytest.raises(heedful.UnsupportedError, match="nothing to measure CUDA graphs on\n  cuda ") as caught:
        getattr(PyGraphCUDAOptimizer(cost_threshold=0.1, strategy="balanced"), method)(model(), [torch.randn(2, 8)])
    assert list(caught.value.reasons) == ["cuda"]


def test_a_graph_gives_what_the_model_gives():
    net, x = model(), torch.randn(2, 8)
    chooser = optimizer()
    analysis = WorkloadAnalysis(0.1, 0.5, 0, True, 2.0, GraphDeploymentStrategy.BALANCED, None)
    state = chooser.create_cuda_graph(net, [x], analysis)
    with torch.no_grad():
        y = torch.randn(2, 8)
        (out,) = chooser.execute_cuda_graph(state, [y])
        torch.testing.assert_close(out, net(y))
    assert state.replay_count == 1
    assert state.capture_time > 0


def test_a_graph_that_does_not_pay_is_warned_of():
    net, x = model(), torch.randn(2, 8)
    analysis = WorkloadAnalysis(0.1, 0.0, 0, False, 1.0, GraphDeploymentStrategy.BALANCED, "launching takes 0 %")
    with pytest.warns(UserWarning, match="not recommended for this workload: launching takes 0 %"):
        optimizer().create_cuda_graph(net, [x], analysis)


def test_models_that_print_alike_and_other_shapes_have_their_own():
    one, other, x = model(), model(), torch.randn(2, 8)
    chooser = optimizer()
    states = [chooser._state(net, [x], 3) for net in (one, other, one)]
    assert states[0] is states[2] is not states[1]
    assert chooser._state(one, [torch.randn(3, 8)], 3) is not states[0]
    for net, state in zip((one, other), states, strict=False):
        with torch.no_grad():
            torch.testing.assert_close(chooser.execute_cuda_graph(state, [x])[0], net(x))


def test_the_analysis_is_what_was_measured():
    net, x = model(), torch.randn(2, 8)
    chooser = optimizer()
    found = chooser.analyze_workload(net, [x], num_trials=4)
    assert found.cost.launch_seconds == found.cpu_launch_overhead
    assert found.expected_speedup == found.cost.speedup
    assert len(found.cost.eager_samples) == 4
    assert found.graph_recommended == (found.overhead_share > 0.1)
    assert (found.reason is None) == found.graph_recommended
    assert chooser.analyze_workload(net, [x]) is found
    chooser.clear_cache()
    assert chooser.analyze_workload(net, [x], num_trials=2) is not found


@pytest.mark.parametrize(("strategy", "share"), [("conservative", 0.2), ("balanced", 0.1), ("aggressive", 0.05)])
def test_strategies_move_the_threshold(monkeypatch, strategy, share):
    from heedful.graphs import optimizer as module
    from heedful.graphs.cost import Cost

    for measured, wanted in ((share + 0.01, True), (share - 0.01, False)):
        cost = Cost(1.0, 1 - measured, measured, measured, 1.0, 1.0, 1.0, [1.0], [1.0])
        monkeypatch.setattr(module, "compare", lambda *args, cost=cost, **options: cost)
        found = optimizer(strategy=strategy).analyze_workload(model(), [torch.randn(2, 8)])
        assert found.graph_recommended is wanted
        if not wanted:
            assert (
                found.reason
                == f"launching takes {100 * measured:.1f} % of a call, and the threshold is {100 * share:.1f} %"
            )


def test_the_benchmark_has_both_sides():
    found = optimizer().benchmark_vs_eager(model(), [torch.randn(2, 8)], num_trials=5)
    assert found.keys() == {"analysis", "eager_execution", "graph_execution", "performance"}
    for side in ("eager_execution", "graph_execution"):
        times = found[side]
        assert 0 < times["min_time"] <= times["median_time"] <= times["max_time"]
    assert found["performance"]["deployment_recommended"] == found["analysis"].graph_recommended
    assert found["performance"]["speedup"] == found["analysis"].expected_speedup


def test_a_model_that_cannot_be_captured_is_not_recommended():
    class Breaks(FakeDevice):
        def capture(self, *arguments):
            raise RuntimeError("operation not permitted")

    chooser = PyGraphCUDAOptimizer(device=Breaks())
    found = chooser.analyze_workload(model(), [torch.randn(2, 8)])
    assert not found.graph_recommended
    assert found.expected_speedup is found.cpu_launch_overhead is found.cost is None
    assert "cannot be captured" in found.reason
    with pytest.raises(CaptureError):
        chooser.benchmark_vs_eager(model(), [torch.randn(2, 8)])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cost_threshold": "x"}, TypeError, "cost_threshold takes a number"),
        ({"cost_threshold": 2}, ValueError, "cost_threshold takes a share"),
        ({"strategy": "bold"}, ValueError, "strategy takes one of 'conservative', 'balanced', 'aggressive'"),
    ],
)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=text):
        PyGraphCUDAOptimizer(**options)


def test_wrong_arguments():
    chooser = optimizer()
    with pytest.raises(TypeError, match=r"model takes a torch\.nn\.Module"):
        chooser.analyze_workload(lambda x: x, [torch.zeros(1)])
    with pytest.raises(TypeError, match="inputs takes a list of tensors"):
        chooser.analyze_workload(model(), torch.zeros(2, 8))
    with pytest.raises(TypeError, match="graph_manager takes what create_cuda_graph returned"):
        chooser.execute_cuda_graph(3, [])
