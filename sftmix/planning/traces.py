"""Traces of a training step, each made by a process of its own (`trace_worker.py`), and kept.

A trace is of rank 0 of a small world with one shape of micro-batch. `planning/step.py` scales it to
other micro-batches and larger worlds.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sftmix.config.deepspeed_json import read_deepspeed_json, zero_section
from sftmix.config.schema import Config, ModelConfig
from sftmix.config.shipped import CONFIGS
from sftmix.engine.counting import Counted
from sftmix.errors import ConfigError, SftmixError
from sftmix.storage.files import write_text
from sftmix.storage.provenance import fingerprint, versions

LARGEST_WORLD = 8  # larger ones follow by formula: DeepSpeed's Python work grows with the ranks
DEEPEST = 48  # layers; deeper models follow from two shallower ones
SHALLOW = (24, 32)


@dataclass(frozen=True)
class Trace:
    """What a step does. tokens, responses: of its micro-batch, of `documents` equal documents.
    packs: not padded. one, two: a step of one micro-batch, and of two."""

    world_size: int
    tokens: int
    responses: int
    documents: int
    num_parameters: int
    num_trained_parameters: int
    packs: bool
    vocab_size: int
    one: Counted
    two: Counted

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Trace:
        """Returns what `trace_worker` wrote."""
        steps = {name: Counted.from_json(content[name]) for name in ("one", "two")}
        return cls(**{**content, **steps})


def with_known_architecture(model: ModelConfig) -> ModelConfig:
    """Returns the model with the architecture that the package has for its Hub name, so that
    nothing is downloaded; unchanged for other models."""
    import yaml

    if model.path is None or model.revision is not None or Path(model.path).is_dir():
        return model
    for file in sorted(CONFIGS.glob("models/*.yaml")):
        if yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["path"] == model.path:
            known = CONFIGS / "architectures" / f"{file.stem}.json"
            architecture = json.loads(known.read_text(encoding="utf-8"))
            return model.model_copy(update={"path": None, "architecture": architecture})
    return model


def traced_world(config: Config, num_ranks: int) -> int:
    """Returns the number of ranks to trace for a run of `num_ranks`."""
    zero = zero_section(config)
    within = int(zero.get("zero_hpz_partition_size", 1))  # ranks that hold all weights together
    return min(num_ranks, max(LARGEST_WORLD, 2 * within if within > 1 else 0))


def trace_step(
    config: Config, *, world_size: int, max_tokens: int, depth: int | None = None
) -> Trace:
    """Returns the trace of a training step of `config.model`.

    max_tokens: of a micro-batch. depth: layers, instead of the model's own. Raises SftmixError if
    the step cannot be traced: a model that torch cannot run without contents.
    """
    return _run([_request(config, world_size, max_tokens, depth)])[0]


def trace_of(config: Config, *, world_size: int, max_tokens: int) -> Trace:
    """Returns the trace at full depth; of a model of more than DEEPEST layers the straight line
    through two shallower ones, which are traced side by side."""
    layers = num_layers(config.model)
    if layers <= DEEPEST:
        return trace_step(config, world_size=world_size, max_tokens=max_tokens)
    requests = [_request(config, world_size, max_tokens, depth) for depth in SHALLOW]
    first, second = _run(requests)
    return _deeper(first, second, (layers - SHALLOW[1]) / (SHALLOW[1] - SHALLOW[0]))


def num_layers(model: ModelConfig) -> int:
    """Returns the layers of a model; 0 if its config does not say. Raises ConfigError for one that
    reads images."""
    from sftmix.engine.loading import hf_config
    from sftmix.engine.vision import reads_images

    settings = hf_config(model, needs_weights=False)
    if reads_images(settings):
        raise ConfigError(
            f"a {settings.model_type} also reads images, and a plan counts no images. Plan its"
            " language model alone: give its `text_config` as model.architecture."
        )
    return int(getattr(settings.get_text_config(), "num_hidden_layers", 0))


def _deeper(first: Trace, second: Trace, times: float) -> Trace:
    """Returns `second` plus `times` what it has more than `first`."""

    def more(a: Counted, b: Counted) -> Counted:
        found = Counted()
        found.add(b, 1 + times)
        found.add(a, -times)
        return found

    def number(name: str) -> int:
        a, b = getattr(first, name), getattr(second, name)
        return round(b + times * (b - a))

    return Trace(
        **{
            **vars(second),
            "num_parameters": number("num_parameters"),
            "num_trained_parameters": number("num_trained_parameters"),
            "one": more(first.one, second.one),
            "two": more(first.two, second.two),
        }
    )


def _request(config: Config, world_size: int, max_tokens: int, depth: int | None) -> dict[str, Any]:
    given = config.model_dump(mode="json")
    given["tokenizer"] = {"path": "none"}  # it is not read
    settings = read_deepspeed_json(config.engine.deepspeed) if config.engine.deepspeed else {}
    zero = settings.get("zero_optimization", {})
    # DeepSpeed's CPU Adam wants a compiler, and its quantisation a GPU; what offloading and ZeRO++
    # change is added by formula.
    left_out = ("offload_", "zero_quantized_")
    kept_keys = {key: value for key, value in zero.items() if not key.startswith(left_out)}
    settings = {**settings, "zero_optimization": kept_keys} if zero else settings
    content: dict[str, Any] = {
        "config": given,
        "deepspeed": settings,
        "world_size": world_size,
        "max_tokens": max_tokens,
        "depth": depth,
    }
    kept = ("model", "engine", "objective")
    key: dict[str, Any] = {
        **content,
        "config": {name: content["config"][name] for name in kept},
        "mixup": [config.mixup.weight > 0, config.mixup.site],
        "clips": config.train.max_grad_norm,
        "versions": versions(),
        "code": _code_fingerprint(),
    }
    if config.model.path is not None and (Path(config.model.path) / "config.json").is_file():
        key["architecture"] = (Path(config.model.path) / "config.json").read_text()
    return {**content, "key": fingerprint(key)}


@functools.cache
def _code_fingerprint() -> str:
    """Returns a digest of the code that decides what a trace holds."""
    here = Path(__file__).parents[1]
    files = [
        here / "planning/trace_worker.py",
        *sorted((here / "engine").glob("*.py")),
        *sorted((here / "loss").glob("*.py")),
        *sorted((here / "kernels").glob("*.py")),
    ]
    return fingerprint([file.read_text(encoding="utf-8") for file in files])


def cache_folder() -> Path:
    """Returns where traces are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sftmix" / "traces"


