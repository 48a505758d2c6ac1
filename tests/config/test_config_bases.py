"""A config laid over others: what wins, what is cleared, and where an error says that a key
stands."""

from pathlib import Path

import pytest
import yaml

from sftmix.config.reader import dump_config, load_config
from sftmix.errors import ConfigError

WHOLE = """
run: {dir: runs/base, seed: 3}
model: {path: owner/base}
data:
  sources:
    - {path: a}
    - {path: b}
train: {epochs: 4, batch_size: 8}
"""


def write(folder, **files):
    """Writes `name.yaml` files, `__` for a folder; returns the folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def load(folder, name="run", overrides=()):
    return load_config(folder / f"{name}.yaml", list(overrides))


def refusal(folder, name="run", overrides=()):
    with pytest.raises(ConfigError) as caught:
        load(folder, name, overrides)
    return str(caught.value).splitlines()


def test_mappings_merge_key_by_key_and_lists_and_scalars_are_replaced(tmp_path):
    config = load(
        write(
            tmp_path,
            base=WHOLE,
            run="base: base.yaml\ntrain: {epochs: 1}\ndata: {sources: [{path: c}]}\n",
        )
    )
    assert (config.train.epochs, config.train.batch_size, config.run.seed) == (1, 8, 3)
    assert [source.path for source in config.data.sources] == ["c"]


def test_of_several_bases_the_later_wins_and_the_file_itself_wins_over_all(tmp_path):
    write(tmp_path, one=WHOLE, two="train: {epochs: 5, batch_size: 16}\nrun: {seed: 5}\n")
    config = load(write(tmp_path, run="base: [one.yaml, two.yaml]\ntrain: {epochs: 6}\n"))
    assert (config.train.epochs, config.train.batch_size, config.run.seed) == (6, 16, 5)
    assert load(write(tmp_path, run="base: [two.yaml, one.yaml]\n")).train.epochs == 4


def test_bases_have_bases_each_found_beside_the_file_that_names_it(tmp_path):
    write(tmp_path, far__base=WHOLE, far__near__middle="base: ../base.yaml\ntrain: {epochs: 7}\n")
    config = load(write(tmp_path, run="base: far/near/middle.yaml\nrun: {seed: 9}\n"))
    assert (config.train.epochs, config.train.batch_size, config.run.seed) == (7, 8, 9)
    write(tmp_path, other__run=f"base: {tmp_path / 'run.yaml'}\n")
    assert load(tmp_path, "other/run") == config


def test_a_base_that_two_files_share_does_not_undo_the_first(tmp_path):
    write(
        tmp_path,
        shared=WHOLE,
        model="base: shared.yaml\ntrain: {epochs: 9}\n",
        data="base: shared.yaml\ndata: {limit: 10}\n",
    )
    config = load(write(tmp_path, run="base: [model.yaml, data.yaml]\n"))
    assert (config.train.epochs, config.data.limit) == (9, 10)


@pytest.mark.parametrize(
    "cleared",
    [
        "model: {path: null, architecture: {model_type: llama}}",
        "model: {path: , architecture: {model_type: llama}}",
    ],
)
def test_null_clears_a_value(tmp_path, cleared):
    config = load(
        write(
            tmp_path,
            base=WHOLE,
            run=(
                f"base: base.yaml\n{cleared}\ntokenizer: {{path: t}}\ndata: {{sources: null, path:"
                " d}\n"
            ),
        )
    )
    assert config.model.path is None and config.data.path == "d"


def test_null_clears_a_section_back_to_its_defaults(tmp_path):
    write(
        tmp_path,
        base=WHOLE + "reference: {model: {path: small}}\n",
        middle="base: base.yaml\ntrain: null\nreference: {model: null}\n",
    )
    config = load(write(tmp_path, run="base: middle.yaml\ntrain: {batch_size: 2}\n"))
    assert (config.train.epochs, config.train.batch_size, config.reference.model) == (3, 2, None)


def test_null_stays_a_value_inside_an_architecture(tmp_path):
    base = (
        WHOLE.replace(
            "{path: owner/base}", "{architecture: {model_type: mistral, sliding_window: 4096}}"
        )
        + "tokenizer: {path: t}\n"
    )
    config = load(
        write(
            tmp_path,
            base=base,
            run="base: base.yaml\nmodel: {architecture: {sliding_window: null}}\n",
        )
    )
    assert config.model.architecture == {"model_type": "mistral", "sliding_window": None}


def test_what_files_share_by_an_anchor_is_changed_in_one_place_only(tmp_path):
    text = WHOLE.replace("train: {", "train: &t {") + "reference: {train: *t}\n"
    config = load(
        write(tmp_path, base=text, run="base: base.yaml\nreference: {train: {epochs: 1}}\n")
    )
    assert (config.train.epochs, config.reference_train.epochs) == (4, 1)


def test_overrides_win_over_every_file(tmp_path):
    config = load(
        write(tmp_path, base=WHOLE, run="base: base.yaml\ntrain: {epochs: 1}\n"),
        overrides=["train.epochs=2", "run.seed=1"],
    )
    assert (config.train.epochs, config.run.seed, config.train.batch_size) == (2, 1, 8)


def test_the_dumped_config_needs_no_other_file(tmp_path):
    config = load(write(tmp_path, a__base=WHOLE, run="base: a/base.yaml\n"))
    assert "base" not in yaml.safe_load(dump_config(config))
    assert load(write(tmp_path, b__dumped=dump_config(config)), "b/dumped") == config


# Errors name the file and the line in which the key stands.


@pytest.mark.parametrize("wrong", ["epohcs: 1", "epochs: many", "epochs: 0"])
@pytest.mark.parametrize("where", ["base", "run"])
def test_a_mistake_is_blamed_on_the_file_and_line_where_it_stands(tmp_path, where, wrong):
    files = {"base": WHOLE.replace("train: {epochs: 4, ", "train: {"), "run": "base: base.yaml\n"}
    files[where] = files[where].replace("train: {batch_size: 8}", "") + f"train:\n  {wrong}\n"
    line = next(n for n, text in enumerate(files[where].splitlines(), start=1) if wrong in text)
    [message] = refusal(write(tmp_path, **files))
    assert message.startswith(f"{tmp_path / where}.yaml:{line}: `train.{wrong.partition(':')[0]}`")


def test_a_mistake_that_is_replaced_or_cleared_is_none(tmp_path):
    write(tmp_path, base=WHOLE.replace("epochs: 4", "epochs: many") + "log: {every_steps: never}\n")
    assert (
        load(write(tmp_path, run="base: base.yaml\ntrain: {epochs: 2}\nlog: null\n")).train.epochs
        == 2
    )


def test_a_mistake_inside_a_list_that_was_replaced_is_blamed_on_the_new_list(tmp_path):
    [message] = refusal(
        write(
            tmp_path,
            base=WHOLE,
            run="base: base.yaml\ndata:\n  sources:\n    - {path: c, wieght: 2}\n",
        )
    )
    assert message.startswith(f"{tmp_path}/run.yaml:4: `data.sources.0.wieght`")


@pytest.mark.parametrize(
    "other", ["  sources:\n    - {format: qa}\n", "  sources: [{}]\n", "  sources: nowhere\n"]
)
def test_what_a_replaced_list_held_is_blamed_for_nothing(tmp_path, other):
    messages = refusal(write(tmp_path, base=WHOLE, run=f"base: base.yaml\ndata:\n{other}"))
    assert all(
        message.startswith(f"{tmp_path}/run.yaml:") and "`data.sources" in message
        for message in messages
    )


def test_settings_of_two_files_that_contradict_each_other_are_blamed_on_the_later_section(tmp_path):
    write(tmp_path, base=WHOLE + "split: {confident_share: 0.7, unconfident_share: 0.3}\n")
    [message] = refusal(write(tmp_path, run="base: base.yaml\nsplit: {unconfident_share: 0.5}\n"))
    assert message.startswith(f"{tmp_path}/run.yaml:2: `split`") and "must not exceed 1" in message


def test_clearing_an_unknown_key_is_refused(tmp_path):
    [message] = refusal(write(tmp_path, base=WHOLE, run="base: base.yaml\nevalution: null\n"))
    assert (
        message
        == f"{tmp_path}/run.yaml:2: `evalution` is an unknown key. Did you mean `evaluation`?"
    )


def test_a_section_missing_from_all_files_is_blamed_on_the_file_that_was_asked_for(tmp_path):
    [message] = refusal(
        write(tmp_path, base="model: {path: m}\ndata: {path: d}\n", run="base: base.yaml\n")
    )
    assert message.startswith(f"{tmp_path}/run.yaml: `run` is missing")


def test_a_key_that_stands_twice_in_a_base_is_refused_there(tmp_path):
    [message] = refusal(
        write(tmp_path, base="run: {dir: a}\nrun: {dir: b}\n", run="base: base.yaml\n")
    )
    assert message.startswith(f"{tmp_path}/base.yaml:2: `run` is defined twice")


@pytest.mark.parametrize("text", ["- a\n", "run: [\n", ""])
def test_a_base_that_is_no_config_is_refused_by_its_name(tmp_path, text):
    assert refusal(write(tmp_path, base=text, run="base: base.yaml\n"))[0].startswith(
        f"{tmp_path}/base.yaml: "
    )


def test_a_missing_base_is_refused_where_it_is_named_with_the_nearest_name(tmp_path):
    write(
        tmp_path,
        models__mistral="model: {path: m}\n",
        run="run: {dir: x}\nbase: [models/mistrel.yaml]\n",
    )
    assert refusal(tmp_path) == [
        f"{tmp_path}/run.yaml:2: `base` names models/mistrel.yaml, but there is no file"
        f" {tmp_path}/models/mistrel.yaml. Did you mean {tmp_path}/models/mistral.yaml?"
    ]
    write(tmp_path, sub__x="base: ../zzz\n", run="base: sub/x.yaml\n")
    assert refusal(tmp_path)[0].startswith(
        f"{tmp_path}/sub/x.yaml:1: `base` names ../zzz, but there is no file {tmp_path}/zzz. "
    )


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"run": "run"}, "run -> run"),
        ({"run": "a", "a": "b", "b": "run"}, "run -> a -> b -> run"),
        ({"run": "a", "a": "b", "b": "a"}, "a -> b -> a"),
    ],
)
def test_bases_that_go_in_a_circle_are_refused_with_the_circle(tmp_path, files, circle):
    write(tmp_path, **{name: f"base: {base}.yaml\n" for name, base in files.items()})
    named = " -> ".join(f"{tmp_path}/{name}.yaml" for name in circle.split(" -> "))
    closing = circle.split(" -> ")[-2]
    assert refusal(tmp_path) == [
        f"{tmp_path}/{closing}.yaml:1: `base` goes in a circle: {named}. Remove one of these."
    ]


@pytest.mark.parametrize(
    "value", ["3", "", "null", "[]", "{a: b}", "[a.yaml, 3]", "['']", "''", "true"]
)
def test_a_base_that_is_no_path_is_refused(tmp_path, value):
    [message] = refusal(write(tmp_path, a=WHOLE, run=f"base: {value}\n"))
    assert (
        message.startswith(f"{tmp_path}/run.yaml:1: `base` is ")
        and "expected the path of a YAML file" in message
    )


def test_base_is_no_override_and_no_key_of_a_section(tmp_path):
    write(tmp_path, run=WHOLE)
    [message] = refusal(tmp_path, overrides=["base=other.yaml"])
    assert (
        message
        == "override `base=other.yaml`: `base` belongs into a file, where it names the files that"
        " it builds on. Remove it here."
    )
    assert "`train.base` is an unknown key" in refusal(tmp_path, overrides=["train.base=x"])[0]
    assert "Did you mean `base`?" in refusal(write(tmp_path, run=WHOLE + "bases: x.yaml\n"))[0]


def test_a_base_through_a_link_to_a_folder_is_found_where_the_link_leads(tmp_path):
    write(
        tmp_path,
        real__shared=WHOLE,
        real__sub__run="base: ../shared.yaml\n",
        shared="run: {dir: wrong}\n",
    )
    (tmp_path / "link").symlink_to(tmp_path / "real/sub")
    assert load_config(tmp_path / "link/run.yaml").run.dir == Path("runs/base")
