"""Work on threads of our own: in order, without gradients, and without a trace in torch's settings."""

import os
import signal

import pytest
import torch

from sdr_kernels._cpu.workers import side_by_side


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order(threads):
    torch.set_num_threads(threads)
    inputs = [torch.full((2,), float(i)) for i in range(7)]
    assert [x.tolist() for x in side_by_side(lambda x: x + 1, inputs)] == [[i + 1.0] * 2 for i in range(7)]
    assert torch.get_num_threads() == threads


def test_each_thread_runs_its_ops_alone():
    torch.set_num_threads(2)
    counts = side_by_side(lambda _: torch.tensor(torch.get_num_threads()), [torch.zeros(1)] * 8)
    assert {int(count) for count in counts} == {1}


def test_no_gradient_is_recorded():
    torch.set_num_threads(2)
    weight = torch.ones(1, requires_grad=True)
    assert not any(y.requires_grad for y in side_by_side(lambda x: x * weight, [torch.ones(1)] * 3))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_tensors_can_be_written_to(mode, threads):
    torch.set_num_threads(threads)
    with mode():
        outs = [torch.zeros(1) for _ in range(4)]
        side_by_side(lambda out: out.add_(1), outs)
    assert all(out == 1 and out.is_inference() == (mode is torch.inference_mode) for out in outs)


def test_an_error_reaches_the_caller():
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="must match"):
        side_by_side(lambda x: x + torch.ones(3), [torch.ones(2)] * 4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads():
    torch.set_num_threads(2)
    side_by_side(torch.neg, [torch.ones(1)] * 4)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # waiting for threads that it does not have would take for ever
        done = [float(y) for y in side_by_side(torch.neg, [torch.ones(1)] * 4)]
        os._exit(0 if done == [-1.0] * 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
