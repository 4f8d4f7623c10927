"""The bits of a fixed set of calls, to tell whether a change that should change no result changed one.

    python tests/support/record_bits.py --out before.json
    python tests/support/record_bits.py --compare before.json after.json

The calls are draws of tests/support/draws.py: every op, dtype and layout, forward and gradients, by the CPU kernels
under each instruction set of this machine, by the Triton kernels in the interpreter and by the CUDA kernels in the
emulation; and two models, forward and backward. Each result is written down as a digest of its bytes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

DRAWS = {"cpu": 160, "triton": 36, "cuda": 48}
SEED = 4242
MODEL = "crossvit_9_dagger_240"


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where two records differ."""
    parser = argparse.ArgumentParser(prog="python tests/support/record_bits.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the record")
    parser.add_argument("--backends", default=",".join(DRAWS), help="of these only (cpu,triton,cuda)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two records")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compare:
        return compare(*(json.loads(path.read_text()) for path in options.compare))
    if options.out is None:
        parser.error("expected --out FILE, or --compare FILE FILE")
    if unknown := set(options.backends.split(",")) - DRAWS.keys():
        parser.error(f"argument --backends: unknown {', '.join(sorted(unknown))}, expected of {', '.join(DRAWS)}")
    if options.part:
        write(options.out, record(options.part))
        return 0
    from available import instruction_sets

    found: dict[str, str] = {}
    for backend in options.backends.split(","):
        for instruction_set in instruction_sets() if backend == "cpu" else [""]:
            found |= in_a_process(backend, instruction_set, options.out)
    write(options.out, found)
    print(f"{len(found)} results recorded")
    return 0


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    """0, or 1 where a result that both have differs; says which."""
    both = before.keys() & after.keys()
    off = sorted(name for name in both if before[name] != after[name])
    print(f"{len(both)} results in both, {len(off)} differ", *off, sep="\n    ")
    return int(bool(off))


def in_a_process(backend: str, instruction_set: str, out: Path) -> dict[str, str]:
    """The record of one backend under one instruction set."""
    part = out.with_name(f"{out.name}.{backend}{instruction_set}.part")
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "CROSSVIT_KERNELS_ISA": instruction_set}
    command = [sys.executable, __file__, "--out", str(part), "--part", backend]
    try:
        subprocess.run(command, env=environment, check=True)
        found = json.loads(part.read_text())
    finally:
        part.unlink(missing_ok=True)
    return {f"{instruction_set or backend}: {name}": value for name, value in found.items()}


def record(backend: str) -> dict[str, str]:
    """The digest of every draw, and of the models, by this backend in this process."""
    import torch

    import available  # before the kernels: sets up the interpreter and the emulation
    import draws
    from inputs import EXAMPLES
    from random_checks import evaluate

    ops, found = draws.ops_of(backend, tuple(EXAMPLES)), {}
    with available.empty_memory_filled_with_nan():
        for index in range(DRAWS[backend]):
            draw = draws.draw(SEED, index, ops, backend)
            torch.set_num_threads(draw.threads)
            results, _ = evaluate(draw, backend, frozenset() if draw.op == "cls_fusion" else None)
            found[f"{index} {draw}"] = digest(results)
    return found | (models() if backend == "cpu" else {})


def models() -> dict[str, str]:
    """The digests of a CrossViT's logits and gradients, in both dtypes."""
    import torch

    import crossvit

    torch.set_num_threads(2)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = crossvit.create_model(MODEL, kernels="cpu").to(dtype)
        images = torch.randn(2, 3, 240, 240, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            found[f"{MODEL} {dtype}"] = digest({"logits": model.eval()(images)})
        model.train()(images).float().square().sum().backward()
        found[f"{MODEL} {dtype}, gradients"] = digest({name: p.grad for name, p in model.named_parameters()})
    return found


def digest(results: dict) -> str:
    """Names, dtypes, shapes and bytes of tensors in sixteen hexadecimal digits."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(results.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def write(path: Path, found: dict[str, str]) -> None:
    """Writes a record under a temporary name and renames it."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(json.dumps(found, indent=0))
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
