"""Exported models: the card that the Hub reads and whose snippet runs, files that others can read,
and only the config's own model."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from stub_hub import stub_hub
from tokenizers_for_tests import character_tokenizer

from sftmix.cli import main
from sftmix.config.reader import dump_config, load_config
from sftmix.data.template import ALPACA
from sftmix.errors import ArtifactError, ConfigError
from sftmix.evaluation.model_cards import base_model, model_card
from sftmix.pipeline.export import export
from sftmix.pipeline.order import stages_of
from sftmix.storage import artifacts
from sftmix.storage.failures import explain

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
METRICS = {
    "baseline": {
        "num_examples": 7,
        "loss_nats_per_token": 2.5,
        "perplexity": 12.25,
        "exact_match": 0.125,
    },
    "train": {
        "num_examples": 7,
        "loss_nats_per_token": 1.5,
        "perplexity": 4.5,
        "exact_match": 0.25,
    },
}


def write_base(folder, *, card=None, name_or_path=None):
    """Writes a model's folder with its tokenizer, as it could have come from the Hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(folder)
    character_tokenizer(chat_template=ALPACA).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    if name_or_path is not None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": name_or_path}))


@pytest.fixture
def make_run(tmp_path):
    """Returns a function that makes a config, and a run folder as a finished run of it leaves it,
    without any training."""

    def make(*overrides, base=None, with_adapter=False):
        write_base(tmp_path / "base", **(base or {}))
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(9))
        )
        file = tmp_path / "run.yaml"
        file.write_text(
            f"run: {{dir: {tmp_path / 'run'}}}\nmodel: {{path: {tmp_path / 'base'}}}\ndata: {{path:"
            f" {tmp_path / 'rows.jsonl'}}}\n" + "engine: {precision: fp32}\n"
        )
        config = load_config(file, list(overrides))
        mask = os.umask(0o077)  # as the run that made them
        try:
            fill_run_folder(config, tmp_path / "base", with_adapter=with_adapter)
        finally:
            os.umask(mask)
        return file, config

    return make


def fill_run_folder(config, base, *, with_adapter):
    config.run.dir.mkdir()
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    digests = {}
    for stage in stages_of(config):
        if stage.name == "report":
            continue
        inputs = {name: digests[name] for name in stage.reads}
        folder = config.run.dir / stage.folder
        with artifacts.publish(
            folder, stage=stage.name, settings=stage.settings(config), inputs=inputs
        ) as staging:
            (staging / "made.txt").write_text(stage.name)
            if stage.name == "evaluate":
                (staging / "metrics.json").write_text(json.dumps(METRICS))
            if stage.name in ("baseline", "train"):
                write_base(staging / "model")
            if with_adapter and stage.name == "train":
                write_adapter(base, staging / "adapter")
        digests[stage.name] = artifacts.read_manifest(folder).digest


def write_adapter(base, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def run_snippet(folder):
    """Runs the card's Python block beside the model; returns what it prints."""
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("which", ["sftmix", "baseline"])
def test_the_card_parses_with_results_and_its_snippet_runs(which, make_run, tmp_path):
    _, config = make_run(
        base={"name_or_path": "owner/base", "card": "---\nlicense: apache-2.0\n---\n"}
    )
    folder = export(config, which=which, to=tmp_path / "out")
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.library_name, data.datasets) == (
        "owner/base",
        "apache-2.0",
        "transformers",
        None,
    )
    expected = METRICS["train" if which == "sftmix" else "baseline"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "loss": expected["loss_nats_per_token"],
        "perplexity": expected["perplexity"],
        "exact_match": expected["exact_match"],
    }
    assert (
        all("rows.jsonl" in result.dataset_name for result in data.eval_results)
        and "On 7 held-out examples" in card.text
    )
    assert (
        data.model_name == f"run-{which}"
        and str(tmp_path) not in (folder / "README.md").read_text()
    )
    run_snippet(folder)


def test_the_adapters_card_names_peft_and_its_snippet_runs(make_run, tmp_path):
    _, config = make_run("model.lora={rank: 2, target_modules: [q_proj]}", with_adapter=True)
    folder = export(config, which="sftmix", to=tmp_path / "out", adapter=True)
    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.library_name == "peft"
        and "lora" in card.data.tags
        and "AutoPeftModelForCausalLM" in card.text
    )
    run_snippet(folder)


