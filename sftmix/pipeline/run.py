"""The recipe: stages in order, what each reads, and when its published output can be used again.

    data -> reference -> score -> split -> baseline, train -> evaluate -> report

Stages never call each other. They meet through folders of the run folder (`sftmix/storage/artifacts.py`); a stage
whose output is there with the same inputs and settings is not run again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.config.deepspeed_json import read_deepspeed_json
from sftmix.config.reader import dump_config
from sftmix.config.schema import Config, ModelConfig
from sftmix.errors import ArtifactError
from sftmix.liveness.run_lock import Fence
from sftmix.liveness.stopping import StopRequest
from sftmix.meter import Meter
from sftmix.pipeline import guard
from sftmix.pipeline.up_to_date import refusal, refuse_changed, state_of
from sftmix.storage import artifacts, failures, provenance, unfinished
from sftmix.storage.files import await_visible, sha256_of_file, write_text
from sftmix.storage.unfinished import Identity

if TYPE_CHECKING:
    from sftmix.engine.distributed import Ranks


@dataclass(frozen=True)
class Stage:
    """name: as on the command line. folder: in the run folder. reads: stages whose output it needs.
    settings: what else its output depends on. needs_engine: runs on all ranks. is_view: its output only shows its inputs, so it is
    made anew when they change, unasked."""

    name: str
    folder: str
    reads: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    run: Callable[[StageContext], None]
    needs_engine: bool = True
    is_view: bool = False


@dataclass
class StageContext:
    """What a running stage sees. folder: where it writes (rank 0 only); published when it returns.
    facts: numbers for later stages; `facts["identity"]`, where set, stands for the content in fingerprints."""

    config: Config
    folder: Path
    inputs: dict[str, Path]
    ranks: Ranks | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    work: Path = Path()  # for what must survive a kill of this stage; removed once its output is published
    # Of settings and inputs; the same on every rank that runs the stage.
    identity: Identity = field(default_factory=lambda: Identity("", {}, {}))
    stop: StopRequest | None = None
    meter: Meter = field(default_factory=Meter)  # begins with the stage

    @property
    def kept(self) -> Path:
        """A folder for finished files of the output, which survive a kill; the stage moves them into `folder` at its end."""
        path = self.work / "kept"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def facts_of(self, stage: str) -> dict[str, Any]:
        """Returns what an input stage left in its manifest."""
        manifest = artifacts.read_manifest(self.inputs[stage])
        assert manifest is not None, f"{stage} was verified before this stage started"
        return manifest.facts


def stages_of(config: Config) -> list[Stage]:
    """Returns the stages of this run, in order."""
    from sftmix.pipeline import stages

    training = {"model": model_identity(config.model), "train": config.train.model_dump(mode="json"), **_numerics(config)}
    has_reference = config.confidence.has_reference
    reference = ("reference",) if has_reference else ()
    trained = (*(("baseline",) if config.baseline.enabled else ()), "train")
    return [
        Stage("data", "data", (), _data_settings, stages.run_data, needs_engine=False),
        *([Stage("reference", "reference", ("data",), _reference_settings, stages.run_reference)] if has_reference else []),
        Stage(
            "score",
            "confidence",
            ("data", *reference),
            _score_settings,
            stages.run_score,
            needs_engine=config.confidence.scores is None,
        ),
        Stage("split", "pairing", ("data", "score"), lambda c: c.split.model_dump(mode="json"), stages.run_split, needs_engine=False),
        *([Stage("baseline", "baseline", ("data", "split"), lambda c: training, stages.run_baseline)] if config.baseline.enabled else []),
        Stage("train", "sftmix", ("data", "split"), lambda c: {**training, "mixup": c.mixup.model_dump(mode="json")}, stages.run_train),
        Stage("evaluate", "evaluation", ("data", *trained), _numerics, stages.run_evaluate, is_view=True),
        Stage(
            "report",
            "report",
            ("data", *reference, "score", "split", *trained, "evaluate"),
            lambda c: {"summary": sha256_of_file(c.run.dir / "data" / "summary.json")},
            stages.run_report,
            needs_engine=False,
            is_view=True,
        ),
    ]


def _data_settings(config: Config) -> dict[str, Any]:
    from sftmix.data.prepare import data_settings

    return data_settings(config)


def _reference_settings(config: Config) -> dict[str, Any]:
    return {
        "model": model_identity(config.reference_model),
        "train": config.reference_train.model_dump(mode="json"),
        "num_checkpoints": config.reference.num_checkpoints,
        "modes": sorted(config.confidence.modes),  # what the run leaves behind: checkpoints, scores, or both
        **_numerics(config),
    }


def _score_settings(config: Config) -> dict[str, Any]:
    """What the table depends on. Units, budgets and sharding change nothing but rounding."""
    confidence = config.confidence
    settings = confidence.model_dump(mode="json", exclude={"micro_batch_tokens", "unit_examples", "sharding"})
    settings["models"] = [model_identity(model) for model in confidence.models]
    if confidence.scores is not None and Path(confidence.scores).exists():
        path = Path(confidence.scores)
        settings["scores"] = [sha256_of_file(file) for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    return {**settings, **_numerics(config)}


def _numerics(config: Config) -> dict[str, Any]:
    """Settings that every stage with a model depends on; ZeRO stage and number of ranks change nothing but rounding."""
    from sftmix.engine.precision import resolve_precision

    deepspeed = read_deepspeed_json(config.engine.deepspeed) if config.engine.deepspeed else None
    return {"seed": config.run.seed, "precision": resolve_precision(config.engine.precision), "deepspeed": deepspeed}


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """Returns what tells one model from another: settings, and for a local folder its config and the ends of its weight
    files (hashing 100 GB whole at every start would cost minutes)."""
    identity = model.model_dump(mode="json", exclude=set() if model.lora else {"lora"})
    folder = Path(model.path) if model.path else None
    if folder is not None and folder.is_dir():
        identity["files"] = {}
        for path in sorted(file for pattern in ("config.json", "*.safetensors", "*.py") for file in folder.glob(pattern)):
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(1 << 20)
                file.seek(max(0, size - (1 << 20)))
                identity["files"][path.name] = provenance.fingerprint([size, head.hex(), file.read().hex()])
    return identity


def run_pipeline(
    config: Config,
    *,
    only: str | None = None,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Runs the stages that are not up to date, or `only` one and those before it that are missing. Returns the folder of the last one.

    force: an output that was made with other settings may be replaced, that of `only` or, without it, of any stage; and `only` is run
    though it is up to date. restart: unfinished work is discarded, not resumed.

    Under a launcher every rank calls it: rank 0 decides, and runs the stages without a model alone, while the others wait to be joined.
    Raises ArtifactError where finished work would be replaced, and `force` does not say that it may be.
    """
    from sftmix.engine.distributed import environment_rank

    stages = stages_of(config)
    _check_stage(stages, only)
    hold: Fence | None = None
    with contextlib.ExitStack() as held:
        if environment_rank() == 0:
            hold = held.enter_context(guard.holding(config))
        try:
            _run_stages(config, stages, held, hold, only=only, force=force, restart=restart, say=say)
        except BaseException as error:
            known = failures.explain(error, config.run.dir)
            guard.end_watch(known or error)
            if known is not None:
                raise known from error
            raise
        guard.end_watch(None)
    return config.run.dir / next(stage.folder for stage in reversed(stages) if only in (None, stage.name))


