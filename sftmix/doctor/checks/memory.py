"""Memory of the machine and of its GPUs, compared with what the model states need."""

from __future__ import annotations

from sftmix.cluster.environment import machine_bytes
from sftmix.doctor.checks.gpus import Gpu
from sftmix.doctor.findings import Finding, Verdict
from sftmix.errors import SftmixError, counted, gib
from sftmix.planning.states import Need

ITEM = "memory"


def check_machine(
    need: Need | None, *, has_gpu: bool, memory: tuple[int, int] | None = None
) -> list[Finding]:
    """The host may hold the whole model while it is loaded, and on CPUs or with offload also the
    states of its ranks."""
    total, available = memory or machine_bytes()
    facts = {"total_bytes": total, "available_bytes": available}
    have = f"{gib(total)}, {gib(available)} of it available"
    if need is None:
        return [Finding(ITEM, "ok", f"{have}.", facts=facts)]
    needed = need.host_bytes(has_gpu=has_gpu)
    facts["needed_bytes"] = needed
    found = f"{have}; the model ({need.described}) needs {gib(needed)} here, without activations."
    remedy = (
        "Use more nodes, engine.zero_stage=3, or a smaller model."
        if need.num_ranks > 1
        else "Use more ranks, or a smaller model."
    )
    return [
        Finding(
            ITEM,
            _verdict(needed, total, available),
            found,
            remedy if needed > 0.8 * available else "",
            facts,
        )
    ]


def planned_bytes(need: Need) -> tuple[float, str]:
    """Returns what a rank needs at the peak of a step, and when that is; of a model that cannot be
    traced its states, without activations."""
    from sftmix.planning.plan import memory_on_gpu
    from sftmix.planning.workload import data_of

    data = data_of(need.config, examples=None, tokens=None)
    try:
        memory = memory_on_gpu(need.config, num_ranks=need.num_ranks, data=data)
    except SftmixError as error:
        return need.gpu_bytes, f"without activations ({error})"
    return memory.total, f"at its peak in the {memory.peak_phase} (`sftmix plan` has the items)"


def check_gpus(
    need: Need | None, gpus: list[Gpu], *, planned: tuple[float, str] | None = None
) -> list[Finding]:
    """Each GPU holds one rank's shard of the states, and the activations of its micro-batch.
    planned: of `planned_bytes`; default: the states alone."""
    if need is None or not gpus:
        return []
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes - gpu.used_bytes)
    free = smallest.total_bytes - smallest.used_bytes
    findings = []
    if need.local_ranks > len(gpus):
        found = f"{need.local_ranks} ranks are to run here on {counted(len(gpus), 'GPU')}."
        findings.append(
            Finding(
                "GPU memory", "bad", found, f"Use engine.num_processes={len(gpus)}, or more nodes."
            )
        )
    needed, when = planned or (need.gpu_bytes, "without activations")
    verdict = _verdict(needed, smallest.total_bytes, free)
    found = (
        f"each of {counted(need.num_ranks, 'rank')} needs {gib(needed)} "
        f"under ZeRO stage {need.config.engine.zero_stage}, {when}; "
        f"GPU {smallest.index} has {gib(free)} free of {gib(smallest.total_bytes)}."
    )
    remedy = (
        "Use more GPUs, a higher engine.zero_stage, or"
        " engine.deepspeed=configs/deepspeed/zero3_offload.json."
    )
    return [
        *findings,
        Finding(
            "GPU memory",
            verdict,
            found,
            remedy if needed > 0.8 * free else "",
            {"needed_bytes": needed, "free_bytes": free},
        ),
    ]


def _verdict(needed: float, total: int, available: int) -> Verdict:
    return "bad" if needed > total else "warning" if needed > 0.8 * available else "ok"
