"""The plan of a run: memory of a rank, bytes sent, time, price and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sftmix.config.deepspeed_json import offload_of, zero_section
from sftmix.config.schema import Config, ModelConfig, TrainConfig
from sftmix.engine.counting import ACTIVATIONS, GATHERED, ROWS, SQUARES, TEMPORARIES, WORKSPACE
from sftmix.engine.ranks import is_too_large
from sftmix.planning.hardware import Hardware
from sftmix.planning.states import Need, with_vocabulary
from sftmix.planning.step import Load, Step, Work
from sftmix.planning.timing import Seconds, network_bytes, seconds_of
from sftmix.planning.traces import trace_of, traced_world, with_known_architecture
from sftmix.planning.workload import Data, Workload, workload
from sftmix.train.plan import num_reference_checkpoints

TRACED_TOKENS = 8192  # of a micro-batch; others are scaled, so that a trace serves all of them
CONTEXT_BYTES = 2 * 2**30  # CUDA context and NCCL: assumed
FRAGMENTED = 0.08  # of what comes and goes: assumed, of torch's caching allocator
COMES_AND_GOES = (ACTIVATIONS, ROWS, TEMPORARIES, WORKSPACE, GATHERED)
CONTEXT, FRAGMENTS = "CUDA context and NCCL (assumed)", "caching and fragmentation (assumed)"
FREE_SHARE = 0.95  # of a GPU's memory: what a plan may use
PCIE = 25e9  # bytes/s of a GPU to the host: assumed
HOST_ADAM = 1e9  # parameters/s that DeepSpeed's CPU Adam updates on a GPU's share of cores: assumed
READ = 1e9  # bytes/s of the disk: assumed
HEAD_PRODUCTS = 3  # of the head in a training step; a forward has one
STATES = ("weights", "persisted weights", "master weights", "moments", "gradients")


@dataclass(frozen=True)
class Memory:
    """Of a rank, in bytes. items: at the peak, by purpose. peak_phase: when it is. offloaded: on
    the host instead."""

    items: dict[str, float]
    peak_phase: str
    offloaded: float

    @property
    def total(self) -> float:
        return sum(self.items.values())


@dataclass(frozen=True)
class Stage:
    """A part of the run. num_steps: optimiser steps, or forwards of a rank. mfu: model FLOPs
    (without recomputation and padding) over what the GPUs could do; None where it is not asked."""

    name: str
    num_steps: float
    step: Seconds
    tokens_per_second: float
    mfu: tuple[float, float, float] | None = None

    @property
    def hours(self) -> tuple[float, float, float]:
        """Fast, expected, slow."""
        return tuple(  # type: ignore[return-value]
            self.num_steps * seconds / 3600
            for seconds in (self.step.fast, self.step.expected, self.step.slow)
        )


@dataclass(frozen=True)
class Plan:
    """num_ranks: GPUs of the run."""

    config: Config
    hardware: Hardware
    num_ranks: int
    data: Data
    work: Workload
    memory: Memory
    stages: list[Stage]
    bytes_within: float
    bytes_between: float
    disk_bytes: float
    start_seconds: float
    host_bytes: float
    num_parameters: int
    num_trained_parameters: int
    formula_bytes: float
    reasons: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.total <= FREE_SHARE * self.hardware.memory

    @cached_property
    def hours(self) -> tuple[float, float, float]:
        """Of all stages: fast, expected, slow."""
        columns = zip(*(stage.hours for stage in self.stages), strict=True)
        return tuple(sum(column) for column in columns)  # type: ignore[return-value]

    @property
    def target(self) -> Stage:
        return self.stages[-1]


def make_plan(config: Config, hardware: Hardware, *, num_ranks: int, data: Data) -> Plan:
    """Returns the plan of a run. Raises SftmixError for a model that cannot be traced, ConfigError
    for one that cannot be built."""
    config = offline(config)
    step = step_of(config, num_ranks)
    train = _workload(config, data, step, config.train, paired=True)
    per_rank = step.work(train.load, train.num_micro_batches)
    need = Need(config, num_ranks, min(num_ranks, hardware.gpus_per_node))
    within, between = network_bytes(per_rank, hardware)
    return Plan(
        config=config,
        hardware=hardware,
        num_ranks=num_ranks,
        data=data,
        work=train,
        memory=memory_of(
            config,
            step,
            heaviest(config, data, num_ranks),
            train.num_micro_batches,
            on_gpu=not hardware.is_synchronous,
        ),
        stages=_stages(config, step, train, data, hardware, num_ranks),
        bytes_within=within,
        bytes_between=between,
        disk_bytes=need.disk_bytes,
        start_seconds=step.trace.num_parameters * need.bytes_per_weight / READ,
        host_bytes=need.host_bytes(has_gpu=not hardware.is_synchronous),
        num_parameters=step.trace.num_parameters,
        num_trained_parameters=step.trace.num_trained_parameters,
        formula_bytes=need.states_per_rank + need.weights_per_rank,
        reasons=_reasons(train, per_rank, hardware, num_ranks),
    )


def offline(config: Config) -> Config:
    """Returns the config with the architectures that the package has, and their vocabulary."""

    def known(model: ModelConfig) -> ModelConfig:
        return with_vocabulary(config, with_known_architecture(model))

    update: dict[str, Any] = {"model": known(config.model)}
    if config.reference.model is not None:
        other = known(config.reference.model)
        update["reference"] = config.reference.model_copy(update={"model": other})
    return config.model_copy(update=update)


def step_of(config: Config, num_ranks: int) -> Step:
    """Returns the training step of a config's target. Raises as `make_plan`."""
    config = offline(config)
    trace = trace_of(config, world_size=traced_world(config, num_ranks), max_tokens=TRACED_TOKENS)
    return Step(trace, num_ranks, config.engine.zero_stage, zero_section(config))


