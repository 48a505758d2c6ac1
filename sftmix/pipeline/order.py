"""The stages in order: what each reads, and the settings that its output depends on.

data -> reference -> score -> split -> baseline, train -> evaluate -> report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftmix.config.deepspeed_json import read_deepspeed_json
from sftmix.config.schema import Config, ModelConfig, ObjectiveConfig, TrainConfig
from sftmix.errors import ArtifactError
from sftmix.pipeline.context import Stage
from sftmix.storage.files import sha256_of_file
from sftmix.storage.provenance import fingerprint

END_BYTES = 1 << 20  # from both ends of a weight file, to identify it


def stages_of(config: Config) -> list[Stage]:
    """Returns the stages of this run, in order."""
    has_reference, has_baseline = config.confidence.has_reference, config.baseline.enabled
    reference = ("reference",) if has_reference else ()
    trained = (*(("baseline",) if has_baseline else ()), "train")
    every = ("data", *reference, "score", "split", *trained, "evaluate", "report")
    if not config.evaluation.trained:
        trained, every = (), ("data", "evaluate")
    scores_given = config.confidence.scores is not None
    stages = [
        Stage("data", "data", (), _data_settings, "data:run", needs_engine=False),
        Stage("reference", "reference", ("data",), _reference_settings, "reference:run"),
        Stage(
            "score",
            "confidence",
            ("data", *reference),
            _score_settings,
            "score:run",
            needs_engine=not scores_given,
        ),
        Stage(
            "split",
            "pairing",
            ("data", "score"),
            _split_settings,
            "split:run",
            needs_engine=False,
        ),
        Stage("baseline", "baseline", ("data", "split"), _baseline_settings, "target:run_baseline"),
        Stage("train", "sftmix", ("data", "split"), _mixup_settings, "target:run_train"),
        Stage(
            "evaluate",
            "evaluation",
            ("data", *trained),
            _evaluation_settings,
            "evaluate:run",
            is_view=True,
        ),
        Stage(
            "report",
            "report",
            tuple(name for name in every if name != "report"),
            lambda config: {"summary": sha256_of_file(config.run.dir / "data" / "summary.json")},
            "report:run",
            needs_engine=False,
            is_view=True,
        ),
    ]
    return [stage for stage in stages if stage.name in every]


def needed_stages(stages: list[Stage], only: str | None) -> list[Stage]:
    """Returns the stage `only` and everything that it reads, directly or indirectly, in order; all
    stages if `only` is None. Raises ArtifactError if this config has no stage of that name."""
    if only is None:
        return stages
    names = {stage.name for stage in stages}
    if only not in names:
        if "train" not in names:
            raise ArtifactError(
                f"there is no stage {only!r} here: evaluation.trained is false, as for a model"
                " folder, so nothing is trained. Give a config to train with."
            )
        raise ArtifactError(
            "there is no stage 'reference' in this config: confidence.models or confidence.scores"
            " takes its place."
            if only == "reference"
            else f"the stage {only!r} is switched off in this config (baseline.enabled is false)."
            " Switch it on."
        )
    needed = {only}
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.reads)
    return [stage for stage in stages if stage.name in needed]


def _data_settings(config: Config) -> dict[str, Any]:
    from sftmix.data.prepare import data_settings

    return data_settings(config)


def _reference_settings(config: Config) -> dict[str, Any]:
    return {
        "model": model_identity(config.reference_model),
        "train": _train_settings(config.reference_train),
        "num_checkpoints": config.reference.num_checkpoints,
        # what the run produces: checkpoints, scores, or both
        "modes": sorted(config.confidence.modes),
        **_numerics(config),
    }


def _score_settings(config: Config) -> dict[str, Any]:
    """The settings that the table depends on. Units, budgets and sharding change only rounding."""
    confidence = config.confidence
    settings = confidence.model_dump(
        mode="json", exclude={"micro_batch_tokens", "unit_examples", "sharding"}
    )
    settings["models"] = [model_identity(model) for model in confidence.models]
    if confidence.scores is not None and Path(confidence.scores).exists():
        path = Path(confidence.scores)
        settings["scores"] = [
            sha256_of_file(file)
            for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])
        ]
    return {**settings, **_numerics(config)}


def _split_settings(config: Config) -> dict[str, Any]:
    settings = config.split.model_dump(mode="json")
    return settings | ({"seed": config.run.seed} if config.split.column == "random" else {})


def _evaluation_settings(config: Config) -> dict[str, Any]:
    own = [] if config.evaluation.trained else [config.model]
    models = [model_identity(model) for model in (*own, *config.evaluation.models)]
    return {**_numerics(config), **({"models": models} if models else {})}


def _train_settings(train: TrainConfig) -> dict[str, Any]:
    """Returns what a model depends on; held-out losses change it only where they choose."""
    names = {"evaluate_every", "keep_best", "patience"}
    return train.model_dump(mode="json", exclude=set() if train.chooses else names)


def _target_settings(config: Config) -> dict[str, Any]:
    return {
        "model": model_identity(config.model),
        "train": _train_settings(config.train),
        **_numerics(config),
    }


def _baseline_settings(config: Config) -> dict[str, Any]:
    # It takes the examples in the order of the pairs, so it depends on the matching.
    names = {"length": {"matching", "length_block"}, "within_halves": {"matching"}}
    order = names.get(config.mixup.matching)
    mixup = {"mixup": config.mixup.model_dump(mode="json", include=order)} if order else {}
    own = _changed(config.baseline.objective)
    return {**_target_settings(config), **mixup, **({"baseline": own} if own else {})}


def _changed(objective: ObjectiveConfig) -> dict[str, Any]:
    """Returns the settings of an objective that is not plain NTP."""
    changed = objective.model_dump(mode="json", exclude_defaults=True)
    return {"objective": changed} if changed else {}


def _mixup_settings(config: Config) -> dict[str, Any]:
    mixup = config.mixup.model_dump(mode="json")
    return {**_target_settings(config), "mixup": mixup, **_changed(config.objective)}


def _numerics(config: Config) -> dict[str, Any]:
    """The settings that every stage with a model depends on. ZeRO stage and number of ranks change
    only rounding."""
    from sftmix.engine.precision import resolve_precision

    deepspeed = read_deepspeed_json(config.engine.deepspeed) if config.engine.deepspeed else None
    return {
        "seed": config.run.seed,
        "precision": resolve_precision(config.engine.precision),
        "deepspeed": deepspeed,
    }


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """Returns what identifies a model: settings, and for a local folder its config and both ends of
    its weight files (hashing 100 GB at every start would take minutes)."""
    identity = model.model_dump(mode="json", exclude=set() if model.lora else {"lora"})
    folder = Path(model.path) if model.path else None
    if folder is not None and folder.is_dir():
        identity["files"] = {}
        for path in sorted(
            file
            for pattern in ("config.json", "*.safetensors", "*.py")
            for file in folder.glob(pattern)
        ):
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(END_BYTES)
                file.seek(max(0, size - END_BYTES))
                identity["files"][path.name] = fingerprint([size, head.hex(), file.read().hex()])
    return identity
