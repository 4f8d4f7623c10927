"""What implementations are called in tables and plots: ours by the backend that ran, whatever kernels= said."""

from collections.abc import Sequence
from typing import Any

import torch

from crossvit_kernels import backends
from crossvit_kernels.backends import reporting

Row = dict[str, Any]
WORDS = reporting.WORDS | {"reference": "reference"}  # the word for it in every table
GRAPH = "-graph"  # ends the name of what is replayed as a CUDA graph


def backend(implementation: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """{"backend": the names, with + between, of those that ran for one of ours}, for a row; {} for a peer."""
    kernels = implementation.removesuffix(GRAPH)
    if kernels not in ("auto", *backends.BACKENDS):
        return {}
    return {"backend": "+".join(backends.served_by(kernels, device, dtype))}


def labels(rows: Sequence[Row]) -> dict[str, str]:
    """{implementation: its label} for those of `rows`: "ours (C++)", say; a peer keeps its name."""
    found: dict[str, list[str]] = {}
    for row in rows:
        ran = found.setdefault(row["implementation"], [])
        kernels = row["implementation"].removesuffix(GRAPH)
        # Rows of before there was an entry for it say what was asked for.
        for name in row.get("backend", kernels if kernels in WORDS else "").split("+"):
            if name and name not in ran:
                ran.append(name)
    return {implementation: _label(implementation, ran) for implementation, ran in found.items()}


def _label(implementation: str, ran: Sequence[str]) -> str:
    kernels, graph = implementation.removesuffix(GRAPH), ", graph" * implementation.endswith(GRAPH)
    if kernels not in ("auto", *WORDS):
        return implementation
    return f"ours ({' and '.join(WORDS[name] for name in ran)}){graph}" if ran else f"ours{graph}"
