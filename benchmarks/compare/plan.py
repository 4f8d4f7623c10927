"""The cases of a comparison: single ops as CrossViT-15 calls them and on next to nothing, whole models, training."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cases, models
from ..agreement import check
from ..session import DTYPES, dtype_name
from ..training import TrainingStep

MODELS = ("crossvit_9_240", "crossvit_15_dagger_240")
BATCHES = (1, 8)
DTYPE_NAMES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """A call to be timed in two trees, by a name that tells it from the others."""

    name: str
    cell: cases.Cell | models.Cell

    @property
    def op(self) -> str | None:
        """The op's name, or None for a model."""
        return self.cell.op if isinstance(self.cell, cases.Cell) else None

    @property
    def group(self) -> str:
        """What its ratio is averaged with: "op", "host", "model" or "train", and the op's direction."""
        kind = self.name.partition("/")[0]
        return f"{kind}, {self.cell.mode}" if self.op else kind

    def prepare(self, kernels: str) -> tuple[Callable[[], object], str]:
        """The call, checked against the reference, and a digest of its results' bits. Raises DisagreementError where
        the check fails."""
        if isinstance(self.cell, models.Cell):
            run = models.our_call(self.cell, kernels)
            models.check(self.cell, run)
            if not isinstance(run, TrainingStep):
                return run, digest([run()])
            logits, gradients = run.logits_and_gradients()
            return run, digest([logits, *(gradients[name] for name in sorted(gradients))])
        function, tensors = self.cell.function(kernels), cases.inputs(self.cell, 0)
        check(self.cell, function, tensors, self.cell.function("reference"))
        found = digest(cases.results(self.cell, function, tensors))
        gradient = cases.output_gradient(self.cell, function, tensors)
        return cases.call(self.cell, function, [tensors], gradient), found


def digest(tensors: Sequence[Tensor]) -> str:
    """The same for the same bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def every_case(device: str, threads: int) -> Iterator[Case]:
    """All there are: ops, ops on next to nothing in float32, models, a training step."""
    for op in cases.OPS:
        for backward in (False, True)[: 1 + (op not in cases.INFERENCE_ONLY)]:
            for branch in cases.BRANCHES:
                for dtype in DTYPE_NAMES:
                    batch = cases.usual_batch(op)
                    cell = cases.Cell(op, branch, batch, DTYPES[dtype], backward, threads, device)
                    yield Case(f"op/{op}/{branch}/b{batch}/{dtype}/{cell.mode}", cell)
    for op in cases.OPS:
        for backward in (False, True)[: 1 + (op not in cases.INFERENCE_ONLY)]:
            cell = cases.Cell(op, "host", 1, torch.float32, backward, threads, device)
            yield Case(f"host/{op}/{cell.mode}", cell)
    for model in MODELS:
        for batch in BATCHES:
            for dtype in DTYPE_NAMES:
                model_cell = models.Cell(model, batch, DTYPES[dtype], threads, False, device)
                yield Case(f"model/{model}/b{batch}/{dtype}", model_cell)
    for dtype in DTYPE_NAMES:
        step = models.Cell(MODELS[0], BATCHES[-1], DTYPES[dtype], threads, True, device)
        yield Case(f"train/{step.model}/b{step.batch}/{dtype_name(step.dtype)}", step)


def chosen(all_cases: Sequence[Case], ops: str, names: str) -> list[Case]:
    """The cases whose name has a match of the regular expression `names`, those of ops only with one of `ops` in the
    op's name, which leaves models out where it is not empty. Raises ValueError for an expression that is none."""
    try:
        op_pattern, pattern = re.compile(ops), re.compile(names)
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is no regular expression: {error}") from None
    found = [case for case in all_cases if pattern.search(case.name)]
    return [case for case in found if not ops or (case.op is not None and op_pattern.search(case.op))]