def check_finished_work(config: Config, only: str | None, *, force: bool) -> None:
    """Raises ArtifactError, before anything is started, where `run_pipeline` would refuse to replace finished work."""
    stages = stages_of(config)
    _check_stage(stages, only)
    needed = _needed(stages, only)
    replaced = ({only} if only else needed) if force else set()
    refuse_changed(config, [stage for stage in stages if stage.name in needed], replaced)


def _check_stage(stages: list[Stage], only: str | None) -> None:
    if only is None or only in {stage.name for stage in stages}:
        return
    if only == "reference":
        raise ArtifactError("there is no stage 'reference' in this config: confidence.models or confidence.scores takes its place.")
    raise ArtifactError(f"the stage {only!r} is switched off in this config (baseline.enabled is false). Switch it on.")


def _run_stages(
    config: Config,
    stages: list[Stage],
    held: contextlib.ExitStack,
    hold: Fence | None,
    *,
    only: str | None,
    force: bool,
    restart: bool,
    say: Callable[[str], None],
) -> None:
    from sftmix.engine.distributed import environment_rank, init_ranks, use_threads
    from sftmix.pipeline import unshared_folder

    is_main = environment_rank() == 0
    folder_of = {stage.name: config.run.dir / stage.folder for stage in stages}
    stop = StopRequest(config.run.dir, wall_clock_minutes=config.limits.wall_clock_minutes)
    digests: dict[str, str] = {}
    ranks: Ranks | None = None
    needed = _needed(stages, only)
    if is_main:
        check_finished_work(config, only, force=force)
    for number, stage in enumerate(stages, start=1):
        if stage.name not in needed:
            continue
        if stage.needs_engine and ranks is None:
            ranks = unshared_folder.find_storage(init_ranks(timedelta(minutes=config.limits.join_minutes)), config.run.dir)
            use_threads(config.engine.num_threads)
            unshared_folder.say_storage(ranks, config)
            hold = unshared_folder.hold_others(ranks, config, held) or hold
            guard.start_watch(config, ranks, hold)
        guard.note(phase=stage.name, can_stall=stage.needs_engine)
        if not is_main and not stage.needs_engine:
            continue
        folder, title = folder_of[stage.name], f"[{number}/{len(stages)}] {stage.name}"
        settings = stage.settings(config) if is_main else {}
        inputs = {name: digests[name] for name in stage.reads} if is_main else {}
        is_wanted = only in (None, stage.name)
        must_run = False
        if is_main:
            state = state_of(stage, folder, settings, inputs)
            if state == "changed" and not (stage.is_view or (force and is_wanted)):
                # Its settings were compared at the start, so an input that was missing has come out otherwise than before.
                refuse_changed(config, [each for each in stages if each.name in (*stage.reads, stage.name)], set(stage.reads))
                raise refusal(config, [f"  {stage.name} ({folder}): another version of sftmix made it"])
            must_run = state != "current" or (force and only == stage.name)
        if stage.needs_engine and ranks is not None:
            must_run = ranks.same_as_main(must_run)
        if must_run:
            if is_main:
                say(title)
            start = time.perf_counter()
            context = StageContext(config, folder, {name: folder_of[name] for name in stage.reads}, ranks, stop=stop)
            context.identity = Identity(artifacts.stage_fingerprint(stage.name, settings, inputs) if is_main else "", settings, inputs)
            context.work = config.run.dir / "work" / stage.name
            if is_main and not restart:
                _refuse_to_lose_work(config, stages, stage, settings)
            if stage.needs_engine and ranks is not None:
                context.identity = Identity(**json.loads(ranks.text_from_main(json.dumps(vars(context.identity), default=str))))
            if is_main or (ranks is not None and ranks.leads_storage):
                unfinished.claim(context.work, stage.name, context.identity, discard=restart)
            if stage.needs_engine and ranks is not None:
                for name in stage.reads:
                    unshared_folder.copy_to_others(ranks, folder_of[name])
                    await_visible(folder_of[name] / artifacts.MANIFEST)
            with _publishing(stage, context, settings, inputs, is_main=is_main):
                stage.run(context)
            if is_main:
                write_text(config.run.dir / "config.yaml", dump_config(config))  # what the folder now holds
                say(f"{title}: {time.perf_counter() - start:.1f} s")
            if not is_main and ranks is not None and ranks.leads_storage:
                unfinished.discard(context.work, context.identity.fingerprint)
        elif is_main and is_wanted:
            say(f"{title}: up to date")
        if is_main:
            manifest = artifacts.read_manifest(folder)
            assert manifest is not None, f"{folder} was published or verified just now"
            unfinished.discard(config.run.dir / "work" / stage.name, manifest.fingerprint)
            digests[stage.name] = manifest.digest
        if stage.name == only:
            break
    if ranks is not None:
        ranks.barrier()