def heaviest(config: Config, data: Data, num_ranks: int) -> Load:
    """Returns the largest micro-batch that the settings allow with these lengths."""
    train, longest = config.train, float(data.num_tokens.max())
    examples = max(2, -(-train.batch_size // num_ranks))  # a pair is never divided
    tokens = min(max(train.micro_batch_tokens, 2 * longest), examples * longest)
    share = float(data.num_responses.sum() / data.num_tokens.sum())
    return Load(tokens, share * tokens, tokens * longest)


def memory_on_gpu(config: Config, *, num_ranks: int, data: Data) -> Memory:
    """Returns the memory of a rank of a run on GPUs. Raises as `make_plan`."""
    step = step_of(config, num_ranks)
    train = _workload(config, data, step, config.train, paired=True)
    return memory_of(
        config, step, heaviest(config, data, num_ranks), train.num_micro_batches, on_gpu=True
    )


def memory_of(
    config: Config, step: Step, load: Load, num_micro_batches: float, *, on_gpu: bool
) -> Memory:
    """Returns the memory of a rank at the peak of a step."""
    phases = step.memory(load, num_micro_batches)
    if on_gpu:
        for items in phases.values():
            items.pop(SQUARES, None)  # on a GPU no backend of document_attention keeps them
    peak = max(phases, key=lambda phase: sum(phases[phase].values()))
    items = {purpose: size for purpose, size in phases[peak].items() if size > 0}
    moved = offload_of(config)
    off = [
        name
        for name in STATES
        if (moved["optimizer"] and name in ("master weights", "moments", "gradients"))
        or (moved["param"] and name == "weights")
    ]
    offloaded = sum(items.pop(name, 0.0) for name in off)
    if on_gpu:
        comes = sum(items.get(name, 0.0) for name in COMES_AND_GOES)
        items |= {FRAGMENTS: FRAGMENTED * comes, CONTEXT: CONTEXT_BYTES}
    return Memory(items, peak, offloaded)


def _workload(
    config: Config, data: Data, step: Step, train: TrainConfig, *, paired: bool
) -> Workload:
    return workload(
        data,
        train,
        num_ranks=step.num_ranks,
        paired=paired,
        packs=step.trace.packs,
        square_share=step.square_share,
        seed=config.run.seed,
    )


def _stages(
    config: Config,
    step: Step,
    train: Workload,
    data: Data,
    hardware: Hardware,
    num_ranks: int,
) -> list[Stage]:
    target = _training("target (SFTMix)", config, step, train, hardware, num_ranks)
    stages = []
    if not (config.confidence.models or config.confidence.scores):
        settings, model = config.reference_train, config.reference_model
        own = config.model_copy(update={"model": model})
        other = step if model == config.model else step_of(own, num_ranks)
        plan = _workload(config, data, step, settings, paired=False)
        stages.append(_training("reference", config, other, plan, hardware, num_ranks))
        if "online" not in config.confidence.modes or len(config.confidence.modes) > 1:
            count = num_reference_checkpoints(settings.epochs, config.reference.num_checkpoints)
            stages.append(_scoring(config, other, data, hardware, num_ranks, count))
    elif config.confidence.models:
        count = len(config.confidence.models)
        stages.append(_scoring(config, step, data, hardware, num_ranks, count))
    if config.baseline.enabled:
        stages.append(replace(target, name="baseline (NTP)"))
    return [*stages, target]


def _training(
    name: str,
    config: Config,
    step: Step,
    train: Workload,
    hardware: Hardware,
    num_ranks: int,
) -> Stage:
    work = step.work(train.load, train.num_micro_batches)
    seconds = seconds_of(work, hardware)
    extra = _offload_seconds(config, step, num_ranks)
    seconds = replace(
        seconds,
        fast=seconds.fast + 0.5 * extra,
        expected=seconds.expected + extra,
        slow=seconds.slow + 2 * extra,
    )
    model_flops = step.model_flops(
        Load(train.real_tokens, train.responses, train.real_squares),
        is_frozen=config.model.lora is not None,
    )
    could = num_ranks * hardware.peak_flops
    mfu = tuple(model_flops / (t * could) for t in (seconds.fast, seconds.expected, seconds.slow))
    rate = train.real_tokens / seconds.expected
    return Stage(name, train.num_steps, seconds, rate, mfu)  # type: ignore[arg-type]


def _offload_seconds(config: Config, step: Step, num_ranks: int) -> float:
    """Returns the seconds that a step waits for the host's optimiser."""
    if not offload_of(config)["optimizer"]:
        return 0.0
    own = step.trace.num_trained_parameters / num_ranks
    return own * (4 + 2) / PCIE + own / HOST_ADAM


def _scoring(
    config: Config,
    step: Step,
    data: Data,
    hardware: Hardware,
    num_ranks: int,
    num_models: int,
) -> Stage:
    """The forwards of all examples under every checkpoint."""
    tokens = float(data.num_tokens.mean()) * data.num_examples
    budget = float(config.confidence.micro_batch_tokens)
    share = float(data.num_responses.sum() / data.num_tokens.sum())
    mean_square = float((data.num_tokens.astype(float) ** 2).sum() / data.num_tokens.sum())
    load = Load(budget, share * budget, budget * mean_square)
    work = step.work(load, 1)
    head = work["head"]
    forward = {
        "forward": work["forward"],
        "head": Work(
            products={kind: count / HEAD_PRODUCTS for kind, count in head.products.items()},
            moved=head.moved / HEAD_PRODUCTS,
            operations=head.operations,
        ),
    }
    wanted = config.confidence.sharding
    weight_bytes = step.trace.num_parameters * (4 if hardware.is_synchronous else 2)
    is_sharded = num_ranks > 1 and (
        wanted == "zero3" or (wanted == "auto" and is_too_large(weight_bytes, hardware.memory))
    )
    if not is_sharded:
        forward["forward"].calls.clear()
        forward["forward"].sent.clear()
    seconds = seconds_of(forward, hardware)
    steps = num_models * tokens / budget / num_ranks
    how = "sharded" if is_sharded else "replicated"
    return Stage(f"scoring ({how})", steps, seconds, num_ranks * budget / seconds.expected)


def _reasons(
    train: Workload, work: Mapping[str, Work], hardware: Hardware, num_ranks: int
) -> list[str]:
    """Returns what bounds the speed, in words."""
    seconds = seconds_of(dict(work), hardware)
    reasons = []
    if train.idle_ranks:
        reasons.append(
            f"{train.idle_ranks} of {num_ranks} ranks have no example in a typical step: raise"
            " train.batch_size (two examples per rank at least), or use fewer GPUs"
        )
    if seconds.sending > max(seconds.computing, seconds.hosting):
        reasons.append("sending takes longer than computing: larger micro-batches, or hpZ")
    elif seconds.hosting > seconds.computing:
        reasons.append("calling operations takes longer than computing them: larger micro-batches")
    if train.useful_share < 0.85:
        reasons.append(
            f"{1 - train.useful_share:.0%} of the ranks' time is waiting for the slowest one"
        )
    return reasons
