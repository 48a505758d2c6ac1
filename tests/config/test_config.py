"""Every mistake in a config file is one line: where it stands, which key, which value, and what to
do."""

import copy
import itertools
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from processes import ROOT
from pydantic import BaseModel

from sftmix.config.reader import dump_config, load_config
from sftmix.config.schema import Config
from sftmix.errors import ConfigError

BASE = {
    "run": {"dir": "runs/x"},
    "model": {"architecture": {"model_type": "llama"}},
    "tokenizer": {"train": {"vocab_size": 400}},
    "data": {"generator": {"num_train": 10}},
}
MARK = "a-marked-value"


def types_in(annotation):
    """Returns the classes that an annotation is made of, without those of a Literal."""
    if get_origin(annotation) is Literal:
        return set()
    return {annotation}.union(*map(types_in, get_args(annotation)))


def section_in(annotation):
    return next(
        (t for t in types_in(annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None
    )


def walk(model=Config, prefix=()):
    """Yields (key path, field) of every key of the schema; 0 stands for the first item of a list of
    sections."""
    for name, field in model.model_fields.items():
        yield (*prefix, name), field
        section = section_in(field.annotation)
        if section:
            yield from walk(
                section,
                (
                    (*prefix, name, 0)
                    if list[section] in types_in(field.annotation)
                    else (*prefix, name)
                ),
            )


def dotted(path):
    return ".".join(map(str, path))


FIELDS = {dotted(path): (path, field) for path, field in walk()}
NUMBERS = [name for name, (_, field) in FIELDS.items() if {int, float} & types_in(field.annotation)]


def value_for(name, number):
    """Returns the number as the field's value: alone, or for each item of a tuple."""
    return [number, number] if get_origin(FIELDS[name][1].annotation) is tuple else number


def with_value(path, value):
    """Returns BASE with one key set, its sections created where they are missing."""
    tree = whole = copy.deepcopy(BASE)
    for key, following in itertools.pairwise(path):
        tree = tree[0] if key == 0 else tree.setdefault(key, [{}] if following == 0 else {})
    tree[path[-1]] = value
    return whole


def write(folder, content):
    """Writes a config file of text or a dict; returns its path and the `file:line` of MARK in
    it."""
    text = (
        content
        if isinstance(content, str)
        else yaml.safe_dump(content, default_flow_style=None, width=1000)
    )
    file = folder / "run.yaml"
    file.write_text(text)
    return file, next(
        (
            f"{file}:{number}"
            for number, line in enumerate(text.splitlines(), start=1)
            if MARK in line
        ),
        None,
    )


def refusal(file, overrides=()):
    """Returns the lines of the error."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, list(overrides))
    return str(caught.value).splitlines()


def load(folder, content=BASE, overrides=()):
    return load_config(write(folder, content)[0], list(overrides))


def test_the_walk_over_the_schema_reaches_nested_sections():  # the test of the test
    assert {
        "run.dir",
        "data.sources.0.weight",
        "reference.model.path",
        "reference.train.epochs",
    } <= set(FIELDS)
    assert {"train.epochs", "train.adam_betas", "split.confident_share", "data.limit"} <= set(
        NUMBERS
    )
    assert "engine.zero_stage" not in NUMBERS and "run.dir" not in NUMBERS


@pytest.mark.parametrize("name", [name for name, (path, _) in FIELDS.items() if len(path) > 1])
def test_every_key_below_a_section_has_a_description(name):
    assert FIELDS[name][1].description


@pytest.mark.parametrize("name", FIELDS)
def test_a_key_that_is_misspelled_by_a_letter_is_refused_with_place_and_suggestion(tmp_path, name):
    path, _ = FIELDS[name]
    key, middle = path[-1], len(path[-1]) // 2
    for misspelled in (
        key[:middle] + key[middle + 1 :],
        key + key[-1],
        key[:middle] + "z" + key[middle + 1 :],
    ):
        wrong = (*path[:-1], misspelled)
        file, place = write(tmp_path, with_value(wrong, MARK))
        assert f"{place}: `{dotted(wrong)}` is an unknown key. Did you mean `{key}`?" in refusal(
            file
        )


def test_a_key_that_resembles_none_is_refused_with_the_known_keys(tmp_path):
    file, place = write(tmp_path, with_value(("log", "zzz"), MARK))
    assert refusal(file) == [
        f"{place}: `log.zzz` is an unknown key. Known keys here: every_steps, tensorboard,"
        " trackers, project, profile_steps."
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_type_names_place_key_and_value(tmp_path, name):
    path, field = FIELDS[name]
    takes_a_mapping = section_in(field.annotation) or any(
        get_origin(t) is dict for t in types_in(field.annotation)
    )
    value = MARK if takes_a_mapping and get_origin(field.annotation) is not list else {MARK: 1}
    file, place = write(tmp_path, with_value(path, value))
    assert any(line.startswith(f"{place}: `{name}` is {value!r}: ") for line in refusal(file))


@pytest.mark.parametrize("number", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_make_no_sense_are_refused(tmp_path, name, number):
    file, _ = write(tmp_path, with_value(FIELDS[name][0], value_for(name, number)))
    assert any(f"`{name}" in line for line in refusal(file))


@pytest.mark.parametrize("name", [*NUMBERS, "engine.zero_stage"])
def test_yes_is_no_number(tmp_path, name):
    file, _ = write(tmp_path, with_value(FIELDS[name][0], value_for(name, True)))
    assert any(f"`{name}" in line and "True" in line for line in refusal(file))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split.confident_share", 1.01),
        ("data.held_out_share", 2),
        ("train.epochs", 0),
        ("train.epochs", 1.5),
        ("train.batch_size", 0),
        ("train.learning_rate", 0),
        ("train.adam_betas", [0.9]),
        ("train.adam_betas", [0.9, 0.99, 0.999]),
        ("train.adam_betas", [0.9, 1.0]),
        ("train.schedule", "cosin"),
        ("mixup.alpha", 0),
        ("engine.zero_stage", 4),
        ("engine.num_processes", 0),
        ("engine.precision", "fp8"),
        ("data.overlong", "cut"),
        ("tokenizer.train.vocab_size", 256),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, name, value):
    file, _ = write(tmp_path, with_value(FIELDS[name][0], value))
    lines = refusal(file)
    assert len(lines) == 1 and lines[0].startswith(f"{file}:") and f"`{name}" in lines[0]


def test_confident_and_unconfident_examples_must_not_overlap(tmp_path):
    file, _ = write(tmp_path, {**BASE, "split": {"confident_share": 0.6, "unconfident_share": 0.5}})
    [line] = refusal(file)
    assert (
        line.startswith(f"{file}:")
        and "`confident_share` + `unconfident_share` must not exceed 1" in line
    )
    assert (
        load(
            tmp_path, {**BASE, "split": {"confident_share": 0.7, "unconfident_share": 0.3}}
        ).split.confident_share
        == 0.7
    )


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path):
    file, _ = write(
        tmp_path, {**BASE, "train": {"epohcs": 1, "batch_size": 0}, "log": {"every_steps": "x"}}
    )
    lines = refusal(file)
    assert len(lines) == 3 and all(
        any(key in line for line in lines) for key in ("epohcs", "batch_size", "every_steps")
    )


# Files that are no config at all.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "found NoneType"),
        ("# only a comment\n", "found NoneType"),
        ("- run\n", "found list"),
        ("run\n", "found str"),
        ("run:\n  dir: [a\n", "not valid YAML"),
        ("run:\n\tdir: a\n", "not valid YAML"),
        ("run: {}\n---\nrun: {}\n", "not valid YAML"),
        ("run: *nowhere\n", "not valid YAML"),
        ("run: {dir: !!python/name:os.system }\n", "not valid YAML.*python/name"),
        ("run: {dir: !!python/object/apply:os.getcwd []}\n", "not valid YAML.*python/object"),
        ("run: &itself {dir: *itself}\n", "not valid YAML"),
        ("run: " + "[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_in_plain_yaml_is_refused_by_name(tmp_path, text, reason):
    file, _ = write(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}")


def test_a_file_that_does_not_parse_is_refused_with_its_line(tmp_path):
    file, _ = write(tmp_path, "run: {dir: a}\nmodel: {path: ]}\n")
    assert "line 2" in refusal(file)[0]


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"run: {dir: \xff}\n")
    assert refusal(file)[0].startswith(f"{file}: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("run: {dir: a}\nmodel: {path: m}\nrun: {dir: b}\n", "run", 1, 3),
        ("run:\n  dir: a\n  dir: b\n", "run.dir", 2, 3),
        ("data:\n  sources:\n  - path: a\n    path: b\n", "data.sources.0.path", 3, 4),
    ],
)
def test_a_duplicate_key_is_refused_with_both_places(tmp_path, text, key, first, second):
    file, _ = write(tmp_path, text)
    assert refusal(file) == [
        f"{file}:{second}: `{key}` is defined twice (first at {file}:{first}). Remove one."
    ]


def test_a_missing_file_suggests_one_with_a_near_name(tmp_path):
    file, _ = write(tmp_path, BASE)
    [line] = refusal(tmp_path / "rnu.yaml")
    assert line == f"{tmp_path / 'rnu.yaml'}: no such config file. Did you mean {file}?"
    assert "Did you mean" not in refusal(tmp_path / "zzz" / "other.yaml")[0]


@pytest.mark.parametrize("missing", ["run", "model", "data"])
def test_a_missing_section_is_named(tmp_path, missing):
    file, _ = write(tmp_path, {name: section for name, section in BASE.items() if name != missing})
    assert f"`{missing}` is missing" in refusal(file)[0]


# Overrides.


def test_overrides_replace_and_create_fields_and_later_ones_win(tmp_path):
    config = load(
        tmp_path,
        overrides=[
            "train.epochs=2",
            "reference.train.epochs=5",
            "train.epochs=4",
            "mixup={weight: 0.5, alpha: 2}",
        ],
    )
    assert (config.train.epochs, config.reference_train.epochs) == (4, 5)
    assert (config.mixup.weight, config.mixup.alpha) == (0.5, 2)


def test_an_override_without_a_value_clears_the_field(tmp_path):
    config = load(tmp_path, overrides=["model.architecture=", "model.path=m"])
    assert config.model.architecture is None and config.model.path == "m"


def test_an_override_may_hold_an_equals_sign(tmp_path):
    assert load(tmp_path, overrides=["run.dir=a=b"]).run.dir == Path("a=b")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.epochs", "expected `key.sub=value`"),
        ("=3", "expected `key.sub=value`"),
        ("", "expected `key.sub=value`"),
        ("train.epochs=[1", "not valid YAML"),
        ("run.dir=!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("run.dir.name=a", "`run.dir` is a value, not a section"),
        ("train.epohcs=1", "`train.epohcs` is an unknown key. Did you mean `epochs`?"),
        ("tarin.epochs=1", "`tarin` is an unknown key. Did you mean `train`?"),
        ("train={epohcs: 1}", "`train.epohcs` is an unknown key. Did you mean `epochs`?"),
        ("train.epochs=many", "`train.epochs` is 'many'"),
        ("train..epochs=1", "`train.` is an unknown key"),
    ],
)
def test_a_mistake_in_an_override_is_blamed_on_the_override(tmp_path, override, reason):
    file, _ = write(tmp_path, BASE)
    [line] = refusal(file, [override])
    assert line.startswith(f"override `{override}`: ") and reason in line


def test_a_mistake_in_a_replaced_section_is_not_blamed_on_the_file(tmp_path):
    file, _ = write(tmp_path, {**BASE, "train": {"epochs": 2}})
    [line] = refusal(file, ["train={epochs: many}"])
    assert line.startswith("override `train={epochs: many}`: ")


def test_an_override_mends_what_the_file_has_wrong(tmp_path):
    assert (
        load(tmp_path, {**BASE, "train": {"epochs": "many"}}, ["train.epochs=2"]).train.epochs == 2
    )


# What sections say about one another.


def test_the_training_of_the_reference_names_only_what_differs(tmp_path):
    train = {"epochs": 4, "batch_size": 8}
    config = load(tmp_path, {**BASE, "train": train, "reference": {"train": {"epochs": 2}}})
    assert (config.reference_train.epochs, config.reference_train.batch_size) == (2, 8)
    assert load(tmp_path, {**BASE, "train": train}).reference_train.epochs == 4


def test_a_mistake_that_the_reference_inherits_is_reported_once_and_where_it_stands(tmp_path):
    file, place = write(
        tmp_path, {**BASE, "train": {"epochs": MARK}, "reference": {"train": {"batch_size": 8}}}
    )
    [line] = refusal(file)
    assert line.startswith(f"{place}: `train.epochs` is")


def test_the_reference_has_the_targets_model_unless_it_names_its_own(tmp_path):
    assert load(tmp_path).reference_model == load(tmp_path).model
    assert (
        load(tmp_path, {**BASE, "reference": {"model": {"path": "small"}}}).reference_model.path
        == "small"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=m"], "`model`: give exactly one of `path` .* and `architecture`"),
        (["model.architecture="], "`model`: give exactly one of `path` .* and `architecture`"),
        (["model.architecture={hidden_size: 8}"], "`model`: `architecture` needs a `model_type`"),
        (["reference.model={}"], "`reference.model`: give exactly one of"),
        (["data.path=d"], "`data`: give exactly one of `path`, `sources` and `generator`"),
        (["data.generator="], "`data`: give exactly one of `path`, `sources` and `generator`"),
        (
            ["data.generator=", "data.path=d", "data.sources=[{path: e}]"],
            "`data`: give exactly one of",
        ),
        (["tokenizer.path=t"], "`tokenizer`: give `path` or `train`, not both"),
        (
            ["tokenizer.train="],
            "`tokenizer`: a model with random weights needs `tokenizer.path` or `tokenizer.train`",
        ),
    ],
)
def test_exactly_one_source_is_wanted(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "tokenizer"),
    [
        (["model={path: m}", "tokenizer={}"], "m"),
        (["model={path: m}", "tokenizer={path: t}"], "t"),
        (["model={path: m}"], None),
        (["tokenizer={path: t}"], "t"),
    ],
)
def test_the_tokenizer_is_the_models_unless_another_is_named_or_trained(
    tmp_path, overrides, tokenizer
):
    assert load(tmp_path, overrides=overrides).tokenizer_source == tokenizer


def test_the_path_of_the_data_is_short_for_one_source(tmp_path):
    short = load(tmp_path, overrides=["data={path: d, format: qa, columns: {question: q}}"])
    long = load(
        tmp_path, overrides=["data={sources: [{path: d, format: qa, columns: {question: q}}]}"]
    )
    assert short.data.all_sources == long.data.all_sources != []


# Reading and writing.


@pytest.mark.parametrize("text", ["2e-6", "2E-6", "2.0e-6", "0.000002", "+2e-06"])
def test_scientific_notation_is_a_number_with_and_without_a_dot(tmp_path, text):
    content = yaml.safe_dump(BASE) + f"train:\n  learning_rate: {text}\n"
    assert load(tmp_path, content).train.learning_rate == 2e-6
    assert load(tmp_path, overrides=[f"train.learning_rate={text}"]).train.learning_rate == 2e-6


def test_scientific_notation_is_a_number_in_an_architecture_too(tmp_path):
    content = {
        **BASE,
        "model": {
            "architecture": {"model_type": "llama", "rms_norm_eps": "EPS", "rope": {"theta": "EPS"}}
        },
    }
    text = yaml.safe_dump(content).replace("EPS", "1e-5")
    architecture = load(tmp_path, text).model.architecture
    assert (
        architecture["rms_norm_eps"],
        architecture["rope"]["theta"],
        architecture["model_type"],
    ) == (1e-5, 1e-5, "llama")


EVERYTHING = """
run: {dir: runs/a b, seed: 7}
model: {path: owner/name, revision: "1e5", trust_remote_code: true, attn_implementation: eager}
tokenizer: {path: "2024-01-01", chat_template: "no"}
data:
  sources:
  - {path: "0x10", format: qa, columns: {question: "on", answer: "null"}, split: test, weight: 0.5}
  - {path: "# b"}
  limit: 10
  overlong: drop
reference:
  model:
    architecture: {model_type: llama, hidden_size: 8, rope: {theta: 1.0e+4, kinds: [a, 1, null]}}
  train: {adam_betas: [0.8, 0.9], adam_eps: 1e-9}
  num_checkpoints: 2
split: {confident_share: 0.1, unconfident_share: 0.3}
train: {learning_rate: 3e-7, schedule: linear}
engine: {zero_stage: 1, deepspeed: ds.json, kernel_backend: reference}
"""


@pytest.mark.parametrize(
    "text",
    [
        EVERYTHING,
        yaml.safe_dump(BASE),
        *[p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))],
    ],
)
def test_a_dumped_config_loads_as_an_equal_one(tmp_path, text):
    config = load(tmp_path, text)
    assert load(tmp_path, dump_config(config)) == config


def test_configs_that_differ_are_not_equal(tmp_path):  # the test of the test
    assert load(tmp_path, overrides=["train.learning_rate=1e-3"]) != load(tmp_path)


def test_a_config_cannot_be_changed_after_it_was_checked(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).train.epochs = 0
