"""The DeepSpeed JSON: nothing in it is ignored silently, and nothing in it contradicts the
YAML."""

import json

import pytest

from sftmix.config.deepspeed_json import KNOWN_KEYS, deepspeed_config, read_deepspeed_json
from sftmix.config.schema import Config
from sftmix.engine.deepspeed_internals import import_deepspeed
from sftmix.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
DECIDED_BY_THE_YAML = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "scheduler": {"type": "WarmupLR"},
}


def write(folder, content):
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def complete(file=None, *, zero_stage=3, precision="fp32", world_size=1, max_grad_norm=1.0):
    """Returns the complete DeepSpeed config of a run that builds on `file`."""
    values = {
        "run": {"dir": "x"},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "engine": {"zero_stage": zero_stage, "deepspeed": file},
    }
    return deepspeed_config(
        Config.model_validate(values),
        precision=precision,
        world_size=world_size,
        max_grad_norm=max_grad_norm,
    )


def refusal(folder, content, **settings):
    """Returns the error; it names the file."""
    file = write(folder, content)
    with pytest.raises(ConfigError) as caught:
        complete(file, **settings)
    assert str(file) in str(caught.value)
    return str(caught.value)


def parse_by_deepspeed(content):
    """Returns DeepSpeed's own reading of a config, outside any process group."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(content)


# The file.


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimizaton", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("bf_16", "bf16"),
        ("step_per_print", "steps_per_print"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path, key, meant):
    message = refusal(tmp_path, {key: {}})
    assert f"`{key}` is not a DeepSpeed key" in message and message.endswith(
        f"Did you mean `{meant}`?"
    )


def test_an_unknown_key_that_resembles_none_is_refused(tmp_path):
    assert refusal(tmp_path, {"qqq": 1}).endswith("Remove it.")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"bf16": {}, "fp16": {}, "bf16": {}}', "bf16"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "stage"),
    ],
)
def test_a_duplicate_key_is_refused_at_any_depth(tmp_path, text, key):
    assert f"`{key}` is defined twice" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["", '{"bf16": {}', "{'bf16': {}}", '{"bf16": {}} // comment', '{"bf16": {},}']
)
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    assert "not valid JSON" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["[]", "3", '"bf16"', "null"])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    assert "expected a JSON object" in refusal(tmp_path, text)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_bytes(b'{"bf16": "\xff"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_deepspeed_json(file)


@pytest.mark.parametrize("place", ["missing.json", "folder", "ds.json/inside.json"])
def test_a_path_that_holds_no_file_is_refused_by_name(tmp_path, place):
    write(tmp_path, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="engine.deepspeed") as caught:
        read_deepspeed_json(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


@pytest.mark.parametrize("value", [True, None, 3, "on", []])
@pytest.mark.parametrize("key", ["zero_optimization", "bf16", "fp16", "data_types"])
def test_a_section_that_is_no_object_is_refused(tmp_path, key, value):
    assert f"`{key}` is {value!r}" in refusal(tmp_path, {key: value})


# Against the YAML.


@pytest.mark.parametrize("key", DECIDED_BY_THE_YAML)
def test_what_the_yaml_decides_is_refused_unless_auto(tmp_path, key):
    message = refusal(tmp_path, {key: DECIDED_BY_THE_YAML[key]})
    assert f"`{key}` is set here" in message and "train." in message
    assert complete(write(tmp_path, {key: "auto"})) == complete()


@pytest.mark.parametrize(
    ("content", "settings", "theirs", "ours"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            {},
            "zero_optimization.stage is 2",
            "engine.zero_stage is 3",
        ),
        (
            {"zero_optimization": {"stage": "3"}},
            {},
            "zero_optimization.stage is '3'",
            "engine.zero_stage is 3",
        ),
        (
            {"zero_optimization": {"stage": True}},
            {"zero_stage": 1},
            "zero_optimization.stage is True",
            "engine.zero_stage is 1",
        ),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5", "train.max_grad_norm is 1.0"),
        (
            {"gradient_clipping": True},
            {},
            "gradient_clipping is True",
            "train.max_grad_norm is 1.0",
        ),
        (
            {"gradient_clipping": None},
            {},
            "gradient_clipping is None",
            "train.max_grad_norm is 1.0",
        ),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is True", "engine.precision (fp32)"),
        (
            {"bf16": {"enabled": False}},
            {"precision": "bf16"},
            "bf16.enabled is False",
            "engine.precision (bf16)",
        ),
        (
            {"fp16": {"enabled": True}},
            {"precision": "bf16"},
            "fp16.enabled is True",
            "engine.precision (bf16)",
        ),
        (
            {"fp16": {"enabled": 1}},
            {"precision": "fp16"},
            "fp16.enabled is 1",
            "engine.precision (fp16)",
        ),
        # DeepSpeed's older name, which it ignores beside bf16
        ({"bfloat16": {"enabled": True}}, {}, "bfloat16", "bf16"),
    ],
)
def test_a_contradiction_names_both_sides(tmp_path, content, settings, theirs, ours):
    message = refusal(tmp_path, content, **settings)
    assert theirs in message and ours in message


def test_what_agrees_with_the_yaml_or_says_auto_is_filled_alike(tmp_path):
    settings = {"zero_stage": 2, "precision": "bf16", "max_grad_norm": 0.5}
    said = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    left = {
        "zero_optimization": {"stage": "auto"},
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {},
    }
    assert (
        complete(write(tmp_path, said), **settings)
        == complete(write(tmp_path, left), **settings)
        == complete(**settings)
    )


def test_without_a_file_the_yaml_decides_everything():
    content = complete(zero_stage=1, precision="fp16", world_size=4, max_grad_norm=2.0)
    assert content["zero_optimization"]["stage"] == 1 and content["gradient_clipping"] == 2.0
    assert (content["bf16"]["enabled"], content["fp16"]["enabled"]) == (False, True)
    assert (
        content["train_batch_size"]
        == 4 * content["train_micro_batch_size_per_gpu"] * content["gradient_accumulation_steps"]
    )
    assert content["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu"}}},
        {"fp16": {"initial_scale_power": 12}},
        {"steps_per_print": 5},
        {"wall_clock_breakdown": True},
        {"comms_logger": {"enabled": True}},
    ],
)
def test_what_the_yaml_does_not_decide_passes_unchanged(tmp_path, content):
    completed = complete(write(tmp_path, content))
    for key, value in content.items():
        assert completed[key] == (completed[key] | value if isinstance(value, dict) else value)


# Against DeepSpeed itself.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_reads_what_the_yaml_says(zero_stage, precision):
    parsed = parse_by_deepspeed(
        complete(zero_stage=zero_stage, precision=precision, max_grad_norm=0.5)
    )
    assert (parsed.zero_optimization_stage, parsed.gradient_clipping, parsed.grad_accum_dtype) == (
        zero_stage,
        0.5,
        "fp32",
    )
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (
        precision == "bf16",
        precision == "fp16",
    )


def test_the_template_that_people_bring_is_read(tmp_path):
    """`auto` wherever the Hugging Face trainer's template for ZeRO-3 says it."""
    buckets = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        "auto",
    )
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            **buckets,
        },
        "gradient_clipping": "auto",
        "steps_per_print": 1e5,
        **dict.fromkeys(DECIDED_BY_THE_YAML, "auto"),
    }
    parsed = parse_by_deepspeed(complete(write(tmp_path, content), precision="bf16"))
    assert (
        parsed.zero_optimization_stage == 3
        and parsed.zero_config.overlap_comm
        and parsed.bfloat16_config.enabled
    )


