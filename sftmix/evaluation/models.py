"""Models by the names that users give: what `chat`, `tasks` and `answers` load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.data.tokenizer import NOT_LOADED, tokenizer_from, why_not_loaded, with_template
from sftmix.engine.loading import quiet_transformers
from sftmix.engine.vision import auto_class
from sftmix.errors import ConfigError
from sftmix.evaluation.held_out import MODEL_NAMES
from sftmix.storage.files import sha256_of_file
from sftmix.storage.provenance import fingerprint

FOLDERS = {"baseline": "baseline/model", "train": "sftmix/model"}  # of a run, by stage
PURPOSE = "Give a Hugging Face folder, a finished run folder, or a Hub name."


@dataclass(frozen=True)
class NamedModel:
    """A model to measure. name: in tables. source: its folder, or its name on the Hub."""

    name: str
    source: str

    @property
    def file_name(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", self.name).strip("-.") or "model"


def is_run_folder(name: str) -> bool:
    """Returns whether a name is the folder of a run that has trained a model."""
    folder = Path(name)
    return not (folder / "config.json").is_file() and any(
        (folder / inside).is_dir() for inside in FOLDERS.values()
    )


def folder_of(name: str) -> str:
    """Returns the folder of a run's SFTMix model; other names as they are. Raises ConfigError for a
    folder that holds no model."""
    folder = Path(name)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return name
    inside = folder / FOLDERS["train"]
    if inside.is_dir():
        return str(inside)
    raise ConfigError(
        f"{name} holds neither a model (config.json) nor a finished run (sftmix/model). {PURPOSE}"
    )


def models_of(names: list[str]) -> list[NamedModel]:
    """Returns the models of names; a run folder stands for its baseline and its SFTMix model.

    Raises ConfigError for a folder that holds no model, and for two models of one name.
    """
    found: list[NamedModel] = []
    for name in names:
        if is_run_folder(name):
            prefix = f"{name}: " if len(names) > 1 else ""
            found += [
                NamedModel(prefix + MODEL_NAMES[stage], str(Path(name) / inside))
                for stage, inside in FOLDERS.items()
                if (Path(name) / inside).is_dir()
            ]
        else:
            found.append(NamedModel(name, folder_of(name)))
    taken: dict[str, NamedModel] = {}
    for model in found:
        other = taken.setdefault(model.file_name, model)
        if other is not model:
            raise ConfigError(
                f"{other.name} and {model.name} would share the files {model.file_name}. Name each"
                " model once; a link of another name tells two folders apart."
            )
    return found


def digest_of(source: str) -> str:
    """Returns what tells the content of a model: a SHA-256 over its files, model card aside; of a
    name on the Hub its commit.

    Raises ConfigError for a name that is neither a folder nor on the Hub.
    """
    from transformers.utils.hub import cached_file

    folder = Path(source)
    if folder.is_dir():
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"
        )
        return fingerprint({str(path.relative_to(folder)): sha256_of_file(path) for path in files})
    try:
        config = cached_file(source, "config.json")
    except NOT_LOADED as error:
        raise not_a_model(source, error) from None
    return Path(str(config)).parent.name


def not_a_model(source: str, error: Exception) -> ConfigError:
    """Returns the error for a name that transformers cannot load."""
    return ConfigError(f"{source} cannot be loaded: {why_not_loaded(source, error)} {PURPOSE}")


def load_for_generation(source: str) -> tuple[Any, Any]:
    """Returns tokenizer and model of a folder or a Hub name, in the precision of its files, on the
    GPU where there is one.

    Raises ConfigError for what transformers cannot load, and for a tokenizer without a template.
    """
    import torch
    from transformers import AutoConfig

    tokenizer = with_template(tokenizer_from(source), None)
    try:
        with quiet_transformers():
            loader = auto_class(AutoConfig.from_pretrained(source))
            model: Any = loader.from_pretrained(source, dtype="auto")
    except NOT_LOADED as error:
        raise not_a_model(source, error) from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval()
    return tokenizer, model


def sampling_of(temperature: float | None) -> dict[str, Any]:
    """Returns the arguments of transformers' `generate` for a temperature: 0 is greedy; None leaves
    the model's own generation settings."""
    if temperature is None:
        return {}
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
