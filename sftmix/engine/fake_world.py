"""The engine in a world of W ranks that does not exist: the real DeepSpeed on tensors without
contents, rank 0 of a process group that sends nothing.

So what ZeRO gathers, reduces and keeps is not modelled; it is what the installed DeepSpeed does.
The process belongs to the fake world afterwards: start one for each trace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.batches.documents import Documents
from sftmix.config.schema import Config
from sftmix.engine.counting import PHASES, Counted, Counting
from sftmix.engine.deepspeed_internals import build_no_extension, import_deepspeed, on_fetch
from sftmix.engine.engine import Engine
from sftmix.engine.ranks import Ranks
from sftmix.loss import packed_attention
from sftmix.loss.logit_transform import LogitTransform, ProbeRequest
from sftmix.loss.objective import Objective
from sftmix.loss.packed_attention import CHECKED_LENGTHS

MAX_STEPS = 8  # ZeRO-3 learns the order of the modules in the first ones


@dataclass(frozen=True)
class Trace:
    """What an optimiser step of one rank does, once it does the same as the step before. packs:
    whether the engine packs the examples, or pads them. one: a step of one micro-batch. two: of
    two."""

    num_parameters: int
    num_trained_parameters: int
    packs: bool
    one: Counted
    two: Counted


def join_fake_world(world_size: int) -> Ranks:
    """Makes this process rank 0 of `world_size` ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        DS_ACCELERATOR="cpu",
    )
    deepspeed = import_deepspeed()
    import torch.distributed.nn

    build_no_extension()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    return FakeRanks(0, world_size, 0, torch.device("cpu"))


def _probe(model: Any, device: torch.device, *, packs: bool = False) -> LogitTransform:
    """Runs the forward that looks for a logit transform, since ZeRO-3 remembers the order of the
    modules of its first forwards, and returns none."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    documents = Documents.of((2,)).to(device) if packs else None
    model(ids, torch.ones_like(ids), ProbeRequest(torch.zeros(4, device=device)), documents)
    return LogitTransform()


def _with_contents(function: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return call


def _try_packed(packed: Any, alone: Any, vocab_size: int, device: torch.device) -> None:
    """Runs the forwards that compare packed and padded attention, as `_probe` does."""
    for length in CHECKED_LENGTHS:
        alone(torch.zeros(1, length, dtype=torch.int64, device=device))
    ids = torch.zeros(1, sum(CHECKED_LENGTHS), dtype=torch.int64, device=device)
    for _ in range(2):
        packed(ids, Documents.of(CHECKED_LENGTHS).to(device))


def _convert_in_place(module: Any, convert: Any, recurse: bool = True) -> Any:
    """In the place of `nn.Module._apply`, which exchanges tensors without contents for others, and
    cannot where someone else refers to them."""
    for each in module.modules() if recurse else [module]:
        for parameter in each._parameters.values():
            if parameter is not None:
                parameter.data = convert(parameter.data)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = convert(buffer)
    return module


def _without_weights(model: Any, config: Any, *, dtype: torch.dtype, seed: int) -> Any:
    """In the place of `load_source`."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    name = model.attn_implementation
    with no_init_weights():
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            **({"attn_implementation": name} if name else {}),
        )


def _any_number(mode: Any, function: Any, tensor: Any) -> float | int | bool:
    """The value of a tensor that has none: no NaN is found, and a norm is 1."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 0


class FakeRanks(Ranks):
    """Rank 0, and no other answers."""

    def first_text(self, text: str) -> str:
        """Returns this rank's text."""
        return text

    def same_as_main(self, value: bool) -> bool:
        """Returns this rank's value."""
        return value


@contextlib.contextmanager
def without_contents(settings: Any = None) -> Iterator[None]:
    """Within it, tensors have shapes alone, and nothing looks at their values: no weights are read,
    no step is skipped, no model is probed. settings: transformers config of every model; default:
    its own."""
    from torch._subclasses import FakeTensorMode, fake_impls

    nothing: dict[str, Any] = {
        "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks": (
            lambda numbers: None
        ),
        "deepspeed.runtime.zero.utils.get_lst_from_rank0": (lambda numbers: None),
        "sftmix.engine.loading.load_source": _without_weights,
        "sftmix.engine.loading.copy_weights": lambda source, shell, buffers: None,
        "sftmix.engine.loading.tensors_of_files": lambda *_, **__: {},
        "torch.nn.Module._apply": _convert_in_place,
        "sftmix.engine.engine.check_dtypes": lambda *_: None,
        "sftmix.engine.engine.is_finite": lambda norm: True,
        "sftmix.engine.engine.find_logit_transform": _probe,
        "sftmix.engine.engine.why_not_packed": _try_packed,
        "sftmix.loss.packed_attention._window_of": _with_contents(packed_attention._window_of),
    }
    if settings is not None:
        nothing["sftmix.engine.engine.hf_config"] = lambda *_: settings
    with contextlib.ExitStack() as stack:
        for name, replacement in nothing.items():
            stack.enter_context(mock.patch(name, replacement))
        scalar = {torch.ops.aten._local_scalar_dense.default: _any_number}
        stack.enter_context(mock.patch.dict(fake_impls.op_implementations_dict, scalar))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def trace(config: Config, ranks: Ranks, batch: MicroBatch, counts: StepCounts) -> Trace:
    """Returns what a step of SFTMix does on this rank, of one micro-batch and of the same one
    twice. ranks: of `join_fake_world`, within `without_contents`; or real ones. batch: equal
    examples, not packed; the engine decides that.
    Raises RuntimeError if no step does the same as the one before."""
    seen = Counting(*divisors(batch))
    objective = Objective(mixup_weight=config.mixup.weight, next_token=config.objective)
    with seen, on_fetch(seen.note_hook):
        engine = Engine(config, config.model, ranks, None, train=config.train, timer=_Phases(seen))
        batch = _with_contents(laid_out)(batch, packs=engine.packs)

        def step(num_micro_batches: int) -> Counted:
            seen.start_again()
            for number in range(num_micro_batches):
                is_last = number == num_micro_batches - 1
                engine.forward_backward(batch, counts, objective, is_last=is_last)
                seen.name_purposes(engine.module, engine.optimizer)  # some are new in each step
            engine.step(learning_rate=config.train.learning_rate)
            return seen.start_again()

        before, one = step(1), step(1)
        for _ in range(MAX_STEPS):
            if ranks.same_as_main(one == before):  # all take the same number of steps
                break
            before, one = one, step(1)
        else:
            raise RuntimeError(f"after {MAX_STEPS} steps no two of them are alike")
        two = step(2)
    found = Trace(engine.num_parameters, engine.num_trained_parameters, engine.packs, one, two)
    engine.close()
    return found


def laid_out(batch: MicroBatch, *, packs: bool) -> MicroBatch:
    """Returns the examples packed, or padded: without a token that is padding, transformers drops
    the mask."""
    if packs:
        return batch.packed()
    mask = batch.attention_mask.clone()
    mask[-1, 0] = 0
    return replace(batch, attention_mask=mask)


def divisors(batch: MicroBatch) -> tuple[int, int]:
    """Returns the tokens of a document and its response tokens, for a micro-batch of equal
    ones."""
    count = len(batch.indices)
    return batch.input_ids.numel() // count, len(batch.labels) // count


class _Phases:
    """A timer of the engine that tells the parts of a step apart."""

    def __init__(self, counting: Counting):
        self._counting = counting

    def __call__(self, part: str) -> contextlib.AbstractContextManager[None]:
        if part in PHASES:
            return self._counting.during(part)
        return contextlib.nullcontext()
