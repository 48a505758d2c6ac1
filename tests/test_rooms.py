"""The import law of docs/architecture.md, and what importing costs."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from processes import ROOT

FILES = sorted(
    p
    for folder in ("sftmix", "kernels", "launch")
    for p in (ROOT / folder).rglob("*.py")
    if not p.is_symlink()
)
# they are links there
FILES = [p for p in FILES if not {"kernels", "launch"} & set(p.relative_to(ROOT).parts[1:])]


def imports(path):
    """Yields (module, name) of every import statement in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def room(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


# The import law: a room may import itself, the kernels, and the rooms in the lines above its own.
# docs/architecture.md draws it.
LAW = (
    {"errors"},
    {"config", "storage"},
    {"cluster", "pairing"},
    {"batches"},
    {"data", "loss"},
    {"engine"},
    {"confidence"},
    {"train"},
    {"evaluation"},
    {"planning"},
    {"pipeline"},
    {"doctor", "studies", "integrations"},
    {"cli"},
)
ROOMS = {name: number for number, layer in enumerate(LAW) for name in layer}
OURS = [p for p in FILES if p.is_relative_to(ROOT / "sftmix") and p != ROOT / "sftmix/__init__.py"]


def room_of(module):
    """Returns the room of `sftmix.room.file`; None for the package itself, the kernels, and what is
    not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sftmix" and len(parts) > 1 and parts[1] != "kernels" else None


def modules_of(path):
    """Returns the modules of ours that a file imports, `from sftmix.room import file` as
    `sftmix.room.file`."""
    found = set()
    for module, name in imports(path):
        inner = ROOT / module.replace(".", "/") / f"{name}.py"
        found.add(f"{module}.{name}" if module.startswith("sftmix") and inner.is_file() else module)
    return {module for module in found if room_of(module)}


def test_every_entry_of_the_package_is_a_room_or_a_link():
    """At most 18 to read, beside `__init__.py` and the link to the kernels."""
    entries = {
        p.name.removesuffix(".py") for p in (ROOT / "sftmix").iterdir() if p.name != "__pycache__"
    }
    assert entries == {*ROOMS, "__init__", "kernels"} and len(ROOMS) <= 18


@pytest.mark.parametrize("path", OURS, ids=room)
def test_a_room_imports_only_rooms_below_it(path):
    own = room(path).split("/")[1]
    for module in modules_of(path):
        other = room_of(module)
        assert other == own or ROOMS[other] < ROOMS[own], f"{room(path)} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    graph = {room(p).replace("/", "."): modules_of(p) for p in OURS}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    "path", [p for p in OURS if not room(p).startswith("sftmix/engine/")], ids=room
)
def test_only_the_engine_knows_deepspeed_and_ranks(path):
    for module, name in imports(path):
        assert not module.startswith(("deepspeed", "torch.distributed")) and (module, name) != (
            "torch",
            "distributed",
        ), module


@pytest.mark.parametrize("path", OURS, ids=room)
def test_importing_reads_no_environment_no_clock_and_no_process_table(path):
    """What is read at import is read once, at a moment that nobody chose."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    called = [
        ast.unparse(node.func)
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if not isinstance(statement, definitions) and "__main__" not in ast.unparse(statement)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    ]
    banned = ("os.environ", "os.getenv", "time.", "subprocess.", "socket.", "processes.")
    assert not [name for name in called if name.startswith(banned)]


def test_private_state_of_deepspeed_is_touched_in_one_file():
    private = re.compile(r"\bds_(tensor|shape|numel|id|status)\b|_deepspeed\._|deepspeed_engine\._")
    touching = {room(p) for p in OURS if private.search(p.read_text(encoding="utf-8"))}
    assert touching <= {"sftmix/engine/deepspeed_internals"}


LIGHT = ("errors", "storage", "cluster", "pairing")


@pytest.mark.parametrize("path", [p for p in OURS if room(p).split("/")[1] in LIGHT], ids=room)
def test_what_no_model_is_needed_for_does_not_load_torch(path):
    assert not [module for module, _ in imports(path) if module.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    "path", [p for p in OURS if not room(p).startswith("sftmix/pipeline/")], ids=room
)
def test_only_the_pipeline_knows_the_stage_context(path):
    assert not [name for _, name in imports(path) if name == "StageContext"]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "kernels"], ids=room)
def test_kernels_need_torch_and_triton_only(path):
    for module, _ in imports(path):
        top = module.split(".")[0]
        assert top in (
            "torch",
            "triton",
            "typing",
            "dataclasses",
            "functools",
            "__future__",
            "collections",
            "math",
            "importlib",
            "inspect",
            "flash_attn",  # used where it is installed
        ) or module.startswith("sftmix.kernels."), module


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_top_level_room_is_no_regular_package(name):
    assert not (ROOT / name / "__init__.py").exists(), (
        f"{name}/__init__.py would make `import {name}` succeed whenever the repository root is on"
        " sys.path. transformers probes for the Hugging Face package `kernels` and would find"
        " ours."
    )
    link = ROOT / "sftmix" / {"launch": "cluster/launch"}.get(name, name)
    assert link.is_symlink() and link.resolve() == ROOT / name


def loaded_by(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(done.stdout.split())


def test_kernels_import_without_deepspeed_and_transformers():
    loaded = loaded_by(
        "import sftmix.kernels.fused_linear_mixup_cross_entropy, sftmix.kernels.linear_token_nll"
    )
    assert "torch" in loaded and not {"deepspeed", "transformers", "datasets", "pydantic"} & loaded


BANNED = (
    "pickle.load",
    "yaml.load(",
    "shell=True",
    "weights_only=False",
    "_object(",
    "except Exception",
    "except:",
)
# The doctor examines machines that are not as they should be: any failure of a check is a finding.
# Trackers are other people's code, which speaks to servers: what fails there must not end training.
ALLOWED = {
    "sftmix/doctor/findings": ("except Exception",),
    "sftmix/train/trackers": ("except Exception",),
}


@pytest.mark.parametrize("path", FILES, ids=room)
def test_nothing_unpickles_or_reaches_a_shell_or_swallows_errors(path):
    text = path.read_text(encoding="utf-8")
    allowed = ALLOWED.get(room(path), ())
    assert text.isascii()
    assert not [word for word in BANNED if word in text and word not in allowed]
