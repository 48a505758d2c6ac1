"""Whatever a user gets wrong ends with exit code 2 and a line that says what is wrong and what to
do: no traceback."""

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from processes import ROOT
from tokenizers_for_tests import character_tokenizer

from sftmix.cli import _parser, main
from sftmix.config.reader import load_config
from sftmix.config.shipped import packaged
from sftmix.errors import ConfigError, SftmixError
from sftmix.pipeline.preflight import check

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
NEEDED_LATER = ["torch", "transformers", "deepspeed", "datasets"]


@pytest.fixture(autouse=True)
def offline_and_without_a_launcher(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # read from the environment only once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    # left behind by tests that join a process group
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with data, a tokenizer of 99 tokens, and models that are whole and that are not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("given")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.txt").write_text("rows")
    (folder / "broken.jinja").write_text("{% for")
    (folder / "latin1.jinja").write_bytes(b"\xff")
    (folder / "filter.jinja").write_text("{{ messages | nofilter }}")
    (folder / "stage2.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "zero.json").write_text('{"zero_optimization": {"overlap_com": true}}')
    (folder / "misspelled.json").write_text('{"zero_optimisation": {"stage": 3}}')
    character_tokenizer().save_pretrained(folder / "tokenizer")
    config = AutoConfig.for_model(**LLAMA, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model-of-50-tokens")
    config.save_pretrained(folder / "model-without-weights")
    config.save_pretrained(folder / "model-with-pickled-weights")
    (folder / "model-with-pickled-weights" / "pytorch_model.bin").write_bytes(b"")
    (folder / "empty").mkdir()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=120)).save_pretrained(
        folder / "model"
    )
    _damage(folder / "model", folder)
    return folder


def _damage(model, folder):
    """Makes copies of a model's folder, each of which has something wrong."""
    from safetensors.torch import load_file, save_file

    def copy(name):
        return shutil.copytree(model, folder / name)

    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for shape in ((0,), (8, 4)):
        save_file(
            weights | {name: torch.zeros(shape)},
            copy(f"model-with-shape-{len(shape)}") / "model.safetensors",
            metadata={"format": "pt"},
        )
    whole = (model / "model.safetensors").read_bytes()
    for cut in (0, 5, len(whole) // 2):
        (
            copy(f"model-cut-at-{'start' if not cut else 'header' if cut == 5 else 'half'}")
            / "model.safetensors"
        ).write_bytes(whole[:cut])
    index = {
        "missing-shard": json.dumps(
            {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        ),
        "index-list": "[]",
        "index-cut": "{",
    }
    for name, text in index.items():
        (copy(f"model-{name}") / "model.safetensors").rename(
            folder / f"model-{name}" / "other.safetensors"
        )
        (folder / f"model-{name}" / "model.safetensors.index.json").write_text(text)
    for name, text in {"cut": "{", "list": "[1]", "untyped": "{}"}.items():
        (copy(f"model-config-{name}") / "config.json").write_text(text)
    settings = json.loads((model / "config.json").read_text())
    (copy("model-config-value") / "config.json").write_text(
        json.dumps(settings | {"hidden_size": "wide"})
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copytree(folder / "tokenizer", folder / f"broken-{file}")
        (folder / f"broken-{file}" / file).write_text("[1")


@pytest.fixture
def config(given, tmp_path):
    """A config that is in order; its run folder does not exist yet."""
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"architecture": LLAMA},
        "tokenizer": {"train": {"vocab_size": 330}},
        "data": {"path": str(given / "rows.jsonl"), "max_length": 256},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def mistake(capsys, *arguments):
    """Runs the command line in this process, which must end as a user's mistake does; returns what
    it says."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("sftmix: error: ")]
    assert code == 2 and lines and "Traceback" not in said
    return "\n".join(lines)


GIVEN_TOKENIZER = ["tokenizer.train=", "tokenizer.path=GIVEN/tokenizer"]


def model(name, folder="GIVEN/"):
    return ["model.architecture=", f"model.path={folder}{name}", *GIVEN_TOKENIZER]


# name -> (overrides, the cause, the remedy); GIVEN stands for the folder of that fixture
FOUND_BEFORE_ANYTHING_STARTS = {
    "unknown key": (
        ["train.epohcs=1"],
        "`train.epohcs` is an unknown key",
        "Did you mean `epochs`?",
    ),
    "wrong type": (["train.epochs=many"], "`train.epochs` is 'many'", "should be a valid integer"),
    "list for a section": (["train=[1, 2]"], "`train` is [1, 2]", "should be a valid dictionary"),
    "number beyond all bounds": (
        ["run.seed=99999999999999999999"],
        "`run.seed` is 99999999999999999999",
        "should be less than",
    ),
    "date that is none": (
        ["run.dir=2020-99-99"],
        "override `run.dir=2020-99-99`",
        "the value is not valid YAML: month must be",
    ),
    "sizes of no model": (
        ["model.architecture.hidden_size=0"],
        "model.architecture describes no model that can be built",
        "Correct its values",
    ),
    "no attention heads": (
        ["model.architecture.num_attention_heads=0"],
        "model.architecture (model_type 'llama')",
        "Correct the value",
    ),
    "unknown filter in a template": (
        ["tokenizer.chat_template=GIVEN/filter.jinja"],
        "No filter named 'nofilter'",
        "tokenizer.chat_template",
    ),
    "no override": (["epochs"], "override `epochs`", "for example `train.epochs=1`"),
    "missing data": (
        ["data.path=GIVEN/no.jsonl"],
        "GIVEN/no.jsonl does not exist",
        "Give the path of a file",
    ),
    "unknown format": (["data.format=alpacca"], "data.format is 'alpacca'", "expected auto, "),
    "field of another format": (
        ["data.format=qa", "data.columns={prompt: q}"],
        "data.columns maps ['prompt']",
        "it has ['answer',",
    ),
    "field of no format": (["data.columns={promt: q}"], "data.columns maps ['promt']", "it has ["),
    "missing model": (
        model("none"),
        "model.path: GIVEN/none does not exist",
        "Give a folder, or a Hub name",
    ),
    "model not on the Hub": (
        model("none", folder=""),
        "model.path: none cannot be loaded",
        "Give a folder",
    ),
    "model without config": (
        model("empty"),
        "model.path: GIVEN/empty holds no config.json",
        "Give the folder of a Hugging Face model",
    ),
    "model without weights": (
        model("model-without-weights"),
        "holds no weights (*.safetensors)",
        "Complete the folder",
    ),
    "pickled weights": (
        model("model-with-pickled-weights"),
        "pickled weights (*.bin) are not read",
        "convert them",
    ),
    "missing reference model": (
        ["reference.model={path: GIVEN/none}"],
        "reference.model.path: GIVEN/none does not exist",
        "Give a folder",
    ),
    "larger tokenizer": (
        model("model-of-50-tokens"),
        "the tokenizer has 99 tokens, the model's embedding 50 rows",
        "Use the model's own",
    ),
    "larger tokenizer to train": (
        ["model.architecture.vocab_size=329"],
        "tokenizer.train.vocab_size is 330",
        "Lower it",
    ),
    "weights of no shape": (
        model("model-with-shape-1"),
        "down_proj.weight has shape [0], the model's has [8, 8]. A save under ZeRO-3",
        "Save the model again",
    ),
    "weights of another shape": (
        model("model-with-shape-2"),
        "down_proj.weight has shape [8, 4], the model's has [8, 8]",
        "correct config",
    ),
    "weights of a reference model": (
        ["reference.model={path: GIVEN/model-with-shape-2}", *GIVEN_TOKENIZER],
        "reference.model.path: GIVEN/model-with-",
        "[8, 4]",
    ),
    "weights that are empty": (
        model("model-cut-at-start"),
        "model.safetensors cannot be read as safetensors",
        "Copy or download it again",
    ),
    "weights without a header": (
        model("model-cut-at-header"),
        "model.safetensors cannot be read as safetensors",
        "Copy or download it again",
    ),
    "weights that are cut off": (
        model("model-cut-at-half"),
        "not fully covered",
        "Copy or download it again",
    ),
    "missing shard": (
        model("model-missing-shard"),
        "1 are missing, first model-00001-of-00001.safetensors",
        "Copy or download them",
    ),
    "index that is a list": (
        model("model-index-list"),
        "index.json is not an index of weights",
        "Copy or download it again",
    ),
    "index that is no JSON": (
        model("model-index-cut"),
        "index.json is not an index of weights",
        "Copy or download it again",
    ),
    "config that is no JSON": (
        model("model-config-cut"),
        "model.path: GIVEN/model-config-cut cannot be loaded",
        "config.json is damaged",
    ),
    "config that is a list": (
        model("model-config-list"),
        "model.path: GIVEN/model-config-list cannot be loaded",
        "config.json is damaged",
    ),
    "config without a type": (
        model("model-config-untyped"),
        "model.path: GIVEN/model-config-untyped cannot be loaded",
        "model_type",
    ),
    "config with a wrong value": (
        model("model-config-value"),
        "model.path: GIVEN/model-config-value cannot be loaded",
        "'hidden_size'",
    ),
    "broken tokenizer": (
        ["tokenizer.train=", "tokenizer.path=GIVEN/broken-tokenizer.json"],
        "GIVEN/broken-tokenizer.json/tokenizer.json",
        "is damaged",
    ),
    "broken tokenizer config": (
        ["tokenizer.train=", "tokenizer.path=GIVEN/broken-tokenizer_config.json"],
        "GIVEN/broken-tokenizer_config.json/tokenizer_config.json is damaged",
        "tokenizer.path",
    ),
    "attention that is not installed": (
        ["model.attn_implementation=flash_attention_2"],
        "model.attn_implementation: flash_attention_2 cannot be used here",
        "use sdpa or eager",
    ),
    "misspelt attention": (
        ["model.attn_implementation=spda"],
        "spda cannot be used here",
        "Did you mean `sdpa`?",
    ),
    "attention from the Hub": (
        ["model.attn_implementation=owner/kernel"],
        "owner/kernel cannot be used here: `kernels` is",
        "use sdpa or eager",
    ),
    "attention that needs a GPU": (
        ["model.attn_implementation=flex_attention"],
        "It needs a GPU, and there is none here",
        "use sdpa or eager",
    ),
    "attention of a reference model": (
        [
            f"reference.model={{architecture: {json.dumps(LLAMA)}, attn_implementation:"
            " flash_attention_3}"
        ],
        "reference.model.attn_implementation: flash_attention_3 cannot be used here",
        "use sdpa or eager",
    ),
    "attention of a scoring model": (
        [f"confidence.models=[{{architecture: {json.dumps(LLAMA)}, attn_implementation: eagre}}]"],
        "confidence.models[0].attn_implementation: eagre cannot be used here",
        "Did you mean `eager`?",
    ),
    "missing tokenizer": (
        ["tokenizer.train=", "tokenizer.path=GIVEN/none"],
        "tokenizer: GIVEN/none cannot be loaded",
        "tokenizer.train",
    ),
    "model without tokenizer": (
        ["model={path: GIVEN/model-of-50-tokens}", "tokenizer.train="],
        "cannot be loaded",
        "tokenizer.path",
    ),
    "long examples": (
        ["data.max_length=257"],
        "data.max_length is 257, but the context of model is 256",
        "Lower data.max_length",
    ),
    "long examples for gpt2": (
        ["model.architecture={model_type: gpt2, n_positions: 9}"],
        "the context of model is 9 tokens",
        "Lower",
    ),
    "unknown architecture": (
        ["model.architecture.model_type=lama"],
        "model_type 'lama'",
        "Should contain one of",
    ),
    "no language model": (
        ["model.architecture.model_type=vit"],
        "model.architecture (model_type 'vit')",
        "language model",
    ),
    "size that is not a number": (
        ["model.architecture.hidden_size=wide"],
        "model.architecture (model_type 'llama')",
        "hidden_size",
    ),
    "sizes that do not fit": (
        ["model.architecture.hidden_size=9"],
        "model.architecture (model_type 'llama')",
        "multiple",
    ),
    "size for a ready tokenizer": (
        ["model.architecture.hidden_size=a", *GIVEN_TOKENIZER],
        "model.architecture (model_type",
        "hidden_size",
    ),
    "unknown key of an architecture": (
        ["model.architecture.hiden_size=9"],
        "hiden_size",
        "Did you mean `hidden_size`?",
    ),
    "unknown template": (
        ["tokenizer.chat_template=chatlm"],
        "chatlm is neither a built-in template",
        "alpaca, chatml",
    ),
    "template that does not parse": (
        ["tokenizer.chat_template=GIVEN/broken.jinja"],
        "GIVEN/broken.jinja",
        "tokenizer.chat_template",
    ),
    "template that is not UTF-8": (
        ["tokenizer.chat_template=GIVEN/latin1.jinja"],
        "GIVEN/latin1.jinja",
        "tokenizer.chat_template",
    ),
    "contradiction": (
        ["engine.deepspeed=GIVEN/stage2.json"],
        "stage is 2, but engine.zero_stage is 3",
        "Make them equal",
    ),
    "unknown DeepSpeed key": (
        ["engine.deepspeed=GIVEN/misspelled.json"],
        "`zero_optimisation`",
        "Did you mean `zero_optimization`?",
    ),
    "misspelt key of ZeRO": (
        ["engine.deepspeed=GIVEN/zero.json"],
        "`zero_optimization.overlap_com` is not a DeepSpeed key",
        "Did you mean `overlap_comm`?",
    ),
    "format beside sources": (
        [
            "data.path=",
            "data.generator=",
            "data.sources=[{path: GIVEN/rows.jsonl}]",
            "data.format=qa",
        ],
        "`ignore_columns` belong to `path`",
        "give them to each source",
    ),
    "DeepSpeed file is a folder": (
        ["engine.deepspeed=GIVEN/empty"],
        "GIVEN/empty",
        "Give the path of a DeepSpeed JSON file",
    ),
}


@pytest.mark.parametrize("name", FOUND_BEFORE_ANYTHING_STARTS)
def test_a_mistake_is_named_with_its_remedy_before_anything_is_written(
    name, config, given, tmp_path, capsys
):
    overrides, cause, remedy = FOUND_BEFORE_ANYTHING_STARTS[name]
    said = mistake(
        capsys, "data", config, *[text.replace("GIVEN", str(given)) for text in overrides]
    )
    assert cause.replace("GIVEN", str(given)) in said and remedy in said
    assert not (tmp_path / "run").exists()


# the test of the test
def test_the_config_that_the_mistakes_are_made_in_is_in_order(config, tmp_path):
    assert main(["data", str(config)]) == 0
    assert (tmp_path / "run" / "data" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.architecture.rope_theta=5e5"],  # becomes a part of rope_parameters
        ["model.architecture.rope_scaling={rope_type: linear, factor: 2.0}"],
        [
            "model.architecture={model_type: qwen2, hidden_size: 32, num_attention_heads: 2,"
            " head_dim: 8}"
        ],  # read with a default
        # another name of n_embd
        ["model.architecture={model_type: gpt2, hidden_size: 16, n_head: 2}"],
        # which has no pad_token_id to fill in
        ["model.architecture={model_type: rwkv}", *GIVEN_TOKENIZER],
    ],
)
def test_keys_that_transformers_honours_are_taken_in_an_architecture(overrides, config, given):
    assert (
        main(["data", str(config), *[text.replace("GIVEN", str(given)) for text in overrides]]) == 0
    )


@pytest.mark.parametrize(
    ("override", "cause", "remedy"),
    [
        (
            "data.path=GIVEN/rows.txt",
            "GIVEN/rows.txt: unknown kind of file",
            "Expected .json, .jsonl",
        ),
        ("data.path=owner/name", "owner/name is not a local file", "download it and give its path"),
        (
            "tokenizer.train.vocab_size=90000",
            "cannot be trained",
            "Lower tokenizer.train.vocab_size",
        ),
        ("run.dir=GIVEN/rows.txt", "GIVEN/rows.txt is a file", "Name a folder"),
        (
            "run.dir=GIVEN/rows.txt/run",
            "GIVEN/rows.txt/run cannot be written",
            "Name another folder",
        ),
        (
            "run.dir=GIVEN/tokenizer",
            "GIVEN/tokenizer is not empty and is not a run folder",
            "Name another, or an empty one",
        ),
    ],
)
def test_a_mistake_that_shows_only_later_is_named_with_its_remedy(
    override, cause, remedy, config, given, capsys
):
    said = mistake(capsys, "data", config, override.replace("GIVEN", str(given)))
    assert cause.replace("GIVEN", str(given)) in said and remedy in said


def test_a_foreign_run_folder_is_left_as_it_was(config, given, capsys):
    before = sorted(given.rglob("*"))
    mistake(capsys, "data", config, f"run.dir={given}")
    assert sorted(given.rglob("*")) == before


def test_a_run_folder_on_a_disk_that_takes_nothing_is_one_clear_error(
    config, tmp_path, mounted, capsys
):
    assert "cannot be written: Read-only file system" in mistake(
        capsys, "data", config, f"run.dir={mounted('ro')}/run"
    )
    full = mounted("size=4k")
    said = mistake(capsys, "data", config, f"run.dir={full}/run")
    assert "No space left on device" in said and str(full) in said
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    assert f"{tmp_path / 'dangling'} is a link to {tmp_path / 'nowhere'}" in mistake(
        capsys, "data", config, f"run.dir={tmp_path / 'dangling'}"
    )


def test_a_disk_that_fills_up_anywhere_in_a_stage_is_one_line_with_a_file(config, mounted, capsys):
    found = set()
    for size in (12, 24, 40, 56, 72):
        folder = mounted(f"size={size}k")
        said = mistake(capsys, "data", config, f"run.dir={folder}/run")
        assert "No space left on device" in said and len(said.splitlines()) == 1
        found.add(said.split(": ")[2])
        assert found and all(str(folder.parent) in path for path in found)
    assert len(found) > 2  # it was full at different files


def test_weights_of_another_shape_are_named_when_they_are_loaded_too(given):
    from sftmix.config.schema import ModelConfig
    from sftmix.engine.loading import hf_config, load_source

    start = ModelConfig(path=str(given / "model-with-shape-1"))
    with pytest.raises(
        ConfigError,
        match=r"layers.0.mlp.down_proj.weight has shape \[0\], the model's has \[8, 8\]",
    ):
        load_source(start, hf_config(start), dtype=torch.float32, seed=0)
    start = ModelConfig(path=str(given / "model-cut-at-half"))
    with pytest.raises(ConfigError, match="cannot be loaded: .* Copy or download it again"):
        load_source(start, hf_config(start), dtype=torch.float32, seed=0)


def run_shell(command, *arguments):
    """Runs the command line behind a shell's redirection; returns its exit code and what it
    says."""
    line = f"{sys.executable} -m sftmix.cli {command.format(*map(str, arguments))}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_output_that_nobody_takes_is_no_traceback(config):
    assert run_shell("inspect {} | true", config) == (1, "")
    code, said = run_shell("inspect {} > /dev/full", config)
    assert code == 2 and said.startswith("sftmix: error: stdout: No space left on device")
    assert run_shell("inspect {} >&-", config) == (0, "")


def test_an_error_that_is_a_bug_keeps_its_traceback(config, monkeypatch):
    def bug(config):
        raise KeyError("a")

    monkeypatch.setattr("sftmix.pipeline.preflight.check", bug)
    with pytest.raises(KeyError):
        main(["data", str(config)])


def test_a_finished_run_on_a_disk_that_became_read_only_says_so(config, tmp_path, mounted, capsys):
    said = []

    def prepare(folder):
        assert main(["data", str(config), f"run.dir={folder}/run"]) == 0
        said.append(folder)

    folder = mounted("ro", prepare=prepare)
    assert "Read-only file system" in mistake(
        capsys, "data", config, f"run.dir={folder}/run", "data.max_length=128"
    )


def test_finished_work_of_other_settings_is_refused_with_the_keys_of_the_config(config, capsys):
    assert main(["data", str(config)]) == 0
    for command in ("data", "score", "run"):
        said = mistake(capsys, command, config, "data.max_length=99", "run.seed=7")
        assert (
            "data.max_length: " in said and "99 now" in said and "run.seed: 0 before, 7 now" in said
        )
        assert "--force" in said and "another run.dir" in said
    assert main(["data", str(config), "data.max_length=99", "--force"]) == 0
    assert "data.max_length: 99 before" in mistake(capsys, "data", config)


def test_a_stage_that_is_switched_off_is_not_run(config, capsys):
    assert "Switch it on" in mistake(capsys, "baseline", config, "baseline.enabled=false")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ([], "holds no finished model. Run `sftmix run CONFIG` first"),
        (["--which", "reference"], "expected one of sftmix, baseline"),
    ],
)
def test_there_is_nothing_to_export_before_a_run(options, cause, config, tmp_path, capsys):
    assert cause in mistake(capsys, "export", config, "--to", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_each_of_several_mistakes_has_a_line_of_its_own(config, capsys):
    assert (
        len(mistake(capsys, "data", config, "train.epohcs=1", "log.every_steps=0").splitlines())
        == 2
    )


def test_overrides_count_before_and_behind_an_option(config, capsys):
    assert (
        len(
            mistake(
                capsys, "data", config, "train.epohcs=1", "--force", "log.every_steps=0"
            ).splitlines()
        )
        == 2
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("? [a, b]\n: 1\n", "run.yaml:1: a key is a list or a mapping, expected a word"),
        ("? {a: b}\n: 1\n", "run.yaml:1: a key is a list or a mapping, expected a word"),
        ("run: {dir: 2020-99-99}\n", "not valid YAML: month must be"),
        (f"run: {{seed: 1{'0' * 5000}}}\n", "not valid YAML: Exceeds the limit"),
    ],
)
def test_yaml_that_python_cannot_take_is_one_line(text, cause, config, capsys):
    config.write_text(text)
    assert cause in mistake(capsys, "data", config)


def test_a_missing_config_suggests_one_with_a_near_name(config, capsys):
    assert f"Did you mean {config}?" in mistake(capsys, "run", config.with_name("runn.yaml"))


def test_debug_shows_the_traceback(config):
    with pytest.raises(SftmixError, match="epohcs"):
        main(["data", str(config), "train.epohcs=1", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND is missing. Example: sftmix run quickstart"),
        (["trian", "CONFIG"], "invalid choice: 'trian'"),
        (
            ["run"],
            (
                "error: CONFIG is missing (CONFIG: a YAML file, or a name that `sftmix configs`"
                " lists). Example: sftmix run quickstart"
            ),
        ),
        (["run", "CONFIG", "--fast"], "unrecognized arguments: --fast"),
        (["run", "CONFIG", "train.epochs=1", "--fast", "log.every_steps=1"], "--fast"),
        (
            ["scores", "merge", "table"],
            (
                "--to is missing. Example: sftmix scores merge runs/one/confidence"
                " runs/two/confidence --to runs/both"
            ),
        ),
        (["scores", "merge"], "TABLE and --to are missing"),
        (
            ["export"],
            "CONFIG is missing (CONFIG: a YAML file, or a name that `sftmix configs` lists)",
        ),
        (["scores", "check", "table"], "CONFIG is missing"),
        (["inspect", "CONFIG", "--num", "many"], "invalid int value: 'many'"),
        (["inspect", "CONFIG", "--num", "0"], "--num: 0, expected 1 or more"),
        (["study", "CONFIG", "--jobs", "0"], "--jobs: 0, expected 1 or more"),
    ],
)
def test_a_wrong_command_line_ends_with_usage_and_code_2(arguments, said, config, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(config) if argument == "CONFIG" else argument for argument in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("usage: sftmix") and said in error


def test_a_gpu_without_the_package_triton_is_refused_before_a_run(config, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("sftmix.engine.ranks.has_gpu", lambda: True)
    check(load_config(config, ["engine.precision=fp32"]))
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "triton" else find_spec(name, *more),
    )
    for backend in ("auto", "triton"):
        with pytest.raises(
            SftmixError, match="the package triton is not installed. Run `pip install triton`"
        ):
            check(
                load_config(config, ["engine.precision=fp32", f"engine.kernel_backend={backend}"])
            )
    check(load_config(config, ["engine.precision=fp32", "engine.kernel_backend=torch"]))


def commands(parser, *words):
    """Yields every command with its own parser, those of `scores` too."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not found:
        yield words, parser
    for name, inner in (pair for action in found for pair in action.choices.items()):
        yield from commands(inner, *words, name)


@pytest.mark.parametrize(
    ("words", "parser"),
    list(commands(_parser())),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_example_of_every_command_is_one(words, parser):
    line, _, _file = parser.epilog.removeprefix("Example: sftmix ").partition(" > ")
    example = shlex.split(line)
    assert tuple(example[: len(words)]) == words
    options = _parser().parse_args(example)
    assert packaged(getattr(options, "config", None) or "quickstart")


# Nobody waits for torch to read a help text or the name of a misspelled key.


def modules_loaded_by(code, *arguments):
    """Runs `code` in a fresh interpreter; returns its exit code and the modules that it has
    loaded."""
    script = (
        f"import sys, json\ncode = 0\ntry:\n    {code}\nexcept SystemExit as end:\n    code ="
        " end.code\nprint()\n"
    )
    script += "print(json.dumps([code or 0, sorted(sys.modules)]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(
    "code", ["import sftmix", "import sftmix.cli", "import sftmix.cli; sftmix.cli.main(['--help'])"]
)
def test_help_and_import_load_nothing_heavy(code):
    ended_with, modules = modules_loaded_by(code)
    assert ended_with == 0 and "sftmix" in modules
    assert not modules & {*NEEDED_LATER, "pydantic", "yaml"}


def test_a_mistake_in_the_config_is_reported_without_loading_torch(config):
    config.write_text(config.read_text() + "trian: {}\n")
    code, modules = modules_loaded_by(
        "import sftmix.cli; sys.exit(sftmix.cli.main(['run', sys.argv[1]]))", config
    )
    assert code == 2 and "pydantic" in modules
    assert not modules & set(NEEDED_LATER)


def test_the_probe_of_modules_sees_what_is_loaded():  # the test of the test
    assert "pydantic" in modules_loaded_by("import pydantic")[1]
    assert "pydantic" not in modules_loaded_by("pass")[1]
    assert modules_loaded_by("sys.exit(3)")[0] == 3