def folder_of_last(config: Config, only: str | None) -> Path:
    """Returns the folder that is published last: that of `only`, or of the last stage."""
    folders = {stage.name: config.run.dir / stage.folder for stage in stages_of(config)}
    return folders[only] if only else list(folders.values())[-1]


def first_unfinished_stage(config: Config, only: str | None = None) -> str | None:
    """Returns the first stage, up to `only`, whose output is missing or was made with other settings; None if all are done."""
    digests: dict[str, str] = {}
    stages = stages_of(config)
    needed = _needed(stages, only)
    for stage in stages:
        if stage.name not in needed:
            continue
        folder = config.run.dir / stage.folder
        manifest = artifacts.read_manifest(folder)
        inputs = {name: digests[name] for name in stage.reads}
        if manifest is None or state_of(stage, folder, stage.settings(config), inputs, digests=False) != "current":
            return stage.name
        digests[stage.name] = manifest.digest
        if stage.name == only:
            break
    return None


def _needed(stages: list[Stage], only: str | None) -> set[str]:
    """Returns the names of `only` and of all that it reads, directly or not; of all stages where there is no `only`."""
    if only is None:
        return {stage.name for stage in stages}
    needed = {only}
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.reads)
    return needed


def _refuse_to_lose_work(config: Config, stages: list[Stage], stage: Stage, settings: dict[str, Any]) -> None:
    """Raises ArtifactError where `stage` must run because its settings changed, and a later one has unfinished work on its output."""
    manifest = artifacts.read_manifest(config.run.dir / stage.folder)
    changed = provenance.differences(manifest.settings, json.loads(json.dumps(settings, default=str))) if manifest is not None else []
    for later in stages:
        progress = unfinished.describe(config.run.dir / "work" / later.name)
        if changed and progress and later.name != stage.name and stage.name in _needed(stages, later.name):
            raise unfinished.refusal(later.name, progress, [f"{stage.name}: {line}" for line in changed])


@contextlib.contextmanager
def _publishing(stage: Stage, context: StageContext, settings: dict[str, Any], inputs: dict[str, str], *, is_main: bool) -> Iterator[None]:
    if not is_main:
        yield
        return
    with artifacts.publish(context.folder, stage=stage.name, settings=settings, inputs=inputs, facts=context.facts) as staging:
        context.folder = staging
        yield
