"""Runs on every rank: one small SFTMix run again and again, stopped, damaged and resumed in many
ways; writes what came of it (rank 0).

resume_worker.py FOLDER STAGE RESULT [SCENARIO ...]      without names, all scenarios
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import torch
from matchings import match_parts

from sftmix.batches.examples import TokenisedExamples
from sftmix.cluster.liveness.stopping import StopRequest
from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.errors import SftmixError
from sftmix.loss.objective import Objective
from sftmix.storage import faults, provenance
from sftmix.storage.checkpoints import OWN_DIGEST
from sftmix.storage.files import sha256_of_file, write_json
from sftmix.train import checkpointing
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.log import (
    RunLog,
    read_metrics,
)
from sftmix.train.loop import TrainingRun, train
from sftmix.train.meter import StepTrace
from sftmix.train.plan import TrainingPlan
from sftmix.train.skipped_steps import SkippedSteps

FOLDER, STAGE, RESULT = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
ranks = init_ranks()
tokenizer = tokenizer_from(FOLDER / "data" / "tokenizer")
examples = TokenisedExamples(FOLDER / "data" / "train.arrow")
parts = np.where(np.random.default_rng(0).random(len(examples)) < 0.5, "confident", "unconfident")
plan = TrainingPlan(
    match_parts(parts, examples.num_response_tokens, seed=0, alpha=0.5), num_epochs=2, batch_size=10
)
WORK = FOLDER / f"work-{STAGE}-{ranks.world_size}"
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_dropout": float(os.environ.get("DROPOUT", "0.1")),
}
LORA = (
    {"rank": 2, "dropout": float(os.environ.get("DROPOUT", "0.1"))}
    if "LORA" in os.environ
    else None
)


def config_of(*, persistent, seed=0, **checkpoint):
    deepspeed = None
    if not persistent:
        WORK.mkdir(parents=True, exist_ok=True)
        deepspeed = WORK / "all_sharded.json"
        deepspeed.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return Config.model_validate(
        {
            "run": {"dir": str(WORK), "seed": seed},
            "model": {"architecture": ARCHITECTURE, "lora": LORA},
            "tokenizer": {"path": str(FOLDER / "data" / "tokenizer")},
            "data": {"generator": {}},
            "train": {"learning_rate": 3e-3, "micro_batch_tokens": 300},
            "engine": {
                "zero_stage": STAGE,
                "precision": os.environ.get("PRECISION", "fp32"),
                "deepspeed": deepspeed,
            },
            "checkpoint": checkpoint,
        }
    )


class StopAfter(StopRequest):
    """Asks to stop after a step, on one rank alone."""

    def __init__(self, step, rank):
        super().__init__(WORK)
        self._left = step if ranks.rank == rank else None

    @property
    def reason(self):
        if self._left is not None:
            self._left -= 1
        return "a test asked" if self._left is not None and self._left <= 0 else None


def run(
    name,
    *,
    stop_after=None,
    stop_rank=0,
    fault="",
    limit=5,
    fingerprint="f",
    persistent=LORA is None,
    **checkpoint,
):
    """Trains in the work folder `name` until the end, or until it is stopped; returns losses,
    weights and the error."""
    faults._hits.clear()
    os.environ["SFTMIX_FAULT"] = fault
    if not fault:
        del os.environ["SFTMIX_FAULT"]
    config = config_of(persistent=persistent, every_minutes=None, **checkpoint)
    kept = WORK / name / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
    log = RunLog(
        "test",
        ranks,
        metrics=kept / "metrics.jsonl",
        tensorboard=None,
        every_steps=2,
        has_mixup=True,
        has_router=False,
    )
    stop = StopAfter(stop_after or 10**9, stop_rank)
    identity = {
        "fingerprint": fingerprint,
        "settings": {"learning_rate": fingerprint},
        "inputs": {},
    }
    checkpoints = TrainingCheckpoints(
        ranks, WORK / name / "checkpoints", kept, config.checkpoint, stop, **identity
    )
    skipped = SkippedSteps(ranks, kept / "skipped_steps.jsonl", examples.example_ids, limit=limit)
    error = None
    try:
        train(
            TrainingRun(
                engine=engine,
                examples=examples,
                plan=plan,
                objective=Objective(0.2),
                settings=config.train,
                seed=1,
                pad_id=tokenizer.pad_token_id,
                checkpoint_steps=[],
                save_checkpoint=lambda step: None,
                log=log,
                checkpoints=checkpoints,
                skipped=skipped,
                trace=StepTrace(None, kept / "trace.json", ranks.device),
            )
        )
    except SftmixError as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        os.environ.pop("SFTMIX_FAULT", None)
    digest = hashlib.sha256()
    for _, tensor in engine.named_tensors():
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    log.finish()
    engine.close()
    ranks.barrier()
    errors = ranks.gather_texts(error or "")
    lines = read_metrics(kept / "metrics.jsonl") if ranks.is_main else []
    measured = ("time/", "tokens/", "memory/", "flops/")
    return {
        "lines": [
            {key: value for key, value in line.items() if not key.startswith(measured)}
            for line in lines
        ],
        "weights": digest.hexdigest(),
        "errors": errors,
        "steps": checkpoints.checkpoints.steps(),
        "left": sorted(
            path.name for path in (WORK / name / "checkpoints").glob("*") if path.is_dir()
        ),
    }


def fresh(name, source=None):
    """Makes an empty work folder, or a copy of another."""
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(WORK / name, ignore_errors=True)
        if source is not None:
            shutil.copytree(source if isinstance(source, Path) else WORK / source, WORK / name)
    ranks.barrier()
    return name


def files_of(name, step):
    folder = WORK / name / "checkpoints" / f"step_{step:06d}"
    return sorted(path.name for path in folder.iterdir())


def change(name, step, file, how):
    """Damages a file of a checkpoint, on rank 0."""
    if ranks.is_main:
        path = WORK / name / "checkpoints" / f"step_{step:06d}" / file
        content = bytearray(path.read_bytes())
        if how == "missing":
            path.unlink()
        elif how == "flipped":
            rng = np.random.default_rng(len(content))
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(content)
        else:
            path.write_bytes(
                content[
                    : {
                        "empty": 0,
                        "one byte": 1,
                        "half": len(content) // 2,
                        "one short": len(content) - 1,
                    }[how]
                ]
            )
    ranks.barrier()


def rewrite_manifest(name, step, change):
    """Changes a checkpoint's manifest so that it still vouches for itself."""
    path = WORK / name / "checkpoints" / f"step_{step:06d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["facts"][OWN_DIGEST]
    manifest["facts"][OWN_DIGEST] = provenance.fingerprint(manifest)
    write_json(path, manifest)


