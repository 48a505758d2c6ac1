"""Run the recipe: each stage is prepared, executed and published, in order.

Stages never call each other. They exchange folders in the run folder
(`sftmix/storage/artifacts.py`). A stage whose output exists with the same inputs and settings is
not run again.
"""

from __future__ import annotations

import contextlib
import json
import pkgutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sftmix.cluster.environment import rank_of
from sftmix.cluster.liveness.processes import Process
from sftmix.cluster.liveness.run_lock import RunLock
from sftmix.cluster.liveness.stopping import StopRequest
from sftmix.config.reader import dump_config
from sftmix.config.schema import Config
from sftmix.engine.process_group import init_ranks, use_threads
from sftmix.engine.ranks import Ranks
from sftmix.pipeline import unshared_folder
from sftmix.pipeline.context import ALONE, Facts, Stage, StageContext
from sftmix.pipeline.guard import Guard, holding
from sftmix.pipeline.order import needed_stages, stages_of
from sftmix.pipeline.up_to_date import refusal, refuse_changed, state_of
from sftmix.storage import artifacts, failures, provenance, unfinished
from sftmix.storage.files import await_visible, write_text
from sftmix.storage.unfinished import Identity
from sftmix.train.meter import Meter


@dataclass(frozen=True)
class Request:
    """A request to run stages. only: one stage, and those before it that are missing; None: all
    stages.

    force: replace an output that was made with other settings (of `only` or, without it, of any
    stage), and run `only` even if it is up to date. restart: discard unfinished work instead of
    resuming.
    """

    only: str | None = None
    force: bool = False
    restart: bool = False


def run_pipeline(
    config: Config,
    request: Request,
    *,
    launchers: Sequence[Process] = (),
    lock: RunLock | None = None,
) -> Path:
    """Runs the stages of `request` that are not up to date. Returns the folder of the last one.

    launchers: the processes that started this one, found at its start. lock: of the run folder, if
    this process already holds it. Under a launcher every rank calls this function. Rank 0 decides,
    and runs the stages without a model alone while the others wait. Raises ArtifactError if
    finished work would be replaced without `force`.
    """
    guard = Guard(config, launchers)
    with contextlib.ExitStack() as held:
        if rank_of() == 0:
            guard.lock = lock or held.enter_context(holding(config, joins=True))
        try:
            _Run(config, request, guard, held).run()
        except BaseException as error:
            known = failures.explain(error, config.run.dir)
            guard.end(known or error)
            if known is not None:
                raise known from error
            raise
        guard.end(None)
    return folder_of_last(config, request.only)


def check_finished_work(config: Config, request: Request) -> None:
    """Raises ArtifactError, before anything starts, if `run_pipeline` would refuse to replace
    finished work."""
    needed = needed_stages(stages_of(config), request.only)
    may_be_replaced = {request.only} if request.only else {stage.name for stage in needed}
    refuse_changed(config, needed, {name for name in may_be_replaced if request.force})


def folder_of_last(config: Config, only: str | None) -> Path:
    """Returns the folder that is published last: that of `only`, or of the last stage."""
    return config.run.dir / needed_stages(stages_of(config), only)[-1].folder


def first_unfinished_stage(config: Config, only: str | None = None) -> str | None:
    """Returns the first stage, up to `only`, whose output is missing or was made with other
    settings; None if all are done."""
    digests: dict[str, str] = {}
    for stage in needed_stages(stages_of(config), only):
        folder = config.run.dir / stage.folder
        manifest = artifacts.read_manifest(folder)
        inputs = {name: digests[name] for name in stage.reads}
        if (
            manifest is None
            or state_of(stage, folder, stage.settings(config), inputs, digests=False) != "current"
        ):
            return stage.name
        digests[stage.name] = manifest.digest
    return None


