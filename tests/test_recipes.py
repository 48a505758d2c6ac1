"""Every recipe loads and would start, has the model it says, and that model's architecture trains
when shrunk. Nothing is downloaded."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import ROOT, run_ranks
from tokenizers_for_tests import character_tokenizer
from transformers import AutoModelForCausalLM

from sftmix.config.deepspeed_json import deepspeed_config
from sftmix.config.reader import dump_config, load_config
from sftmix.config.schema import ModelConfig
from sftmix.data.template import ALPACA
from sftmix.engine.deepspeed_internals import check_zero_section, import_deepspeed
from sftmix.engine.loading import check_context, empty_model, hf_config
from sftmix.engine.lora import num_adapter_parameters, target_names
from sftmix.errors import ConfigError
from sftmix.pipeline.preflight import check

CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
LORA_RECIPES = [path for path in RECIPES if path.stem.endswith("-lora")]
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
DEEPSPEED = sorted((CONFIGS / "deepspeed").glob("*.json"))
ARCHITECTURES = {
    p.stem: json.loads(p.read_text()) for p in sorted((CONFIGS / "architectures").glob("*.json"))
}

# Elements in the safetensors files of the model on the Hub, as its page shows them.
PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "llama3.1-8b": 8_030_261_248,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma2-9b": 9_241_705_984,
    "phi4": 14_659_507_200,
    "llama3.3-70b": 70_553_706_496,
}


def stem(path):
    return path.stem


def architecture_of(config):
    """Returns the architecture of the model that a config names."""
    return ARCHITECTURES[
        next(
            p.stem
            for p in MODELS
            if yaml.safe_load(p.read_text())["model"]["path"] == config.model.path
        )
    ]


# Loading.


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_loads_and_dumps_without_its_bases(path, tmp_path):
    config = load_config(path)
    assert config.run.dir == Path("runs") / path.stem
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert (
        "base" not in yaml.safe_load(dump_config(config))
        and load_config(tmp_path / "config.yaml") == config
    )


@pytest.mark.parametrize(("model", "data"), list(itertools.product(MODELS, DATA)), ids=stem)
def test_every_model_and_data_make_a_recipe_of_three_lines(model, data, tmp_path):
    bases = [str(CONFIGS / "bases/paper.yaml"), str(model), str(data)]
    (tmp_path / "run.yaml").write_text(f"base: {json.dumps(bases)}\nrun:\n  dir: runs/x\n")
    config = load_config(tmp_path / "run.yaml")
    check_context(
        hf_config(ModelConfig(architecture=architecture_of(config))),
        max_length=config.data.max_length,
        name="model",
    )


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipes_have_the_hyper_parameters_that_the_paper_states(path):
    config = load_config(path)
    for train in (config.train, config.reference_train):
        assert (train.weight_decay, train.batch_size) == (0.1, 32)
        assert (
            1e-4 <= train.learning_rate <= 2e-4
            if path in LORA_RECIPES
            else train.learning_rate == 2e-6
        )
        assert (train.schedule, train.warmup_ratio) == ("cosine", 0.1)
        assert train.epochs == (1 if "ultrachat" in path.stem or "tulu3" in path.stem else 3)
    assert (
        config.mixup.weight,
        config.mixup.alpha,
        config.split.confident_share,
        config.split.unconfident_share,
    ) == (0.2, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_every_recipe_passes_the_checks_before_a_run(path, monkeypatch):
    """With its real sizes and DeepSpeed JSON; the models' architectures and generated data stand
    for what has to be downloaded."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    stand_ins = [
        "model.path=",
        f"model.architecture={json.dumps(architecture_of(config))}",
        "tokenizer={train: {vocab_size: 400}}",
    ]
    if config.reference.model is not None:
        name = Path(config.reference.model.path).name.lower()
        stand_ins.append(f"reference.model={{architecture: {json.dumps(ARCHITECTURES[name])}}}")
    check(
        load_config(
            path,
            [
                *stand_ins,
                "data.path=",
                "data.sources=[]",
                "data.format=auto",
                "data.generator={num_train: 10}",
            ],
        )
    )


def test_a_context_that_is_too_short_would_be_noticed(monkeypatch):  # the test of the test
    with pytest.raises(ConfigError, match="the context of model is 8,192 tokens"):
        check_context(
            hf_config(ModelConfig(architecture=ARCHITECTURES["gemma2-9b"])),
            max_length=8193,
            name="model",
        )