class Recorded(dict):
    """A dict that remembers which of its keys were asked for."""

    asked: set[str]

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):  # `key in config.keys()`
        return self

    def __copy__(self):  # DeepSpeed reads from a copy
        return self


def refused_as_removed(key):
    """Whether DeepSpeed refuses the key because the feature is gone."""
    try:
        parse_by_deepspeed({"train_batch_size": 1, key: {}})
    except Exception as error:  # most keys want another value than {}
        return "has been removed" in str(error)
    return False


@pytest.fixture
def keys_of_deepspeed(monkeypatch):
    """The top-level keys that DeepSpeed asks for when it parses a config, as one rank of a
    group."""
    import_deepspeed()
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda *_: 1)
    content = Recorded(train_batch_size=1)
    content.asked = set()
    parse_by_deepspeed(content)
    return content.asked


def test_the_record_of_keys_is_of_the_top_level_alone(keys_of_deepspeed):  # the test of the test
    assert {
        "train_batch_size",
        "zero_optimization",
        "bf16",
        "wandb",
        "compile",
        "timers",
    } <= keys_of_deepspeed
    assert not {"stage", "enabled", "overlap_comm"} & keys_of_deepspeed


def test_every_known_key_is_one_that_deepspeed_reads(keys_of_deepspeed):
    assert sorted(KNOWN_KEYS - keys_of_deepspeed) == []


def test_no_known_key_is_one_that_deepspeed_has_removed():
    assert sorted(filter(refused_as_removed, KNOWN_KEYS)) == []


def test_every_key_that_deepspeed_reads_is_known(keys_of_deepspeed):
    assert (
        sorted(key for key in keys_of_deepspeed - KNOWN_KEYS if not refused_as_removed(key)) == []
    )


def test_only_removed_keys_count_as_removed():  # the test of the test
    assert (
        refused_as_removed("sparse_attention")
        and not refused_as_removed("zero_optimization")
        and not refused_as_removed("optimizer")
    )
