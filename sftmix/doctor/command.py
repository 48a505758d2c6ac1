"""`sftmix doctor`: every item in order, a line for each verdict, a summary, and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from sftmix.cluster.hostfile import read_hostfile
from sftmix.config.schema import Config
from sftmix.doctor.checks import build, gpus, memory, network, nodes, ranks, storage, versions
from sftmix.doctor.checks.versions import identity
from sftmix.doctor.findings import Finding, count, examine
from sftmix.errors import SftmixError, counted
from sftmix.planning.states import Need

CONFIG, REFUSED = "config", "sftmix run refuses it"
Look = tuple[str, Callable[[], list[Finding]]]
Show = Callable[[list[Finding]], None]


def examine_machine(options: argparse.Namespace) -> int:
    """Returns 0 if nothing is bad, 2 if the config is bad (`sftmix run` returns the same code),
    else 1. Raises ConfigError for a hostfile that cannot be used."""
    _choose_accelerator()
    # keep the output of libraries out of the JSON
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        report, findings = _examine_all(options)
    counts = count(findings)
    if options.json:
        print(
            json.dumps(
                {**report, "counts": counts, "findings": [asdict(finding) for finding in findings]},
                default=str,
            )
        )
    else:
        print(
            f"{counts['ok']} ok, {counted(counts['warning'], 'warning')}, {counts['bad']} bad,"
            f" {counts['skipped']} skipped"
        )
    if any(finding.facts.get(REFUSED) for finding in findings):
        return 2
    return 1 if counts["bad"] else 0


def _examine_all(options: argparse.Namespace) -> tuple[dict[str, Any], list[Finding]]:
    """Returns the report of this machine, for comparison with other nodes, and all findings."""
    findings: list[Finding] = []

    def show(found: list[Finding]) -> None:
        findings.extend(found)
        for finding in [] if options.json else found:
            print(finding.line(), flush=True)

    known = read_hostfile(options.hostfile) if options.hostfile is not None else []
    config = _load(options, show)
    num_nodes = options.nodes or max(1, len(known))
    local_ranks = max(
        (node.slots for node in known), default=config.engine.num_processes if config else 1
    )
    num_ranks = options.ranks or sum(node.slots for node in known) or local_ranks
    if options.ranks:
        local_ranks = -(-num_ranks // num_nodes)
    need = _need(config, num_ranks, local_ranks, show)
    cards: list[gpus.Gpu] = []
    show(examine("GPUs", lambda: _list_gpus(cards)))
    for item, look in _items(config, need, cards, num_nodes=num_nodes, options=options):
        show(examine(item, look))
    report: dict[str, Any] = {"host": socket.gethostname(), "identity": {}}
    if options.json or known:
        show(examine("identity", lambda: report["identity"].update(identity(config)) or []))
    if options.look_for is not None:
        report["sees_run_folder"] = options.look_for.exists()
    if known:
        probe = None
        with ExitStack() as held:
            if config is not None:
                with suppress(OSError):  # other nodes look for this file
                    beside = storage.nearest_folder(config.run.dir)
                    file = held.enter_context(NamedTemporaryFile(prefix=".doctor.", dir=beside))
                    probe = Path(file.name)
            arguments = _arguments(options, probe, num_nodes=num_nodes, num_ranks=num_ranks)
            show(examine(nodes.ITEM, lambda: nodes.check_nodes(known, report, arguments)))
    return report, findings


def _items(
    config: Config | None,
    need: Need | None,
    cards: list[gpus.Gpu],
    *,
    num_nodes: int,
    options: argparse.Namespace,
) -> list[Look]:
    """Returns the items in order, each with its function."""
    offloads = need is not None and need.offload["optimizer"]
    items: list[Look] = [
        ("versions", versions.check_versions),
        (
            "CUDA",
            lambda: versions.check_driver(_torch_cuda(), cards[0].driver if cards else None),
        ),
        ("compiler", lambda: build.check_compiler(has_gpu=bool(cards), offloads=offloads)),
        (build.LOCKS, lambda: build.check_locks(build.extension_folders(), fix=options.fix)),
        (build.LEFTOVERS, build.check_leftovers),
        ("ports", network.check_ports),
        ("host name", lambda: network.check_host_name(num_nodes=num_nodes)),
        ("interfaces", lambda: network.check_interfaces(num_nodes=num_nodes)),
    ]
    if config is not None:
        folder = config.run.dir
        items += [
            ("run folder", lambda: storage.check_writable(folder)),
            ("file system", lambda: storage.check_file_system(folder)),
            ("other runs", lambda: storage.check_writer(folder)),
        ]
    if config is not None and need is not None:
        meaning = (
            f"{config.checkpoint.keep_last} + 1 checkpoints of"
            f" {counted(need.num_trained_parameters, 'parameter')},"
            f" {counted(need.num_exports, 'exported model')}"
        )
        needed = need.disk_bytes
        items.append(
            (
                "free space",
                lambda: storage.check_space(folder, needed_bytes=needed, meaning=meaning),
            )
        )
    items += [
        ("memory", lambda: memory.check_machine(need, has_gpu=bool(cards))),
        ("GPU memory", lambda: _check_gpu_memory(need, cards, is_quick=options.quick)),
        (gpus.ITEM, lambda: gpus.check_health(cards)),
    ]
    if not options.quick:
        items.append(("ranks", lambda: _check_ranks(need, num_gpus=len(cards))))
    return items


def _check_gpu_memory(need: Need | None, cards: list[gpus.Gpu], *, is_quick: bool) -> list[Finding]:
    has_time = need is not None and bool(cards) and not is_quick  # a trace takes up to a minute
    planned = memory.planned_bytes(need) if need is not None and has_time else None
    return memory.check_gpus(need, cards, planned=planned)


def _check_ranks(need: Need | None, *, num_gpus: int) -> list[Finding]:
    on_gpus = num_gpus >= 2 and _torch_cuda() is not None
    wanted = need.local_ranks if need is not None and need.local_ranks > 1 else 2
    num_ranks = min(wanted, num_gpus if on_gpus else max(2, os.cpu_count() or 2))
    result = ranks.run_ranks(num_ranks, ["gradients", "collectives"], on_gpus=on_gpus)
    return [
        *examine("ZeRO-3 gradients", lambda: ranks.check_gradients(result)),
        *examine("bandwidth", lambda: ranks.check_bandwidth(result, need)),
    ]


def _load(options: argparse.Namespace, show: Show) -> Config | None:
    """Returns the config, checked as in a run; an error becomes a finding."""
    if options.config is None:
        return None
    loaded: list[Config] = []

    def look() -> list[Finding]:
        from sftmix.config.reader import load_config
        from sftmix.pipeline.preflight import check

        try:
            loaded.append(load_config(options.config, options.overrides))
            check(loaded[0])
        except SftmixError as error:
            return [Finding(CONFIG, "bad", str(error), facts={REFUSED: True})]
        return [Finding(CONFIG, "ok", f"{options.config} loads, and a run would start.")]

    show(examine(CONFIG, look))
    return loaded[0] if loaded else None


def _need(config: Config | None, num_ranks: int, local_ranks: int, show: Show) -> Need | None:
    """Returns the need of the config's model; a model that cannot be examined becomes a finding."""
    if config is None:
        return None
    need = Need(config, num_ranks, local_ranks)

    def look() -> list[Finding]:
        words = f"{need.described}, {need.bytes_per_weight} bytes each"
        parts = [name for name, is_moved in need.offload.items() if is_moved]
        offloaded = ", offloaded: " + ", ".join(parts) if parts else ""
        return [Finding("model", "ok", f"{words}, {counted(num_ranks, 'rank')}{offloaded}.")]

    found = examine("model", look)
    show(found)
    return need if found[0].verdict == "ok" else None


def _list_gpus(cards: list[gpus.Gpu]) -> list[Finding]:
    cards += gpus.list_gpus()
    return []


def _choose_accelerator() -> None:
    """Tells DeepSpeed to use the CPU if there is no GPU, which avoids its warning."""
    with suppress(ImportError, OSError):  # a failing import of torch becomes a finding later
        from sftmix.engine.ranks import has_gpu

        if not has_gpu():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _arguments(
    options: argparse.Namespace, probe: Path | None, *, num_nodes: int, num_ranks: int
) -> list[str]:
    """Returns the arguments of the doctor on another node."""
    return [
        "--json",
        "--quick",
        "--nodes",
        str(num_nodes),
        "--ranks",
        str(num_ranks),
        *(["--look-for", str(probe)] if probe is not None else []),
        *([options.config, *options.overrides] if options.config is not None else []),
    ]
