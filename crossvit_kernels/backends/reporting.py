"""Which kernels run here, in words for people: `report()`, and the labels of tables and plots."""

import torch

from . import availability, build_record, choice

# The ops that a library of kernels may have, with or without a backward.
OPS = (
    *("bicubic_resize", "cls_cross_attention", "cls_fusion", "layer_norm_linear", "layer_norm_mlp", "linear_residual"),
    *("patch_embed", "self_attention"),
)


# What the backends' kernels are written in.
WORDS = {"reference": "plain PyTorch", "cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


def served_by(kernels: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends whose kernels run for `kernels=` and tensors of `dtype` on that type of device, "cpu" or "cuda", in
    any op; ("reference",) where plain PyTorch serves them all. Raises ValueError for an unknown name.
    """
    found = []
    for op in OPS:
        name = choice.preferred(kernels, device, op)
        if name == "reference" or not availability.available(name) or device not in availability.devices(name):
            continue
        if dtype in availability.dtypes(name) and availability.serves(name, op) and name not in found:
            found.append(name)
    return tuple(found) or ("reference",)


def in_words(kernels: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """`served_by`, as people call it: "C++", say."""
    return " and ".join(WORDS[name] for name in served_by(kernels, device, dtype))


def cuda_ops() -> list[str]:
    """The ops of the library in use, or of the one that would be with a GPU."""
    if availability.cuda_missing() is not None and (
        build_record.read_record("crossvit_kernels/_cuda.so")[1] or availability.load_library("_cuda.so")
    ):
        return []
    names = sorted([*OPS, *(f"{name}_backward" for name in OPS)])
    return [name for name in names if hasattr(torch.ops.crossvit_kernels_cuda, name)]


def report() -> str:
    """Prints, and returns, which backends exist on this machine and why the others do not."""
    lines = [f"{name}: {availability.reason(name) or 'available'}" for name in availability.BACKENDS]
    if availability.available("cpu"):
        cpu = torch.ops.crossvit_kernels_cpu
        sets = cpu.instruction_sets().replace(" ", ", ")
        lines[1] += f", {cpu.instruction_set()} in use (built: {sets}; compiler {cpu.compiler()})"
    if availability.cuda_missing() is None and availability.emulated():
        lines[3] += ", emulated on CPU tensors"
    if ops := cuda_ops():
        cuda = build_record.read_record("crossvit_kernels/_cuda.so")[0]["cuda"]
        built_for = f"{', '.join(cuda['architectures'])} by nvcc {cuda['nvcc']}" if cuda["architectures"] else "no GPU"
        lines[3] += f" (built for {built_for}: {', '.join(ops)})"
    default = choice.environment()
    if default == "auto":
        places = {"cpu": "on the CPU"} | ({"cuda": "on a GPU"} if torch.cuda.is_available() else {})
        meant = (f"{' and '.join(served_by('auto', device))} {where}" for device, where in places.items())
        lines.append(f"kernels='auto' means {', '.join(meant)}")
    else:
        lines.append(f"kernels='auto' means {default}, from CROSSVIT_KERNELS")
    for op in ops if default == "auto" else ():
        first = choice.candidates("cuda", op)[0]
        measured = choice.MEASURED[op][1] if op in choice.MEASURED else "unmeasured against cuda"
        lines.append(f"  on a GPU, {op}: {first}, {measured}")
    text = "\n".join(lines)
    print(text)
    return text