def undisturbed():
    return run(fresh("undisturbed"))


def stopped_twice():
    name = fresh("stopped")
    first = run(name, stop_after=3, stop_rank=ranks.world_size - 1, every_steps=2)
    second = run(name, stop_after=4, every_steps=3)
    return [first, second, run(name)]


def in_background():
    name = fresh("background")
    first = run(name, stop_after=8, every_steps=3, asynchronous=True)
    return [first, run(name, every_steps=2, asynchronous=True)]


def retention():
    return run(fresh("retention"), every_steps=1, keep_last=2, keep_every=4)


def two_checkpoints():
    """A folder with the checkpoints of steps 3 and 6, which other scenarios copy."""
    return run(fresh("two"), stop_after=6, every_steps=3)


def damaged():
    """Every damage of the manifest, and of each other file one, in turn; with EVERY_DAMAGE all."""
    results = {}
    ways = ("flipped", "missing", "empty", "one short")
    for number, file in enumerate(files_of("two", 6)):
        for how in ways:
            if (
                "EVERY_DAMAGE" in os.environ
                or file == "manifest.json"
                or how == ways[number % len(ways)]
            ):
                name = fresh("damaged", "two")
                change(name, 6, file, how)
                results[f"{file} {how}"] = run(name, stop_after=1)
    return results


