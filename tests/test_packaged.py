"""Configs by name, and a wheel that runs from anywhere without the source tree."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, sftmix
from tiny import TINY

from sftmix.config.deepspeed_json import read_deepspeed_json
from sftmix.config.reader import load_config
from sftmix.config.shipped import describe_configs, find_config
from sftmix.config.study import load_study
from sftmix.errors import ConfigError
from sftmix.planning.scaling import load_scale_study

CONFIGS = ROOT / "configs"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = ["quickstart", "quickstart.yaml", "configs/quickstart", "configs/quickstart.yaml"]
NO_NAMES = ["../configs/quickstart", "/quickstart.yaml", "recipes", ".", "", "deepspeed/zero3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_file_of_the_package(name, empty_folder):
    assert find_config(name) == CONFIGS / "quickstart.yaml"
    assert load_config(name) == load_config(CONFIGS / "quickstart.yaml")


@pytest.mark.parametrize("own", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_file_of_that_name_wins(own, empty_folder):
    (empty_folder / own).parent.mkdir(exist_ok=True)
    text = (CONFIGS / "quickstart.yaml").read_text()
    (empty_folder / own).write_text(text.replace("epochs: 6", "epochs: 7"))
    assert load_config(own).train.epochs == 7
    assert load_config("recipes/llama3.1-8b-alpaca").train.epochs == 3


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_config_is_refused(name, empty_folder):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(name)


def test_every_name_that_is_listed_loads_or_is_a_part(empty_folder):
    described = describe_configs()
    files = [p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")]
    assert sorted(f"{name}.yaml" for name in described) == sorted(files)
    for name, text in described.items():
        assert text.endswith(".") and len(text) <= 100, f"the first line of {name}: {text}"
        if "/" not in name or name.startswith("recipes/"):
            config = load_config(name)
            assert config.engine.deepspeed is None or read_deepspeed_json(config.engine.deepspeed)
        if name.startswith("studies/"):
            study = load_study(name)
            assert len(study.settings.seeds) >= 5 and study.settings.dir == Path("runs") / name
        if name.startswith("scaling/"):
            scaling = load_scale_study(name, [])
            assert scaling.dir == Path("runs") / name
            assert all(load_config(own) for own in scaling.configs)


def test_a_config_of_ones_own_is_made_of_the_packages_parts(empty_folder):
    (empty_folder / "models").mkdir()
    (empty_folder / "models/phi4.yaml").write_text("model: {path: my/phi}\n")
    bases = "base: [bases/paper.yaml, models/phi4.yaml, data/alpaca]\n"
    (empty_folder / "own.yaml").write_text(bases + "run: {dir: runs/x}\n")
    config = load_config("own")
    # a file beside it wins
    assert (config.model.path, config.data.path) == ("my/phi", "tatsu-lab/alpaca")
    assert config.train == load_config("recipes/phi4-alpaca").train


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("quickstrt", "quickstart"),
        ("somewhere/quickstrt.yaml", "quickstart"),
        ("llama3.1-8b-alpaca", "recipes/llama3.1-8b-alpaca"),
        ("mien.yaml", "mine.yaml"),
    ],
)
def test_a_missing_config_names_the_nearest_here_or_in_the_package(wrong, near, empty_folder):
    (empty_folder / "mine.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config(wrong)
    assert str(caught.value) == f"{wrong}: no such config file. Did you mean {near}?"


@pytest.mark.parametrize(
    "command",
    [
        *(["run", "NAME"], ["split", "NAME"], ["inspect", "NAME"], ["doctor", "NAME", "--quick"]),
        *(["export", "NAME", "--to", "x"], ["launch", "NAME", "--hostfile", "h"]),
        ["scores", "check", "t", "NAME"],
        ["launch", "NAME", "--template", "pdsh"],
    ],
    ids=" ".join,
)
def test_every_command_with_a_config_takes_a_name(command, empty_folder):
    words = ["quickstart" if word == "NAME" else word for word in command]
    done = sftmix(*words, "train.epohcs=1", check=False, cwd=empty_folder)
    assert "Did you mean `epochs`?" in done.stdout + done.stderr and done.returncode in (1, 2)
    assert not list(empty_folder.iterdir())


# The wheel.


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what a wheel of this working tree holds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sftmix", "kernels", "launch", "configs"):
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=caches)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        folder / "source",
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture
def from_wheel(site, tmp_path, monkeypatch):
    """Runs Python in an empty folder, with the wheel's sftmix; returns what it prints."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.chdir(tmp_path)

    def python(*arguments):
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert python("-c", "import sftmix; print(sftmix.__file__)").strip() == str(
        site / "sftmix/__init__.py"
    )
    return python


def files_of(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_the_wheel_holds_configs_kernels_and_launch(site):
    for name, inside in {
        "configs": "config/files",
        "kernels": "kernels",
        "launch": "cluster/launch",
    }.items():
        ours, theirs = files_of(ROOT / name), files_of(site / "sftmix" / inside)
        assert ours == theirs and ours


def test_the_wheel_lists_and_loads_its_configs(from_wheel, site):
    said = from_wheel("-m", "sftmix.cli", "configs")
    assert f"files: {site / 'sftmix/config/files'}" in said
    for name, text in describe_configs().items():
        assert f"  {name} " in said and text in said
    code = (
        "import json, sftmix.config.reader as f, sftmix.config.shipped as s,"
        " sftmix.config.deepspeed_json as d\nnames = [n for n in s.describe_configs() if '/' not in"
        " n or n.startswith('recipes/')]\nconfigs = {n: f.load_config(n) for n in names}\nof ="
        " lambda c: c.engine.deepspeed and"
        " d.read_deepspeed_json(c.engine.deepspeed)\nprint(json.dumps({n: of(c) for n, c in"
        " configs.items()}))"
    )
    found = json.loads(from_wheel("-c", code))
    assert found["recipes/phi4-alpaca"] == json.loads(
        (CONFIGS / "deepspeed/zero3.json").read_text()
    )
    assert "quickstart" in found


def test_the_wheel_runs_a_stage_of_a_config_by_name(from_wheel, tmp_path):
    from_wheel("-m", "sftmix.cli", "data", "quickstart", *TINY)
    assert (tmp_path / "runs/quickstart/data/manifest.json").is_file()


@pytest.mark.recipe
def test_the_wheel_runs_the_whole_recipe(from_wheel, tmp_path):
    from_wheel(
        "-m",
        "sftmix.cli",
        "run",
        "quickstart",
        *TINY,
        "engine.num_processes=2",
        "engine.zero_stage=1",
    )
    assert (tmp_path / "runs/quickstart/report/index.html").is_file()
