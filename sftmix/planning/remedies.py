"""Settings that make a run fit, in order of their price in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sftmix.config.deepspeed_json import offload_of
from sftmix.config.schema import Config
from sftmix.planning.plan import Plan, make_plan

SMALLEST = 1024  # tokens of a micro-batch
MOST_GPUS = 8  # times as many


@dataclass(frozen=True)
class Remedy:
    """settings: as on the command line. memory: bytes of a rank. seconds: of a step of the target.
    hours: of the whole run."""

    settings: str
    memory: float
    seconds: float
    hours: float


def remedies(plan: Plan) -> list[Remedy]:
    """Returns what makes a run fit: one change each, the smallest of its kind, and all changes of
    memory together."""
    found = []
    for kind in _kinds(plan):
        for settings, config, num_gpus in kind:
            other = make_plan(config, plan.hardware, num_ranks=num_gpus, data=plan.data)
            if other.fits:
                found.append(
                    Remedy(settings, other.memory.total, other.target.step.expected, other.hours[1])
                )
                break
    return sorted(found, key=lambda remedy: remedy.hours)


def _kinds(plan: Plan) -> Iterator[Iterator[tuple[str, Config, int]]]:
    config, gpus = plan.config, plan.num_ranks
    yield _smaller(config, gpus)
    if not config.engine.activation_checkpointing:
        on = _with_engine(config, activation_checkpointing=True)
        yield iter([("engine.activation_checkpointing=true", on, gpus)])
    if config.engine.zero_stage < 3:
        yield iter(
            (f"engine.zero_stage={stage}", _with_engine(config, zero_stage=stage), gpus)
            for stage in range(config.engine.zero_stage + 1, 4)
        )
    yield iter((f"--gpus {times * gpus}", config, times * gpus) for times in (2, 4, MOST_GPUS))
    if not offload_of(config)["optimizer"]:
        name = "configs/deepspeed/zero3_offload.json"
        best = _with_engine(config, deepspeed=name, zero_stage=3, activation_checkpointing=True)
        settings = f"engine.deepspeed={name} engine.zero_stage=3"
        settings += " engine.activation_checkpointing=true"
        yield iter([(settings, best, gpus)])
        yield iter(
            (f"{settings} {text}", smaller, gpus) for text, smaller, _ in _smaller(best, gpus)
        )


def _smaller(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    tokens = config.train.micro_batch_tokens // 2
    while tokens >= SMALLEST:
        train = config.train.model_copy(update={"micro_batch_tokens": tokens})
        yield f"train.micro_batch_tokens={tokens}", config.model_copy(update={"train": train}), gpus
        tokens //= 2


def _with_engine(config: Config, **update: object) -> Config:
    engine = config.engine.model_copy(update=update)
    return config.model_copy(update={"engine": engine})