def test_recipes_with_adapters_are_overlays_of_one_base():
    assert [path.stem for path in LORA_RECIPES] == [
        "llama3.1-8b-alpaca-lora",
        "llama3.3-70b-alpaca-lora",
        "qwen2.5-14b-alpaca-lora",
    ]
    for path in RECIPES:
        config = load_config(path)
        assert config.reference_model.lora == config.model.lora
        assert (config.model.lora is not None) == (path in LORA_RECIPES)
    for path in LORA_RECIPES:
        config, full = (
            load_config(path),
            load_config(path.with_stem(path.stem.removesuffix("-lora"))),
        )
        assert (
            config.model.model_copy(update={"lora": None}) == full.model
            and config.data == full.data
        )
        assert (
            config.train.model_copy(update={"learning_rate": 2e-6}) == full.train
            and config.mixup == full.mixup
        )


def test_the_weak_reference_reads_the_targets_tokens():
    config = load_config(CONFIGS / "recipes/qwen2.5-14b-alpaca-weak-reference.yaml")
    assert (
        config.reference_model.path == "Qwen/Qwen2.5-1.5B"
        and config.model.path == "Qwen/Qwen2.5-14B"
    )
    assert config.tokenizer_source == config.model.path and config.confidence.has_reference


def test_a_table_of_scores_stands_in_for_the_reference_run():
    scores = load_config(CONFIGS / "recipes/gemma-2b-alpaca.yaml")
    config = load_config(CONFIGS / "recipes/llama3.1-8b-alpaca-scored-by-gemma-2b.yaml")
    assert (
        config.confidence.scores == str(scores.run.dir / "confidence")
        and not config.confidence.has_reference
    )
    # the same examples are held out
    assert scores.data == config.data and scores.run.seed == config.run.seed
    assert (
        scores.tokenizer.chat_template == config.tokenizer.chat_template
        and scores.engine.precision == config.engine.precision
    )


# DeepSpeed's files.


@pytest.mark.parametrize("path", DEEPSPEED, ids=stem)
def test_every_deepspeed_json_is_read_by_deepspeed(path):
    config = load_config(RECIPES[0], [f"engine.deepspeed={path}"])
    settings = deepspeed_config(
        config, precision="bf16", world_size=1, max_grad_norm=config.train.max_grad_norm
    )
    check_zero_section(settings["zero_optimization"], str(path))
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(settings)
    assert (
        parsed.zero_optimization_stage == 3
        and parsed.bfloat16_config.enabled
        and parsed.grad_accum_dtype == "fp32"
    )
    assert (parsed.zero_config.offload_optimizer is not None) == (path.stem == "zero3_offload")
    assert (parsed.zero_config.zero_hpz_partition_size > 1) == (
        path.stem in ("zero3_hierarchical", "zero3_plus_plus")
    )
    is_quantised = path.stem == "zero3_plus_plus"
    assert (
        parsed.zero_config.zero_quantized_weights
        == parsed.zero_config.zero_quantized_gradients
        == is_quantised
    )
    # DeepSpeed's kernel reads gradients as float16, whatever they are: bf16 ones would be read as
    # other numbers.
    assert parsed.communication_data_type == (torch.float16 if is_quantised else None)


# Models.


def test_every_model_has_an_architecture_and_a_published_count():
    assert [p.stem for p in MODELS] == sorted(ARCHITECTURES) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config(ModelConfig(architecture=ARCHITECTURES[name])), dtype=torch.bfloat16
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PUBLISHED[name], rel=1e-3)
    said = f"{PUBLISHED[name] / 1e9:.2f} B parameters"
    assert said in (CONFIGS / f"models/{name}.yaml").read_text(), (
        f"configs/models/{name}.yaml does not say {said}"
    )


