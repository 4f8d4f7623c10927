"""The process that prepares and times cases in one tree. A request is a line of JSON on its input, an answer one on its
output:

    {"prepare": "op/linear_residual/…", "warm": 0.1}    {"seconds": of the fastest call, "digest": of the results' bits}
    {"turn": 12}                                        {"seconds": per call of so many calls}

or {"error": "why it failed, in a line"}. The first answer, to no request, is {"tree": the folder of crossvit_kernels}.
The process has the benchmarks of the new tree and both packages of the tree that it times (process.py sees to that), so
that what is timed has one definition, and of the timed tree nothing but the public names is used.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import crossvit_kernels

from .. import timing
from ..devices import Host, use
from .plan import every_case

SETTLE_SECONDS = 0.005  # for so long a turn's calls are not timed: the other process's threads still spin


class Worker:
    """What it knows between two requests: the cases, and the call of the one that was prepared last."""

    def __init__(self, device: str, threads: int, kernels: str) -> None:
        self.device: Host = use(device)
        self.kernels = kernels
        self.cases = {case.name: case for case in every_case(device, threads)}
        self.run: Callable[[], object] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if (name := request.get("prepare")) is not None:
            self.run = None  # its memory is free before the next is made
            self.run, found = self.cases[name].prepare(self.kernels)
            return {"seconds": timing.warm_up(self.run, request["warm"], self.device.seconds), "digest": found}
        if self.run is None:
            raise ValueError("nothing was prepared")
        return {"seconds": timing.turn(self.run, request["turn"], self.device.seconds, SETTLE_SECONDS)}


def main() -> int:
    """Answer until there are no more requests; 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not come between the answers
    device, threads, kernels = sys.argv[1:]
    torch.set_num_threads(int(threads))
    worker = Worker(device, int(threads), kernels)
    say(answers, {"tree": str(Path(crossvit_kernels.__file__).resolve().parents[1])})
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            answer = {"error": f"{type(error).__name__}: {reason}"}
        say(answers, answer)
    return 0


def say(answers: Any, answer: dict[str, Any]) -> None:
    """Writes one line."""
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
