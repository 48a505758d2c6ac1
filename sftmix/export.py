"""Exported models: the card that goes with one, and verified copies elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from sftmix import __version__, artifacts
from sftmix.config import Config, LoraConfig
from sftmix.errors import ArtifactError, ConfigError
from sftmix.wording import counted

MODELS = ("sftmix", "baseline")  # as their folders in the run folder are called


def write_model_card(folder: Path, config: Config, *, objective: str, is_adapter: bool = False) -> None:
    """Writes README.md with the metadata that the Hub reads, and how the model, or the adapter alone, was made."""
    is_mixup, lora = objective == "sftmix", config.model.lora
    library, tags = ("peft", ["sft", "sftmix", "lora"]) if is_adapter else ("transformers", ["sft", "sftmix"])
    metadata: dict[str, object] = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if config.model.path is not None and not Path(config.model.path).exists():
        metadata["base_model"] = config.model.path
    start = config.model.path or f"random weights ({(config.model.architecture or {}).get('model_type')})"
    sources = ", ".join(Path(source.path).name for source in config.data.all_sources) or "generated toy skills"
    train = config.train
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        "# " + ("SFTMix model" if is_mixup else "Next-token prediction baseline") + (", LoRA adapter" if is_adapter else ""),
        "",
        "Instruction-tuned with "
        + (
            f"SFTMix (https://arxiv.org/abs/2410.05248): next-token prediction + {config.mixup.weight} x Mixup, "
            f"lam ~ Beta({config.mixup.alpha}, {config.mixup.alpha})"
            + (", interpolated at the input embeddings (an ablation)." if config.mixup.site == "input_embeddings" else ".")
            if is_mixup
            else "next-token prediction alone, in the data order of the SFTMix run beside it."
        ),
        "",
        f"- start: {start}",
        f"- data: {sources}",
        f"- {counted(train.epochs, 'epoch')}, {counted(train.batch_size, 'example')} per step, AdamW, "
        f"peak learning rate {train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}",
        *([_lora_line(lora, is_adapter=is_adapter)] if lora is not None else []),
        f"- seed {config.run.seed}; made by sftmix {__version__}, commit {artifacts.commit() or 'unknown'}",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _lora_line(lora: LoraConfig, *, is_adapter: bool) -> str:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    how = "this is the adapter alone" if is_adapter else "merged into the weights"
    return f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {targets}; {how}"


def export(config: Config, *, which: str, to: Path, adapter: bool = False) -> Path:
    """Copies a verified exported model, or its LoRA adapter alone, to `to`, which must not exist or be empty. Returns `to`.

    Raises ArtifactError where the model is not there or damaged, ConfigError for a target that is in use.
    """
    if which not in MODELS:
        raise ConfigError(f"--which is {which!r}; expected one of {', '.join(MODELS)}.")
    folder = config.run.dir / which
    if artifacts.read_manifest(folder) is None:
        raise ArtifactError(f"{folder} holds no finished model. Run `sftmix run CONFIG` first.")
    artifacts.verify(folder)
    source = folder / ("adapter" if adapter else "model")
    if not source.is_dir():
        raise ArtifactError(
            f"--adapter: {folder} holds no adapter, since all weights were trained. Leave --adapter out, or set model.lora."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: {to} exists and is not an empty folder. Name another.")
    shutil.copytree(source, to, dirs_exist_ok=True)
    return to
