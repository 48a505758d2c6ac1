"""The card (README.md) of an exported model or adapter: metadata for the Hub, how it was made,
results, and how to use it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sftmix import __version__
from sftmix.batches.images import has_processor
from sftmix.config.schema import Config, LoraConfig
from sftmix.errors import counted
from sftmix.storage import provenance
from sftmix.storage.files import read_record, write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

STAGE_OF = {"sftmix": "train", "baseline": "baseline"}  # of the model's folder in the run folder
LICENSE_KEYS = ("license", "license_name", "license_link")
METRICS = {  # of `evaluation/metrics.json`: the Hub's type of the metric, and its name
    "loss_nats_per_token": ("loss", "Loss (nats per response token)"),
    "perplexity": ("perplexity", "Perplexity"),
    "exact_match": ("exact_match", "Exact match (greedy decoding)"),
}
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".xz", ".zst")
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/")  # of the Hub's cache
UNKNOWN = "unknown"  # the Hub's word for an unstated license

SNIPPET = """from transformers import {imports}

name = "."  # this folder, or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = {loader}.from_pretrained(name{options})
messages = [{{"role": "user", "content": "Name three primary colours."}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(
    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def model_card(
    config: Config, which: str, *, is_adapter: bool = False, metrics: dict[str, Any] | None = None
) -> ModelCard:
    """Returns the card of a trained model, or of its adapter alone.

    which: sftmix or baseline. metrics: the model's part of `evaluation/metrics.json`; None before
    it is evaluated.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_mixup, lora = which == "sftmix", config.model.lora
    base = base_model(config.model.path)
    source = config.tokenizer_source
    reads_images = source is not None and has_processor(source)
    task = "image-text-to-text" if reads_images else "text-generation"
    license_of_base: dict[str, Any] | None = _license_of(config.model.path, base)
    data = ModelCardData(
        model_name=f"{config.run.dir.resolve().name}-{which}{'-adapter' if is_adapter else ''}",
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=["sft", "sftmix", *(["lora"] if is_adapter else [])],
        base_model=base,
        datasets=[source.path for source in config.data.all_sources if _is_hub_name(source.path)]
        or None,
        eval_results=_eval_results(config, metrics),
        **(license_of_base or {"license": UNKNOWN}),
    )
    title = ("SFTMix model" if is_mixup else "Next-token prediction baseline") + (
        ", LoRA adapter" if is_adapter else ""
    )
    parts = [
        f"# {title}",
        (
            _method(config)
            if is_mixup
            else (
                "Instruction-tuned with next-token prediction alone, in the data order of the"
                " SFTMix run beside it."
            )
        ),
        "## How to use it",
        _usage(config, task, is_adapter=is_adapter),
        *(["## Results", _results(metrics)] if metrics else []),
        "## How it was made",
        "\n".join(f"- {line}" for line in _facts(config, lora, base, is_adapter=is_adapter)),
        "## License",
        _license_text(data, license_of_base),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def write_model_card(
    folder: Path,
    config: Config,
    which: str,
    *,
    is_adapter: bool = False,
    metrics: dict[str, Any] | None = None,
) -> None:
    """Writes the card as README.md into a folder."""
    write_text(
        folder / "README.md", str(model_card(config, which, is_adapter=is_adapter, metrics=metrics))
    )


def base_model(path: str | None) -> str | None:
    """Returns the Hub name of the model that training started from; None if it has none or it is
    unknown.

    The origin of a local folder is found from its place in the Hub's cache, from config.json
    (`_name_or_path`), or from its card (`base_model`).
    """
    if path is None:
        return None
    if not Path(path).is_dir():
        return path if _is_hub_name(path) else None
    if snapshot := _SNAPSHOT.search(f"{Path(path).resolve()}/"):
        return snapshot[1].replace("--", "/", 1)
    named = [
        _read_config(Path(path)).get("_name_or_path"),
        _metadata_of(path, None).get("base_model"),
    ]
    return next((name for name in named if isinstance(name, str) and _is_hub_name(name)), None)


def _is_hub_name(name: str) -> bool:
    """Returns whether this is a name on the Hub, and not a local path, existing or not."""
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not Path(name).exists()
        and Path(name).suffix not in _FILES
    )


def _read_config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return read_record(folder / "config.json") or {}
    return {}


def _metadata_of(path: str | None, base: str | None) -> dict[str, Any]:
    """Returns the metadata of the card of a local folder, else of a model on the Hub; nothing if
    there is no card."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    readme = Path(path) / "README.md" if path is not None else None
    cards: list[Path | str | None] = [readme if readme and readme.is_file() else None, base]
    for source in [card for card in cards if card is not None]:
        # no connection, no card, or not a card
        with contextlib.suppress(OSError, ValueError, HfHubHTTPError, yaml.YAMLError):
            return ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    return {}


def _license_of(path: str | None, base: str | None) -> dict[str, str] | None:
    """Returns the license keys of the base model's card, or the license of its config.json; None if
    neither states one."""
    metadata = _metadata_of(path, base)
    if not isinstance(metadata.get("license"), str) or metadata["license"] == UNKNOWN:
        stated = _read_config(Path(path)).get("license") if path is not None else None
        return {"license": stated} if isinstance(stated, str) else None
    found = {key: str(metadata[key]) for key in LICENSE_KEYS if metadata.get(key)}
    if base is not None and "license_link" in found and "://" not in found["license_link"]:
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{found['license_link']}"
    return found


def _license_text(data: ModelCardData, license_of_base: dict[str, str] | None) -> str:
    if license_of_base is None:
        return (
            "Unknown: the model that training started from states none. The licenses of the base"
            " model and of the data apply."
        )
    return (
        f"{data.license}, as the card of the base model states. The license of the data applies as"
        " well."
    )


def _eval_results(config: Config, metrics: dict[str, Any] | None) -> list[EvalResult] | None:
    from huggingface_hub import EvalResult

    if not metrics:
        return None
    names = [
        source.path if _is_hub_name(source.path) else Path(source.path).name
        for source in config.data.all_sources
    ]
    dataset: dict[str, Any] = {
        "dataset_name": f"held-out examples of {', '.join(names) or 'generated toy skills'}",
        "dataset_type": names[0] if len(names) == 1 and _is_hub_name(names[0]) else "held-out",
    }
    return [
        EvalResult(
            task_type="text-generation",
            metric_type=kind,
            metric_name=name,
            metric_value=metrics[key],
            **dataset,
        )
        for key, (kind, name) in METRICS.items()
    ]


def _results(metrics: dict[str, Any]) -> str:
    lines = [
        f"On {counted(metrics['num_examples'], 'held-out example')}, one seed:",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {metrics[key]:.4f} |" for key, (_, name) in METRICS.items()),
    ]
    return "\n".join(lines)


def _usage(config: Config, task: str, *, is_adapter: bool) -> str:
    if is_adapter and config.model.path is None:
        return (
            "The weights beside this adapter were random, and no model holds them. Use the merged"
            " model."
        )
    loader = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    if task == "image-text-to-text" and not is_adapter:
        loader = "AutoModelForImageTextToText"
    imports = (
        f"AutoTokenizer\nfrom peft import {loader}" if is_adapter else f"{loader}, AutoTokenizer"
    )
    options = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    return f"```python\n{SNIPPET.format(imports=imports, loader=loader, options=options)}```"


def _method(config: Config) -> str:
    mixup = config.mixup
    where = (
        ", interpolated at the input embeddings (an ablation)"
        if mixup.site == "input_embeddings"
        else ""
    )
    return (
        "Instruction-tuned with [SFTMix](https://arxiv.org/abs/2410.05248): next-token prediction"
        f" + {mixup.weight} x Mixup, lam ~ Beta({mixup.alpha}, {mixup.alpha}){where}."
    )


def _facts(
    config: Config, lora: LoraConfig | None, base: str | None, *, is_adapter: bool
) -> list[str]:
    start = (
        config.model.path
        or f"random weights ({(config.model.architecture or {}).get('model_type')})"
    )
    if config.model.path is not None and base != config.model.path:
        start = f"{Path(config.model.path).name}, a local folder" + (f" of {base}" if base else "")
    sources = ", ".join(
        source.path if _is_hub_name(source.path) else Path(source.path).name
        for source in config.data.all_sources
    )
    train = config.train
    return [
        f"start: {start}",
        f"data: {sources or 'generated toy skills'}",
        (
            f"{train.epochs} epoch{'' if train.epochs == 1 else 's'}, {train.batch_size} examples"
            f" per step, AdamW, peak learning rate {train.learning_rate:g} ({train.schedule}),"
            f" weight decay {train.weight_decay:g}"
        ),
        *([_lora_line(lora, is_adapter=is_adapter)] if lora is not None else []),
        (
            f"seed {config.run.seed}; made by sftmix {__version__}, commit"
            f" {provenance.commit() or 'unknown'}"
        ),
    ]


def _lora_line(lora: LoraConfig, *, is_adapter: bool) -> str:
    targets = (
        lora.target_modules
        if isinstance(lora.target_modules, str)
        else ", ".join(lora.target_modules)
    )
    how = "this is the adapter alone" if is_adapter else "merged into the weights"
    return (
        f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {targets}; {how}"
    )
