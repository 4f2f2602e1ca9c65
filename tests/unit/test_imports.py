"""The arrows of the design: which module may import which, held by parsing the sources."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvd_lbt"
MODULES = {
    ".".join(("hvd_lbt", *file.relative_to(PACKAGE).with_suffix("").parts)): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TOP = "hvd_lbt.__init__"

# Lower layers know nothing of higher ones; within a layer modules may know each other.
LAYERS = [
    {"errors", "world", "ops", "stop", "wire_scale"},
    {"data.random_words"},
    {"data.order", "data.block_order", "data.permutation", "data.crops", "data.label_noise"},
    {"run_lock", "launcher", "append_file", "whole_file", "own"},
    {"schedule", "plain_yaml", "no_secrets"},
    {"speed_profile"},
    {"terminal", "arguments", "rounding"},
    {"out_of_memory", "memory"},
    {"recipe", "optim", "losses", "models", "ema", "comm", "state", "rank_agreement"},
    {"growing"},
    {"reducer", "hyperparameters", "data", "checkpoint", "measure", "stage_table", "time_table"},
    {"branch_table"},
    {"log", "sampler"},
    {"training", "micro_batch"},
    {"probe"},
    {"auto_micro_batch"},
    {"elastic"},
    {"evaluate", "export", "elastic.worker"},
    {"run", "branch_training"},
    {"train", "report", "show_plan", "show_recipes", "doctor", "bench"},
    {"branch_record"},
    {"critical_batch"},
    {"studies"},
    {"study"},
    {"cli"},
    {"__main__"},
]
USERS_OF_COMM = {
    "__init__",  # the public names
    "reducer",
    "sampler",
    "train",
    "run",
    "branch_training",
    "critical_batch",
    "evaluate",
    "elastic.worker",
    "doctor",
    "bench",
    "studies",
    "cli",
}
PURE = {  # the standard library, and what is named
    "errors": set(),
    "world": set(),
    "wire_scale": set(),
    "data.order": {"numpy"},
    "data.block_order": {"numpy"},
    "data.permutation": {"numpy"},
    "data.random_words": {"numpy"},
    "data.label_noise": {"numpy"},
    "data.crops": {"numpy"},
    "plain_yaml": {"yaml"},
    "recipe": {"pydantic", "yaml"},
}
SCHEDULE = [name for name in MODULES if name.startswith("hvd_lbt.schedule.")]


def imports(name: str, *, everywhere: bool = True) -> set[str]:
    """The dotted names a module imports."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES}
            if not names <= set(MODULES):  # more than files of the package: the package itself
                found.add(node.module or "")
    return found


def part(name: str) -> str:
    """The name a layer knows a module by: `hvd_lbt.models.resnet` is `models`."""
    inner = name.removeprefix("hvd_lbt.")
    return inner if any(inner in layer for layer in LAYERS) else inner.split(".")[0]


def layer(name: str) -> int:
    return next(number for number, members in enumerate(LAYERS) if part(name) in members)


def own(name: str) -> set[str]:
    """The modules of this package that a module imports; a package's is its __init__."""
    found = imports(name)
    found |= {f"{package}.__init__" for package in found}
    return found & set(MODULES) - {TOP}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {TOP}))
def test_arrows_point_down(name):
    upward = {found for found in own(name) if layer(found) > layer(name)}
    assert not upward


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_borders_have_one_door(name):
    packages = {found.split(".")[0] for found in imports(name)}
    assert ("horovod" in packages) == (name == "hvd_lbt.comm")
    # bench.native is a peer that the benchmark of the input compares with
    assert "nvidia" not in packages or name.startswith(("hvd_lbt.data.", "hvd_lbt.bench.native"))
    if "hvd_lbt.comm" in imports(name):
        assert part(name) in USERS_OF_COMM


@pytest.mark.parametrize("inner", sorted(PURE))
def test_pure_modules_need_nothing_heavy(inner):
    packages = {found.split(".")[0] for found in imports(f"hvd_lbt.{inner}")}
    assert packages <= sys.stdlib_module_names | {"hvd_lbt"} | PURE[inner]


@pytest.mark.parametrize("name", SCHEDULE)
def test_the_schedule_needs_the_standard_library_and_numpy_only(name):
    packages = {found.split(".")[0] for found in imports(name)}
    assert packages <= sys.stdlib_module_names | {"hvd_lbt", "numpy"}
    assert {part(found) for found in own(name)} <= {"schedule", "errors", "world"}


def test_importing_the_schedule_loads_nothing_else():
    program = "import sys; import hvd_lbt.schedule; print(*sys.modules)"
    ended = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {program}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )  # -S: without site-packages, numpy included
    packages = {loaded.split(".")[0] for loaded in ended.stdout.split()}
    assert packages - sys.stdlib_module_names == {"__main__", "hvd_lbt"}


def test_no_circle_between_files():
    """Also imports inside of functions count; a package's __init__ is the files it imports."""
    graph = {name: own(name) - {name} for name in MODULES if name != TOP}
    order = TopologicalSorter(graph)
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def test_an_optimizer_that_is_not_compiled_does_not_import_the_compiler():
    """Every rank of every run starts with it."""
    program = (
        "import sys, torch; from hvd_lbt.optim import FusedSGD; "
        "optimizer = FusedSGD([torch.nn.Parameter(torch.zeros(2))], momentum=0.9); "
        "optimizer.load_state_dict(optimizer.state_dict()); "
        "print('torch._dynamo' in sys.modules)"
    )
    words = [sys.executable, "-c", program]
    ended = subprocess.run(words, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert ended.stdout.strip() == "False"
