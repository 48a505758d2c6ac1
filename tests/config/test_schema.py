"""The JSON schema that editors check configs with."""

import json

import pytest
import yaml

from sftmix.cli import main
from sftmix.config.shipped import CONFIGS, json_schema

FILES = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not {"studies", "scaling"} & set(path.relative_to(CONFIGS).parts)
]


def unknown(value, schema, definitions, where=""):
    """Returns the keys of a config that the schema does not have."""
    options = [schema, *schema.get("anyOf", ())]
    options = [definitions.get(o.get("$ref", "").rpartition("/")[2], o) for o in options]
    if isinstance(value, list):
        items = next((o["items"] for o in options if "items" in o), {})
        return [key for item in value for key in unknown(item, items, definitions, where)]
    if not isinstance(value, dict):
        return []
    if any(o.get("additionalProperties") not in (None, False) for o in options):
        return []  # a mapping of any keys, such as an architecture
    properties = {key: part for o in options for key, part in o.get("properties", {}).items()}
    found = [f"{where}.{key}" for key in value if key not in properties]
    for key, part in value.items():
        if key in properties:
            found += unknown(part, properties[key], definitions, f"{where}.{key}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_the_schema_knows_every_key_of_the_shipped_configs(path):
    schema = json_schema()
    assert unknown(yaml.safe_load(path.read_text()), schema, schema["$defs"]) == []


def test_the_schema_finds_a_wrong_key():  # the test of the test
    schema = json_schema()
    config = {"base": "quickstart", "train": {"epochs": 1, "epoch": 1}, "data": {"pth": "x"}}
    assert unknown(config, schema, schema["$defs"]) == [".train.epoch", ".data.pth"]


def test_the_command_prints_it(capsys):
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