class _Run:
    """One call of `run_pipeline` on one rank. digests: of the published outputs, on rank 0."""

    def __init__(
        self,
        config: Config,
        request: Request,
        guard: Guard,
        held: contextlib.ExitStack,
    ):
        self.config, self.request, self.guard, self._held = config, request, guard, held
        self._stages = stages_of(config)
        self._needed = needed_stages(self._stages, request.only)
        self._stop = StopRequest(
            config.run.dir, wall_clock_minutes=config.limits.wall_clock_minutes
        )
        self._is_main = rank_of() == 0
        self._ranks = ALONE  # until they join
        self._digests: dict[str, str] = {}

    def run(self) -> None:
        if self._is_main:
            check_finished_work(self.config, self.request)
        for stage in self._needed:
            if stage.needs_engine and self._ranks is ALONE:
                self._ranks = self._join()
            self.guard.progress.begin_phase(stage.name, can_stall=stage.needs_engine)
            if not (self._is_main or stage.needs_engine):
                continue
            context = self._prepare(stage)
            if context is not None:
                start = time.perf_counter()
                run = pkgutil.resolve_name(f"sftmix.pipeline.stages.{stage.function}")
                facts = run(context)
                self._publish(stage, context, facts, seconds=time.perf_counter() - start)
            if self._is_main:
                manifest = artifacts.read_manifest(self._folder(stage))
                assert manifest is not None, f"{stage.name} was published or verified just now"
                unfinished.discard(self._work(stage), manifest.fingerprint)
                self._digests[stage.name] = manifest.digest
        self._ranks.barrier()

    def _join(self) -> Ranks:
        """Joins the other ranks and starts the heartbeats. Collective: all ranks must call it."""
        config = self.config
        joined = init_ranks(timedelta(minutes=config.limits.join_minutes))
        ranks = unshared_folder.find_storage(joined, config.run.dir)
        use_threads(config.engine.num_threads)
        unshared_folder.say_storage(ranks, config)
        self.guard.lock = unshared_folder.hold_others(ranks, config, self._held) or self.guard.lock
        self.guard.start(ranks)
        return ranks

    def _prepare(self, stage: Stage) -> StageContext | None:
        """Decides whether a stage must run, and prepares it. Collective for a stage on all ranks.

        Rank 0 decides and tells the others. Returns None if the output is up to date.
        """
        ranks = self._ranks if stage.needs_engine else ALONE
        identity = self._identity(stage) if self._is_main else Identity("", {}, {})
        if not ranks.same_as_main(self._is_main and self._must_run(stage, identity)):
            if self._is_main and self.request.only in (None, stage.name):
                print(f"{self._title(stage)}: up to date")
            return None
        if self._is_main:
            print(self._title(stage))
            if not self.request.restart:
                self._refuse_to_lose_work(stage, identity.settings)
        sent = ranks.text_from_main(json.dumps(vars(identity), default=str))
        identity = identity if self._is_main else Identity(**json.loads(sent))
        if ranks.leads_storage:
            unfinished.claim(self._work(stage), stage.name, identity, discard=self.request.restart)
        inputs = {
            each.name: self._folder(each) for each in self._stages if each.name in stage.reads
        }
        for name in stage.reads:
            unshared_folder.copy_to_others(ranks, inputs[name], self.guard)
            await_visible(inputs[name] / artifacts.MANIFEST)
        return StageContext(
            config=self.config,
            folder=(
                artifacts.new_staging(self._folder(stage)) if self._is_main else self._folder(stage)
            ),
            inputs=inputs,
            work=self._work(stage),
            identity=identity,
            stop=self._stop,
            progress=self.guard.progress,
            meter=Meter(),
            ranks=self._ranks,
            lock=self.guard.lock,
        )

    def _publish(
        self, stage: Stage, context: StageContext, facts: Facts, *, seconds: float
    ) -> None:
        """Publishes the output with its manifest. seconds: duration of the stage."""
        if not self._is_main:
            if context.lock is not None:  # ranks on other disks
                unfinished.discard(context.work, context.identity.fingerprint)
            return
        artifacts.seal(
            context.folder,
            stage=stage.name,
            settings=context.identity.settings,
            inputs=context.identity.inputs,
            facts=facts,
        )
        assert context.lock is not None, "rank 0 holds the run folder"
        artifacts.replace_folder(context.folder, self._folder(stage), check=context.lock.check)
        # the content that the folder now has
        write_text(self.config.run.dir / "config.yaml", dump_config(self.config))
        print(f"{self._title(stage)}: {seconds:.1f} s")

    def _identity(self, stage: Stage) -> Identity:
        settings = stage.settings(self.config)
        inputs = {name: self._digests[name] for name in stage.reads}
        return Identity(artifacts.stage_fingerprint(stage.name, settings, inputs), settings, inputs)

    def _must_run(self, stage: Stage, identity: Identity) -> bool:
        """Raises ArtifactError if finished work would be replaced without `force`."""
        is_wanted, force = self.request.only in (None, stage.name), self.request.force
        state = state_of(stage, self._folder(stage), identity.settings, identity.inputs)
        if state == "changed" and not (stage.is_view or (force and is_wanted)):
            # Its settings were compared at the start, so a missing input was recreated with other
            # content.
            compared = [each for each in self._stages if each.name in (*stage.reads, stage.name)]
            refuse_changed(self.config, compared, set(stage.reads))
            raise refusal(
                self.config,
                [f"  {stage.name} ({self._folder(stage)}): another version of sftmix made it"],
            )
        return state != "current" or (force and self.request.only == stage.name)

    def _refuse_to_lose_work(self, stage: Stage, settings: dict[str, Any]) -> None:
        """Raises ArtifactError if `stage` must run because its settings changed, and a later stage
        has unfinished work based on its output."""
        manifest = artifacts.read_manifest(self._folder(stage))
        if manifest is None:
            return
        changed = provenance.differences(manifest.settings, settings)
        for later in self._stages:
            progress = unfinished.describe(self._work(later))
            builds_on_it = later is not stage and stage in needed_stages(self._stages, later.name)
            if changed and progress and builds_on_it:
                raise unfinished.refusal(
                    later.name, progress, [f"{stage.name}: {line}" for line in changed]
                )

    def _title(self, stage: Stage) -> str:
        return f"[{self._stages.index(stage) + 1}/{len(self._stages)}] {stage.name}"

    def _folder(self, stage: Stage) -> Path:
        return self.config.run.dir / stage.folder

    def _work(self, stage: Stage) -> Path:
        return self.config.run.dir / "work" / stage.name
