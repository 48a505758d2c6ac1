"""Checks that need no process group and no pass over the data, so that bad input is refused within
seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.config.reader import load_config
from sftmix.config.schema import Config, ModelConfig
from sftmix.errors import ArtifactError, ConfigError, counted, first_line
from sftmix.storage.artifacts import MANIFEST, verify

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TRAIN_TARGET = ("baseline", "train")  # stages


def check(config: Config, *, has_device: bool = True) -> None:
    """Raises ConfigError or DataError for the first thing that would stop the run later.

    Checks: paths, formats and column mappings of the sources; the DeepSpeed JSON; model folders,
    shapes of weights, architectures; attention; the target modules of adapters; the tokenizer, its
    size compared with the embedding, and its chat template; maximum length compared with the
    context. has_device: whether the run computes on this machine, so that a requested GPU must be
    present.
    """
    from sftmix.config.deepspeed_json import deepspeed_config
    from sftmix.data.files import find_files
    from sftmix.data.formats import check_format, columns_of
    from sftmix.data.template import choose_template
    from sftmix.engine.deepspeed_internals import check_zero_section
    from sftmix.engine.loading import hf_config
    from sftmix.engine.precision import check_device_computes_in, resolve_precision
    from sftmix.engine.ranks import has_gpu
    from sftmix.train.trackers import check_installed

    for source in config.data.all_sources:
        find_files(source)
        check_format(source.format, columns_of(source))
    precision = resolve_precision(config.engine.precision)
    if has_device:
        check_device_computes_in(precision)
    if config.engine.zero_stage == 0 and precision != "fp32":
        raise ConfigError(
            f"engine.zero_stage is 0 and the precision {precision}: DeepSpeed would sum the"
            " gradients of the micro-batches in that precision. Use engine.zero_stage=1, which"
            " sums them in float32, or engine.precision=fp32."
        )
    if config.engine.kernel_backend == "triton" and has_device and not has_gpu():
        raise ConfigError(
            "engine.kernel_backend is triton, which needs a GPU, and there is none here. Use auto"
            " or torch."
        )
    needs_triton = config.engine.kernel_backend in ("auto", "triton") and has_device and has_gpu()
    if needs_triton and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"engine.kernel_backend is {config.engine.kernel_backend}, which is triton on a GPU,"
            " and the package triton is not installed. Run `pip install triton`, or use"
            " engine.kernel_backend=torch."
        )
    if config.engine.deepspeed is not None:
        for train in (config.train, config.reference_train):
            settings = deepspeed_config(
                config, precision=precision, world_size=1, max_grad_norm=train.max_grad_norm
            )
            check_zero_section(settings["zero_optimization"], str(config.engine.deepspeed))
    check_installed(config.log.trackers)
    choose_template(config.tokenizer.chat_template, None)
    # before the tokenizer, whose loader also reads the model's config but has worse errors
    settings_of = {name: hf_config(model, name=name) for name, model in config.models.items()}
    _check_fit(config, settings_of)
    for name, model in config.models.items():
        _check_model(model, settings_of[name], name, precision=precision, has_device=has_device)


def check_memory(config: Config) -> None:
    """Raises ConfigError for a target whose states alone are larger than the memory here. What its
    activations need besides is in `sftmix plan`, which takes longer."""
    import torch

    from sftmix.cluster.environment import machine_bytes
    from sftmix.engine.ranks import has_gpu
    from sftmix.planning.states import Need, why_too_large

    num_ranks = int(os.environ.get("WORLD_SIZE", config.engine.num_processes))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    cards = range(torch.cuda.device_count() if has_gpu() else 0)
    sizes = [torch.cuda.get_device_properties(card).total_memory for card in cards]
    reason = why_too_large(
        Need(config, num_ranks, local_ranks),
        gpu_bytes=min(sizes, default=None),
        machine=machine_bytes()[0],
    )
    if reason is not None:
        raise ConfigError(
            f"{reason}. Use more ranks, engine.zero_stage=3, offload"
            " (engine.deepspeed=deepspeed/zero3_offload.json) or a smaller model; `sftmix plan"
            " CONFIG --gpus N` lists what fits."
        )


def check_scores(source: str, config_path: str, overrides: Sequence[str]) -> str:
    """Checks that a score table matches the training examples in the config's run folder. Returns
    one line.

    Raises ArtifactError if it does not, or if the data stage has not run with this config.
    """
    from sftmix.batches.examples import TokenisedExamples
    from sftmix.pipeline.run import Request, check_finished_work, first_unfinished_stage
    from sftmix.pipeline.stages.score import fit_table

    # The config as it would be with this table, which replaces the reference run and its modes.
    own = {"scores": source, "mode": "checkpoints", "compare": [], "models": []}
    config = load_config(
        config_path, overrides, values={f"confidence.{key}": value for key, value in own.items()}
    )
    folder = config.run.dir / "data"
    check_finished_work(config, Request("data"))
    if first_unfinished_stage(config, "data") is not None:
        raise ArtifactError(f"{folder} is missing. Run `sftmix data {config_path}` first.")
    fingerprints = verify(folder).facts.get("fingerprints")
    if not isinstance(fingerprints, dict):
        raise ArtifactError(
            f"{folder / MANIFEST} has no fingerprints: an older sftmix wrote it. Run `sftmix data"
            f" {config_path} --force`."
        )
    _, rows = fit_table(config, TokenisedExamples(folder / "train.arrow"), fingerprints)
    return f"{source} fits the {counted(len(rows), 'training example')} in {folder}"


def _check_model(
    model: ModelConfig,
    settings: PretrainedConfig,
    name: str,
    *,
    precision: str,
    has_device: bool,
) -> None:
    """Checks the model on the meta device: attention, shapes of the weights, target modules of the
    adapters."""
    from sftmix.engine.loading import check_attention, check_weights, empty_model
    from sftmix.engine.lora import import_peft, target_names
    from sftmix.engine.ranks import has_gpu

    if has_device:
        check_attention(model, settings, precision=precision, is_on_gpu=has_gpu(), name=name)
    try:
        shell = empty_model(model, settings)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        ImportError,
    ) as error:
        where = f"{name}.path: the config of {model.path}" if model.path else f"{name}.architecture"
        raise ConfigError(
            f"{where} describes no model that can be built: {first_line(error)} Correct its values."
        ) from error
    if model.path is not None and Path(model.path).is_dir():
        check_weights(str(model.path), settings, shell, name=name)
    if model.lora is not None:
        import_peft()
        target_names(shell, model.lora, name=name)


def _check_fit(config: Config, settings_of: dict[str, PretrainedConfig]) -> None:
    """Checks the tokenizer and the maximum length against the models, whose settings are given by
    their key."""
    from sftmix.engine.loading import check_context, check_fit, hf_config

    max_length = config.data.max_length
    if config.tokenizer.train is None:
        from sftmix.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config)
        for name, model in config.models.items():
            check_fit(
                hf_config(model, tokenizer, name=name), tokenizer, max_length=max_length, name=name
            )
        return
    size = config.tokenizer.train.vocab_size
    for name, model in config.models.items():
        settings = settings_of[name]
        check_context(settings, max_length=max_length, name=name)
        is_given = model.path is not None or "vocab_size" in (model.architecture or {})
        rows = settings.get_text_config().vocab_size
        if is_given and size > rows:
            raise ConfigError(
                f"{name}: tokenizer.train.vocab_size is {size}, the model's embedding has"
                f" {counted(rows, 'row')}. Lower it."
            )
