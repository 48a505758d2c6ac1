"""The import law of docs/architecture.md, and what importing costs."""

import ast
import subprocess
import sys

import pytest
from processes import ROOT

FILES = sorted(p for folder in ("sftmix", "kernels", "launch") for p in (ROOT / folder).rglob("*.py") if not p.is_symlink())
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


@pytest.mark.parametrize("path", FILES, ids=room)
def test_only_the_engine_knows_deepspeed_and_ranks(path):
    if room(path).startswith("sftmix/engine/"):
        return
    for module, name in imports(path):
        assert not module.startswith(("deepspeed", "torch.distributed")) and (module, name) != ("torch", "distributed"), module


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "kernels"], ids=room)
def test_kernels_need_torch_and_triton_only(path):
    for module, _ in imports(path):
        top = module.split(".")[0]
        assert top in ("torch", "triton", "typing", "dataclasses", "functools", "__future__", "collections", "math") or module.startswith(
            "sftmix.kernels."
        ), module


LOWER = {  # what these rooms must not know
    "sftmix/permutation": ("torch", "sftmix"),
    "sftmix/pairing": ("torch", "sftmix.engine", "sftmix.data", "sftmix.config.schema", "sftmix.pipeline.run", "sftmix.storage.artifacts"),
    "sftmix/faults": ("torch", "sftmix"),
    "sftmix/processes": ("torch", "sftmix"),
    "sftmix/stopping": ("torch", "sftmix"),
    "sftmix/rank_log": ("torch", "sftmix"),
    "sftmix/hostfile": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/launch_environment": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/multinode/commands": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/fence": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/checkpoints": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/work": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/engine/watch": ("torch", "deepspeed", "sftmix.config.schema", "sftmix.pipeline.run"),
    "sftmix/shards": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.data"),
    "sftmix/split": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.data", "sftmix.pipeline.run"),
    "sftmix/scores": ("torch", "sftmix.engine", "sftmix.pipeline.run", "sftmix.config.schema"),
    "sftmix/confidence": ("torch", "sftmix.engine", "sftmix.pipeline.run"),
    "sftmix/config": ("torch", "sftmix"),
    "sftmix/artifacts": ("torch", "sftmix.engine", "sftmix.config.schema", "sftmix.data"),
    "sftmix/objectives": ("sftmix.engine", "sftmix.pipeline.run", "sftmix.config.schema"),
}


@pytest.mark.parametrize("name", LOWER)
def test_lower_rooms_do_not_know_higher_ones(name):
    for module, _ in imports(ROOT / f"{name}.py"):
        assert not any(module == banned or module.startswith(banned + ".") for banned in LOWER[name]), module


@pytest.mark.parametrize("path", [p for p in FILES if room(p).startswith("sftmix/data/")], ids=room)
def test_data_knows_no_engine_and_no_stage(path):
    for module, _ in imports(path):
        assert not module.startswith(("sftmix.engine", "sftmix.pipeline.run", "sftmix.pipeline.stages", "sftmix.train.loop")), module


@pytest.mark.parametrize("name", ["kernels", "launch"])
def test_top_level_room_is_no_regular_package(name):
    assert not (ROOT / name / "__init__.py").exists(), (
        f"{name}/__init__.py would make `import {name}` succeed whenever the repository root is on sys.path. "
        "transformers probes for the Hugging Face package `kernels` and would find ours."
    )
    assert (ROOT / "sftmix" / name).is_symlink()


def loaded_by(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


def test_kernels_import_without_deepspeed_and_transformers():
    loaded = loaded_by("import sftmix.kernels.fused_linear_mixup_cross_entropy, sftmix.kernels.linear_token_nll")
    assert "torch" in loaded and not {"deepspeed", "transformers", "datasets", "pydantic"} & loaded


BANNED = ("pickle.load", "yaml.load(", "shell=True", "weights_only=False", "_object(", "except Exception", "except:")


@pytest.mark.parametrize("path", FILES, ids=room)
def test_nothing_unpickles_or_reaches_a_shell_or_swallows_errors(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert not [word for word in BANNED if word in text]