def test_the_card_of_an_adapter_without_a_base_promises_nothing(make_run, tmp_path):
    make_run()
    overrides = [
        "model.path=",
        f"model.architecture={json.dumps(LLAMA)}",
        "tokenizer.train={}",
        "model.lora={}",
    ]
    config = load_config(tmp_path / "run.yaml", overrides)
    assert (
        "```" not in model_card(config, "sftmix", is_adapter=True).text
        and "```python" in model_card(config, "sftmix").text
    )


def test_what_nobody_states_is_unknown_and_not_guessed(make_run, tmp_path):
    _, config = make_run()
    card = ModelCard.load(export(config, which="sftmix", to=tmp_path / "out") / "README.md")
    assert (
        card.data.license == "unknown"
        and card.data.base_model is None
        and "states none" in card.text
    )


def test_a_model_that_is_not_evaluated_has_no_results(make_run, tmp_path):
    _, config = make_run()
    artifacts.discard(config.run.dir / "evaluation")
    card = ModelCard.load(export(config, which="sftmix", to=tmp_path / "out") / "README.md")
    assert card.data.eval_results is None and "Results" not in card.text


def test_figures_of_another_model_are_not_this_ones(make_run, tmp_path):
    _, config = make_run()
    evaluation = config.run.dir / "evaluation"
    manifest = json.loads((evaluation / "manifest.json").read_text())
    manifest["inputs"]["train"] = "of an earlier training"
    (evaluation / "manifest.json").write_text(json.dumps(manifest))
    assert (
        ModelCard.load(
            export(config, which="sftmix", to=tmp_path / "out") / "README.md"
        ).data.eval_results
        is None
    )
    assert (
        ModelCard.load(
            export(config, which="baseline", to=tmp_path / "two") / "README.md"
        ).data.eval_results
        is not None
    )


def test_a_license_of_the_bases_own_keeps_its_name_and_link(make_run, tmp_path):
    stated = (
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model:"
        " owner/ancestor\n---\n"
    )
    _, config = make_run(base={"card": stated})
    data = ModelCard.load(export(config, which="sftmix", to=tmp_path / "out") / "README.md").data
    assert (data.base_model, data.license, data.license_name) == ("owner/ancestor", "other", "own")
    assert data.license_link == "https://huggingface.co/owner/ancestor/blob/main/LICENSE"


def test_hub_names_are_named_and_paths_are_not(make_run, tmp_path):
    make_run()
    sources = [
        {"path": name}
        for name in ("owner/name", str(tmp_path / "rows.jsonl"), "gone.jsonl", "../other/data")
    ]
    hub = load_config(
        tmp_path / "run.yaml",
        ["data.path=", f"data.sources={json.dumps(sources)}", "model.path=owner/base"],
    )
    data = model_card(hub, "sftmix").data
    assert (data.datasets, data.base_model) == (["owner/name"], "owner/base")
    assert base_model(str(tmp_path / "gone")) is None and base_model(None) is None


@pytest.mark.parametrize(
    ("folder", "name"), [("models--owner--a.b-c", "owner/a.b-c"), ("models--gpt2", "gpt2")]
)
def test_a_folder_of_the_hubs_cache_is_known_by_its_place(folder, name, tmp_path):
    snapshot = tmp_path / folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"_name_or_path": "owner/ancestor"}')
    assert base_model(str(snapshot)) == name


