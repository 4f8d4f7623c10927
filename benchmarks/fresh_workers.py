"""A pytest plugin (-p benchmarks.fresh_workers): a worker of pytest-xdist whose GPU is lost makes room for a fresh one.

After an illegal access every later CUDA call in the process fails: one wrong kernel would fail all tests behind it.
"""

import os
import sys

import pytest
import torch

from .devices import DEVICES


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item, report: pytest.TestReport) -> None:
    """Ends the worker, which xdist reports as this test's failure."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        return
    if (lost := DEVICES["cuda"].lost()) is not None:
        print(f"\nGPU LOST in {node.nodeid}: {lost}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says at once which test failed and why: where the time is up there is no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
        print(f"\nFAILED {report.nodeid} " + " | ".join(line[1:].strip() for line in lines[:4])[:500], flush=True)