def damaged_output():
    """A finished output of the stage, for which its checkpoints vouch, is changed."""
    name = fresh("output")
    output = WORK / name / "kept" / "model.bin"
    for content in (b"whole", b"whale"):
        if ranks.is_main:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(content)
        ranks.barrier()
        result = run(name, stop_after=4 if content == b"whole" else None, every_steps=2)
    return result


def hints():
    """`latest` says nothing, or nonsense; junk lies about; the clock was set back; files of two
    steps and of ranks are swapped."""
    results = {}
    for text in (None, "garbage", "../../etc", "step_000099"):
        name = fresh("hints", "two")
        if ranks.is_main:
            latest = WORK / name / "checkpoints" / "latest"
            latest.unlink()
            if text is not None:
                latest.write_text(text)
            (WORK / name / "checkpoints" / "step_000006" / "junk.pt").write_bytes(b"junk")
            (WORK / name / "checkpoints" / "step_000099").mkdir()
            os.utime(WORK / name / "checkpoints" / "step_000006" / "manifest.json", (0, 0))
        results[f"latest {text!r}"] = run(name, stop_after=1)
    for title, one, other in (
        ("steps", "step_000006", "step_000003"),
        ("ranks", "step_000006", "step_000006"),
    ):
        name = fresh("hints", "two")
        if ranks.is_main:
            folder = WORK / name / "checkpoints"
            files = sorted((folder / one).glob("*optim_states.pt"))
            first, second = (
                files[0],
                files[-1] if title == "ranks" else folder / other / files[0].name,
            )
            content, swapped = first.read_bytes(), second.read_bytes()
            first.write_bytes(swapped)
            second.write_bytes(content)
        results[f"swapped {title}"] = run(name, stop_after=1)
    return results


def full_disk():
    """Every write and flush of a save fails once, on the last rank alone."""
    results = {}
    last = ranks.world_size - 1
    for site, action in (
        ("checkpoint.write", "enospc"),
        ("checkpoint.flush", "eio"),
        ("checkpoint.write", "edquot"),
        ("checkpoint.write", "erofs"),
    ):
        for hit in ("1", "2", "20") if action == "enospc" else ("1",):
            name = fresh("full", "two")
            results[f"{site} {hit} {action}"] = run(
                name, every_steps=2, fault=f"{site}:{last}:{hit}:{action}"
            )
            if action == "enospc":
                results[f"{site} {hit} {action} again"] = run(name)
    for site in ("checkpoint.manifest", "checkpoint.rename"):
        name = fresh("full", "two")
        results[f"{site} 1 eio"] = run(name, every_steps=2, fault=f"{site}:0:1:eio")
        results[f"{site} 1 eio again"] = run(name)
    return results


def small_disk():
    """A real file system that is full after the first checkpoint, a little further on in each
    trial, so that another file is hit."""
    results = {}
    size = sum(
        (WORK / "two" / "checkpoints" / "step_000003" / file).stat().st_size
        for file in files_of("two", 3)
    )
    for tenth in (2, 5, 8, 0):  # 0: the estimate before the save is left on
        name, mounted = fresh("small"), WORK / "small" / "checkpoints"
        is_mounted = False
        if ranks.is_main:
            mounted.mkdir(parents=True)
            # DeepSpeed copies two scripts of its own beside a checkpoint
            room = size + size * (tenth or 5) // 10 + 70_000
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(mounted)],
                check=False,
                capture_output=True,
            )
            is_mounted = done.returncode == 0
        if not ranks.same_as_main(is_mounted):
            return "no file system can be mounted here"
        before = checkpointing.check_space
        if tenth:
            checkpointing.check_space = lambda folder, needed: None
        results[str(tenth)] = run(name, every_steps=3)
        checkpointing.check_space = before
        ranks.barrier()
        if ranks.is_main:
            subprocess.run(["umount", str(mounted)], check=True)
        ranks.barrier()
    return results


def short_writes():
    return run(fresh("short"), stop_after=4, fault="checkpoint.write:*:*:short-write"), run("short")