@pytest.mark.parametrize("text", ["{", "[1]", '{"_name_or_path": "/a/b"}', '{"_name_or_path": 3}'])
def test_a_base_whose_files_say_nothing_useful_has_no_name(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "README.md").write_text("---\nbase_model: [a, b]\nlicense: {x\n---\n")
    assert base_model(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("mask", "modes"), [(0o022, (0o755, 0o644)), (0o007, (0o770, 0o660)), (0o077, (0o700, 0o600))]
)
def test_exported_files_have_the_users_own_modes(mask, modes, make_run, tmp_path):
    file, config = make_run("model.lora={rank: 2, target_modules: [q_proj]}", with_adapter=True)
    (config.run.dir / "sftmix" / "model" / "inner").mkdir(mode=0o700)  # a folder in the folder
    private = config.run.dir / "sftmix" / "model" / "model.safetensors"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600  # the test of the test
    command = ["export", str(file), "model.lora={rank: 2, target_modules: [q_proj]}"]
    before = os.umask(mask)
    try:
        for number, more in enumerate(([], ["--adapter"])):
            assert main([*command, "--to", str(tmp_path / "new" / f"out{number}"), *more]) == 0
    finally:
        os.umask(before)
    for to in (tmp_path / "new").iterdir():
        found = {path.is_dir(): set() for path in [to, *to.rglob("*")]}
        for path in [to, *to.rglob("*")]:
            found[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
        assert found == {True: {modes[0]}, False: {modes[1]}}


def test_a_push_has_what_the_folder_has(make_run, tmp_path, monkeypatch, capsys):
    file, _ = make_run()
    target = tmp_path / "out"
    with stub_hub(monkeypatch) as hub:
        assert main(["export", str(file), "--push", "me/model", "--to", str(target)]) == 0
        assert capsys.readouterr().out == f"{hub.url}/me/model\n"
        repository = hub.repositories["model", "me/model"]
    del repository.files[".gitattributes"]
    assert repository.private and repository.files == {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("mixup.weight=0.5", "mixup.weight: 0.2 before, 0.5 now"),
        ("train.epochs=9", "train.epochs: 3 before, 9 now"),
        ("run.seed=4", "  run.seed: 0 before, 4 now"),
        ("data.max_length=64", "data.max_length: 2048 before, 64 now"),
        ("split.confident_share=0.25", "split.confident_share: 0.5 before, 0.25 now"),
        ("engine.precision=bf16", 'engine.precision: "fp32" before, "bf16" now'),
        ("tokenizer.chat_template=chatml", 'tokenizer.chat_template: nothing before, "chatml" now'),
        ("reference.train.epochs=1", "reference.train.epochs: 3 before, 1 now"),
        ("confidence.mode=live", 'confidence.mode: "checkpoints" before, "live" now'),
    ],
)
def test_a_model_that_the_config_does_not_describe_is_refused(override, line, make_run, tmp_path):
    file, config = make_run()
    with pytest.raises(ArtifactError, match="made with other settings") as raised:
        export(load_config(file, [override]), which="sftmix", to=tmp_path / "out")
    assert line in str(raised.value) and f"sftmix export {config.run.dir / 'config.yaml'}" in str(
        raised.value
    )
    assert not (tmp_path / "out").exists()
    # the remedy works
    export(load_config(config.run.dir / "config.yaml"), which="sftmix", to=tmp_path / "out")


@pytest.mark.parametrize(
    "override",
    [
        "engine.zero_stage=1",
        "engine.precision=auto",
        "log.every_steps=3",
        "evaluation.micro_batch_tokens=9",
    ],
)
def test_what_changes_no_model_is_no_reason_to_refuse(override, make_run, tmp_path):
    file, _ = make_run()
    export(load_config(file, [override]), which="sftmix", to=tmp_path / "out")


def test_sources_that_are_gone_or_edited_do_not_matter_any_more(make_run, tmp_path):
    _, config = make_run()
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "config.json").unlink()
    export(config, which="sftmix", to=tmp_path / "out")


def test_a_baseline_that_is_switched_off_is_not_exported_in_its_name(make_run, tmp_path):
    file, _ = make_run()
    with pytest.raises(ConfigError, match="baseline.enabled is false in this config"):
        export(load_config(file, ["baseline.enabled=false"]), which="baseline", to=tmp_path / "out")


def test_a_full_disk_during_the_copy_names_the_file(make_run, mounted):
    _, config = make_run()
    full = mounted("size=8k")
    with pytest.raises(OSError, match="No space left on device") as raised:
        export(config, which="sftmix", to=full / "out")
    assert str(explain(raised.value)).startswith(f"{full / 'out'}") and "MiB free" in str(
        explain(raised.value)
    )
    assert not (full / "out").exists()
