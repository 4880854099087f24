"""Work on threads of our own: in order, without gradients, and without a trace in torch's settings."""

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from sdr_kernels._cpu import workers
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


def test_autocast_of_the_caller_is_not_ours():
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16):
            products = side_by_side(lambda x: x @ x, [torch.ones(2, 2)] * 4)
        assert {y.dtype for y in products} == {torch.float32}


def test_threads_that_start_later_have_the_users_number():
    workers._forget()
    torch.set_num_threads(2)
    side_by_side(torch.neg, [torch.ones(1)] * 4)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_the_first_callers_share_a_pool(monkeypatch):
    workers._forget()
    start, begun, pools = workers._start, threading.Barrier(4), []
    monkeypatch.setattr(workers, "_start", lambda threads: pools.append(start(threads)) or pools[-1])

    def call():
        begun.wait()
        workers._pool(2)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(pools) == 1


def test_a_pool_that_takes_no_work_is_told_in_the_log(monkeypatch, caplog):
    def refuse(threads):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "_pool", refuse)
    torch.set_num_threads(2)
    with caplog.at_level(logging.INFO):
        assert side_by_side(abs, [-1, -2]) == [1, 2]
    assert [r.message for r in caplog.records] == [
        "2 of 2 pieces of work run on the caller's thread: can't start new thread"
    ]


def test_calls_may_nest():
    torch.set_num_threads(2)
    sums = side_by_side(lambda n: sum(side_by_side(lambda m: n * m, [1, 2, 3])), [1, 2, 3, 4])
    assert sums == [6, 12, 18, 24]


NO_SECOND_THREAD = """
import threading, torch
from sdr_kernels._cpu.workers import side_by_side
torch.set_num_threads(2)
start, started = threading.Thread.start, []
def refuse(thread):
    started.append(thread)
    if len(started) == 2:
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
print([float(y) for y in side_by_side(torch.neg, [torch.ones(1)] * 4)], torch.get_num_threads())
"""
AFTER_THE_MAIN_THREAD = """
import threading, time, torch
from sdr_kernels._cpu.workers import side_by_side
torch.set_num_threads(2)
def work():
    torch.set_num_threads(2)
    for _ in range(20):
        values = [float(y) for y in side_by_side(torch.neg, [torch.ones(1)] * 4)]
        time.sleep(0.05)
    print(values)
threading.Thread(target=work).start()
"""


@pytest.mark.parametrize(
    ("script", "says"),
    [(NO_SECOND_THREAD, "[-1.0, -1.0, -1.0, -1.0] 2"), (AFTER_THE_MAIN_THREAD, "[-1.0, -1.0, -1.0, -1.0]")],
    ids=["a thread cannot start", "the main thread has ended"],
)
def test_a_process_ends_as_it_should(script, says):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, says, "")


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