def slow_rank():
    """With weights on all ranks, whose gathering in DeepSpeed's save is a barrier that hides a late
    rank, and without any."""
    os.environ["SFTMIX_FAULT_SECONDS"] = "1"
    results = []
    for persistent in (True, False):
        name = fresh("slow")
        fault = f"checkpoint.write:{ranks.world_size - 1}:1:sleep"
        results += [
            run(name, stop_after=4, persistent=persistent, every_steps=2, fault=fault),
            run(name, persistent=persistent),
        ]
    return results


def other_run():
    return run(fresh("other", "two"), fingerprint="g")


def other_base():
    """Adapters are resumed beside other weights, which the settings do not tell."""
    return run(fresh("base", "two"), seed=1)


def payload():
    """A state file that runs code when it is unpickled, with a manifest that fits it."""

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {WORK / 'payload-has-run'}",))

    name = fresh("payload", "two")
    if ranks.is_main:
        folder = WORK / name / "checkpoints" / "step_000006"
        for path in folder.glob("*_states.pt"):
            torch.save({"module": Payload(), "optimizer_state_dict": Payload()}, path)

        def vouch(manifest):
            for file, entry in manifest["files"].items():
                entry |= {
                    "size": (folder / file).stat().st_size,
                    "sha256": sha256_of_file(folder / file),
                }

        rewrite_manifest(name, 6, vouch)
    ranks.barrier()
    try:
        run(name)
        refused = ""
    except Exception as error:
        refused = type(error).__name__
    return {"refused": refused, "has_run": (WORK / "payload-has-run").exists()}


def as_if_from_other_ranks():
    """The way through DeepSpeed's universal form, on as many ranks as before."""
    name = fresh("universal", "two")
    if ranks.is_main:
        rewrite_manifest(name, 6, lambda manifest: manifest["facts"].update(world_size=99))
    ranks.barrier()
    return run(name)


def late_names():
    """A network file system: what rank 0 makes in the checkpoint folder is seen by the others three
    seconds later."""
    name = fresh("late")
    before = os.stat, os.listdir, os.open
    if not ranks.is_main:
        watched = f"{WORK / name / 'checkpoints'}/"

        def check(path):
            text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if text.startswith(watched):
                folder = watched + text[len(watched) :].split("/")[0]
                if time.time() - before[0](folder).st_ctime < 3 and folder not in seen:
                    hidden.add(folder)
                    raise FileNotFoundError(errno.ENOENT, "not seen yet", text)
                seen.add(folder)

        def slow(function):
            def call(path, *arguments, **options):
                check(path)
                return function(path, *arguments, **options)

            return call

        seen, hidden = set(), set()
        os.stat, os.listdir, os.open = (slow(function) for function in before)
    try:
        results = [run(name, stop_after=3, every_steps=2), run(name)]
    finally:
        os.stat, os.listdir, os.open = before
    return results, [
        text
        for text in ranks.gather_texts("" if ranks.is_main else " ".join(sorted(hidden)))
        if text
    ]


def from_other_ranks():
    """Takes up what another number of ranks has left in this stage's folder."""
    results = {}
    for source in sorted(FOLDER.glob(f"work-{STAGE}-*/two")):
        if source.parent != WORK:
            results[source.parent.name.rsplit("-", 1)[1]] = run(fresh("elastic", source))
    return results


SCENARIOS = [
    undisturbed,
    stopped_twice,
    in_background,
    retention,
    two_checkpoints,
    damaged,
    damaged_output,
    hints,
    full_disk,
    small_disk,
    short_writes,
    slow_rank,
    other_run,
    payload,
    as_if_from_other_ranks,
    late_names,
    from_other_ranks,
]
SCENARIOS += [other_base] if LORA else []
wanted = sys.argv[4:]
results = {
    scenario.__name__: scenario()
    for scenario in SCENARIOS
    if not wanted or scenario.__name__ in wanted
}
if ranks.is_main:
    RESULT.write_text(json.dumps(results))