def start_python(arguments: list[str], environment: dict[str, str], output: IO[str]) -> Any:
    """Starts `python ARGUMENTS`; both of its streams go to a file."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def _run(requests: Sequence[dict[str, Any]]) -> list[Trace]:
    """Returns the traces of these requests: kept ones, and new ones side by side."""
    folder = cache_folder()
    files = [folder / f"{request['key']}.json" for request in requests]
    missing = [pair for pair in zip(requests, files, strict=True) if not pair[1].is_file()]
    threads = {"OMP_NUM_THREADS": "1"} if len(missing) > 1 else {}
    environment = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="sftmix-trace") as work, ExitStack() as logs:
        started = []
        for number, (request, file) in enumerate(missing):
            given, made = (Path(work) / f"{number}.{kind}.json" for kind in ("request", "trace"))
            given.write_text(json.dumps(request))
            log = logs.enter_context(Path(work, f"{number}.log").open("w+"))
            command = ["-m", "sftmix.planning.trace_worker", str(given), str(made)]
            started.append((start_python(command, environment, log), log, made, file))
        for process, log, made, file in started:
            if process.wait():
                log.seek(0)
                lines = [line for line in log if line.strip()]
                reason = lines[-1].strip().removeprefix("[rank0]: ") if lines else "no message"
                raise SftmixError(
                    f"the training step cannot be traced: {reason[:400]} Check that the model runs"
                    " (`sftmix run`), and report this with the model's config.json."
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, made.read_text(encoding="utf-8"))
    return [Trace.from_json(json.loads(file.read_text(encoding="utf-8"))) for file in files]
