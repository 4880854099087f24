"""`pytest bench` runs each benchmark once as a check; `pytest bench --benchmark` times it."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="time the benchmarks instead of running each once")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True


@pytest.fixture(autouse=True)
def quiet_cpu():
    """One thread: two would measure the machine's other guests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