def test_the_tables_of_memory_are_those_of_plans(monkeypatch):
    """Computed by benchmarks/recipe_memory.py, with what the package says of each model."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipe_memory

    content = json.loads((ROOT / "benchmarks/results/recipe_memory.json").read_text())
    page = (ROOT / "docs/recipes.md").read_text()
    for table in recipe_memory.tables(content):
        assert table in page
    rows = {row["model"]: row for row in content["rows"]}
    assert set(rows) == set(PUBLISHED)
    for name, row in rows.items():
        assert row["parameters"] == pytest.approx(PUBLISHED[name], rel=1e-3)
        assert row.get("adapters") in (None, adapters_of(name)[0])
        # between 1 and 128 GPUs the states are shared: 18 bytes a parameter, and no more
        shared = 18 * row["parameters"] * (1 - 1 / 128) / 2**30
        assert row["zero3"]["1"] - row["zero3"]["128"] == pytest.approx(shared, rel=0.03), name


def adapters_of(name):
    """Returns the number of parameters of the adapters that configs/bases/lora.yaml gives a model,
    and of modules that have one."""
    lora = load_config(LORA_RECIPES[0]).model.lora
    model = empty_model(
        ModelConfig(architecture=ARCHITECTURES[name]),
        hf_config(ModelConfig(architecture=ARCHITECTURES[name])),
    )
    return num_adapter_parameters(model, lora, name=name), len(target_names(model, lora, name=name))


def test_adapters_are_counted():
    """32 layers of queries and outputs (4096 to 4096), keys and values (4096 to 1024), and three of
    the MLP (4096 to 14336)."""
    expected = (32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432), 32 * 7)
    assert adapters_of("mistral-7b") == adapters_of("llama3.1-8b") == expected


def shrunk(architecture):
    """Returns it with two layers and few, small heads; their grouping, what is tied, capped, biased
    or routed is kept."""
    heads, groups = (
        architecture["num_attention_heads"],
        architecture["num_attention_heads"] // architecture["num_key_value_heads"],
    )
    is_wider = architecture.get("head_dim", 0) * heads > architecture["hidden_size"]
    few = groups if architecture["num_key_value_heads"] == 1 else 2 * groups
    small = {
        "hidden_size": 8 * few,
        "intermediate_size": 24 * few // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": few,
    }
    small |= {"num_key_value_heads": few // groups, "vocab_size": 128}
    small |= {
        key: 1 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in architecture
    }
    if "head_dim" in architecture:
        small["head_dim"] = 16 if is_wider else 8
    if "num_experts" in architecture:
        small |= {"num_experts": 16, "moe_intermediate_size": 12}
    if "max_window_layers" in architecture:
        small["max_window_layers"] = 2
    return architecture | small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two steps of every architecture, shrunk, have shown: all in one process, as the stages
    of a run are."""
    folder = tmp_path_factory.mktemp("recipes")
    character_tokenizer(chat_template=ALPACA).save_pretrained(folder / "tokenizer")
    described = {
        name: {"architecture": shrunk(a), "lora": None, "zero_stage": 3}
        for name, a in ARCHITECTURES.items()
    }
    for path in LORA_RECIPES:
        config = load_config(path)
        lora = config.model.lora.model_dump(mode="json")
        described[path.stem] = {
            "architecture": shrunk(architecture_of(config)),
            "lora": lora,
            "zero_stage": config.engine.zero_stage,
        }
    (folder / "architectures.json").write_text(json.dumps(described))
    # the others need a compiler or a GPU
    files = [CONFIGS / f"deepspeed/{name}.json" for name in ("zero3_hierarchical", "zero3")]
    # one of them twice running
    arguments = (folder / "architectures.json", folder, folder / "found.json", *files, files[0])
    run_ranks(Path(__file__).parent / "support/recipes_worker.py", 1, *map(str, arguments))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shrunk_model_trains_two_steps(trained, name):
    found, architecture = trained[name], ARCHITECTURES[name]
    config = hf_config(ModelConfig(architecture=architecture))
    assert found["is_finite"] and found["unmoved"] == []
    first, second = (sum(row[0] for row in found["losses"][step : step + 2]) for step in (0, 2))
    assert second < first  # the same batch again
    assert all(row[1] > 0 for row in found["losses"])
    assert found["is_tied"] == config.tie_word_embeddings
    assert found["scale"] is None
    cap = architecture.get("final_logit_softcapping")
    assert found["softcap"] == (None if cap is None else pytest.approx(cap, rel=1e-5))
    assert all((row[2] > 0) == ("num_experts" in architecture) for row in found["losses"])
    assert any(part.endswith("q_proj.bias") for part in found["names"]) == (
        architecture["model_type"] == "qwen2"
    )
    assert any(part.endswith("q_norm.weight") for part in found["names"]) == architecture[
        "model_type"
    ].startswith("qwen3")


@pytest.mark.distributed
@pytest.mark.parametrize("path", LORA_RECIPES, ids=stem)
def test_a_shrunk_model_trains_its_adapters_for_two_steps(trained, path):
    found, config = trained[path.stem], load_config(path)
    settings = ModelConfig(architecture=shrunk(architecture_of(config)))
    model = empty_model(settings, hf_config(settings))
    assert found["is_finite"] and found["num_trained"] == num_adapter_parameters(
        model, config.model.lora, name="model"
    )
    first, second = (sum(row[0] for row in found["losses"][step : step + 2]) for step in (0, 2))
    assert second < first  # the same batch again
    moved = set(found["names"]) - set(found["unmoved"])  # of the merged weights
    assert moved == {
        f"{name}.weight" for name in target_names(model, config.model.lora, name="model")
    }
