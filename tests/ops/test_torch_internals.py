"""The ops where every private part of PyTorch is gone: the public ways give the same results."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crossvit_kernels
from crossvit_kernels.dispatch.torch_internals import PRIVATE

PACKAGE = Path(crossvit_kernels.__file__).parent
TESTS = next(path for path in Path(__file__).parents if path.name == "tests")
INTERNALS = PACKAGE / "dispatch" / "torch_internals.py"
# A private module or name of torch: torch._C, torch._dynamo, from torch.utils._pytree import ..., forward_ad._level.
IMPORTED = re.compile(r"from torch\b.* import (?:.*[ (])?_[A-Za-z]")
FORBIDDEN = re.compile(r"\b(?:torch|forward_ad)(?:\.[A-Za-z]\w*)*\._[A-Za-z]")

# Subjects over which every public way is gone: one op or two each of registration, autocast, backward, transforms,
# compilation, what stands in for tensors, and what is refused.
CHOSEN = {
    "test_registration.py": (
        "(test_opcheck and cls_cross_attention and False and cpu)"
        " or (test_frozen and linear_residual and cpu)"
        " or (test_a_frozen_inputs_gradient and linear_residual and cpu)"
        " or (test_a_second_derivative and layer_norm_linear and cpu)"
        " or (test_function_transforms and linear_residual and cpu)"
        " or (test_compile_of_the_whole_graph and layer_norm_linear and cpu)"
        " or (test_the_flop_counter and self_attention and cpu)"
        " or test_ops_in_float64"
    ),
    "test_autocast.py": (
        "(test_dtypes_and_values and cpu and (layer_norm_mlp or cls_fusion))"
        " or (test_a_backward_inside and auto)"
        " or (test_compiled_under_autocast and cpu and linear_residual)"
    ),
    "test_batched_gradients.py": (
        "cpu and linear_residual"
        " and (test_is_grads_batched or test_vmap_over or test_jacobians or test_the_dispatcher_ops)"
    ),
    "test_direct_calls.py": "reference and self_attention",
    "test_layer_norm_mlp.py": "cpu and plain",
}


def run(arguments: list[str], public: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python in which these probes fail."""
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CROSSVIT_KERNELS_PUBLIC_TORCH": public, "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)


def test_every_probe_passes_with_this_torch() -> None:
    """Where one fails, a new PyTorch has made the package slower: the part is to be looked at."""
    assert PRIVATE
    assert all(PRIVATE.values()), PRIVATE


def test_a_probe_fails_where_it_is_told_to() -> None:
    """Each alone, and the ops still run: no public way leans on the private one of another."""
    code = (
        "import torch, crossvit_kernels as k; from crossvit_kernels.dispatch.torch_internals import PRIVATE;"
        "x = torch.ones(1, 2, 6, requires_grad=True); out = k.self_attention(x, 1); out.sum().backward();"
        "print(sorted(n for n, passed in PRIVATE.items() if not passed))"
    )
    for name in ("observers", "below_autograd,decompositions"):
        done = run(["-c", code], name)
        assert done.returncode == 0, done.stderr
        expected = sorted(name.split(","))
        assert ast.literal_eval(done.stdout) == expected


def test_importing_the_package_does_not_import_torch_compile() -> None:
    """Which would take half as long again as importing torch."""
    done = run(["-c", "import sys, crossvit_kernels, crossvit; assert 'torch._dynamo' not in sys.modules"], "")
    assert done.returncode == 0, done.stderr


def test_probes_pass_wherever_the_package_is_imported() -> None:
    """Under a default device, autocast, a mode, without gradients."""
    code = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with torch.device('meta'), torch.autocast('cpu', torch.bfloat16), FakeTensorMode(), torch.inference_mode():\n"
        "    from crossvit_kernels.dispatch.torch_internals import PRIVATE\n"
        "assert all(PRIVATE.values()), PRIVATE"
    )
    done = run(["-c", code], "")
    assert done.returncode == 0, done.stderr


def test_the_ops_pass_their_tests_over_the_public_ways() -> None:
    """In one fresh Python in which every probe fails."""
    files = [str(path) for name in CHOSEN for path in TESTS.rglob(name)]
    assert len(files) == len(CHOSEN)
    chosen = " or ".join(f"({Path(name).stem} and ({expression}))" for name, expression in CHOSEN.items())
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "-k", chosen, *files], "all")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 50
    assert "skipped" not in done.stdout


def test_compositions_are_run_as_their_modules() -> None:
    """Where hooks and modes cannot be seen, the model runs unfused, with the same result, and says why."""
    code = (
        "import torch, crossvit; from crossvit_kernels import composition as c;"
        "torch.manual_seed(0); m = crossvit.create_model('crossvit_9_240', image_size=48, kernels='auto').eval();"
        "r = crossvit.create_model('crossvit_9_240', image_size=48, kernels='reference').eval();"
        "r.load_state_dict(m.state_dict()); x = torch.randn(1, 3, 48, 48);"
        "torch.testing.assert_close(m(x), r(x), rtol=1e-4, atol=1e-4); print(c.MODULES_UNKNOWN)"
    )
    done = run(["-c", code], "modules")
    assert done.returncode == 0, done.stderr
    assert "are not made as this package knows them" in done.stdout


@pytest.mark.parametrize("package", ["crossvit_kernels", "crossvit"])
def test_private_torch_is_in_one_file(package: str) -> None:
    found = {}
    for path in (PACKAGE.parent / package).rglob("*.py"):
        if path != INTERNALS:
            lines = [line for line in path.read_text().splitlines() if "__version__" not in line]
            if uses := [
                line.strip() for line in lines if FORBIDDEN.search(line) or ("from torch" in line and " _" in line)
            ]:
                found[str(path)] = uses
    assert not found


def test_schemas_and_trees_are_the_private_ones() -> None:
    """Schemas are read from the error of a call without arguments, trees walked by hand."""
    code = """
import torch, crossvit_kernels
from crossvit_kernels.dispatch.torch_internals import PRIVATE, schema_of, tree_leaves, tree_map_only
from torch.utils import _pytree
assert not PRIVATE["schemas"] and not PRIVATE["trees"]
for op in (torch.ops.aten.mm.default, torch.ops.aten.native_layer_norm.default,
           torch.ops.crossvit_kernels.linear_residual_backward.default):
    found, schema = schema_of(op), op._schema
    assert found.arguments == [(a.name, "Tensor" in str(a.type)) for a in schema.arguments], found
    assert found.single == (len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"), found
tree = {"a": [1, (2.0,)], "b": None}
assert tree_leaves(tree) == _pytree.tree_leaves(tree)
assert tree_map_only(int, str, tree) == _pytree.tree_map_only(int, str, tree)
"""
    done = run(["-c", code], "schemas,trees")
    assert done.returncode == 0, done.stderr
