"""SFTMix in TRL's trainer, for those who stay with it.

    dataset = with_confidence(dataset, "runs/reference/confidence")
    trainer = SFTMixTrainer(model, SFTMixConfig(...), train_dataset=dataset)

Split, pairs, lam and the loss are those of the engine (`sftmix.pairing`, `sftmix.loss`); sharding,
optimiser, schedule and checkpoints are TRL's. Evaluation is TRL's own: plain next-token loss.

Departs from the engine in what a batch is: TRL fixes the number of examples of a micro-batch, and
fills up the last one of an epoch with examples from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from sftmix.batches.cut import StepCounts
from sftmix.batches.pair_rows import PairRows, pair_rows
from sftmix.confidence.table import named, read_scores
from sftmix.confidence.table_files import string_column
from sftmix.config.schema import MixupConfig
from sftmix.data.conversations import BadRow
from sftmix.data.formats import Columns, detect_format, read_row
from sftmix.data.readers import numbered
from sftmix.errors import ArtifactError, ConfigError, DataError, counted
from sftmix.kernels.backends import BACKENDS
from sftmix.loss.head import computing
from sftmix.loss.logit_transform import LogitTransform, ProbeRequest, find_logit_transform
from sftmix.loss.requests import LossRequest, LossResult
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching
from sftmix.pairing.split import split_values

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("sftmix.integrations.trl needs TRL. Run `pip install sftmix[trl]`") from error

ROW = "sftmix_row"  # column: the position of an example in the prepared data
_MIXUP = MixupConfig()


@dataclass
class SFTMixConfig(SFTConfig):
    """TRL's settings and those of the method. Raises ValueError for settings that it excludes."""

    confidence_column: str = field(
        default="confidence",
        metadata={"help": "Column of the training data; a higher value is more confident."},
    )
    mixup_weight: float = field(
        default=_MIXUP.weight, metadata={"help": "mu: factor of the Mixup loss. 0 is plain SFT."}
    )
    mixup_alpha: float = field(
        default=_MIXUP.alpha,
        metadata={"help": "lam is drawn from Beta(alpha, alpha), once per pair and epoch."},
    )
    kernel_backend: str = field(
        default="auto",
        metadata={"help": f"auto (Triton on a GPU, else PyTorch), {', '.join(BACKENDS)}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        excluded = {
            "packing": self.packing,
            "padding_free": self.padding_free,
            "torch_compile": self.torch_compile,
            "label_smoothing_factor": self.label_smoothing_factor,
            "loss_type": self.loss_type != "nll",
            "train_sampling_strategy": self.train_sampling_strategy != "random",
            "dispatch_batches": self.accelerator_config.dispatch_batches,
            "split_batches": self.accelerator_config.split_batches,
        }
        if wrong := [name for name, is_set in excluded.items() if is_set]:
            raise ValueError(
                f"{', '.join(wrong)}: not with SFTMixTrainer, which pairs examples within a batch"
                " and computes the loss from hidden states. Remove it, or use `sftmix run`."
            )
        if self.per_device_train_batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, expected an"
                " even number: both examples of a pair are in one batch."
            )
        if self.mixup_weight < 0 or self.mixup_alpha <= 0:
            raise ValueError(
                f"mixup_weight is {self.mixup_weight}, expected at least 0; mixup_alpha is"
                f" {self.mixup_alpha}, expected more than 0."
            )
        if self.kernel_backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"kernel_backend is {self.kernel_backend!r}; expected auto, {', '.join(BACKENDS)}."
            )


def with_confidence(
    dataset: Dataset, scores: str | Path, *, revision: str | None = None
) -> Dataset:
    """Returns the data with the columns `example_id` and `confidence` of a score table.

    dataset: rows in one of the formats of docs/data.md. scores: a folder or a Hub dataset of score
    tables (docs/scores.md), or a Parquet file. Examples are found by their content, so files,
    order and further rows of the table do not matter. Raises DataError for a row that cannot be
    read, ArtifactError for an unreadable table and for examples without a score.
    """
    ids: list[str] = []
    times: dict[str, int] = {}
    columns = Columns({}, (), ())
    for place, row in numbered("dataset", dataset):
        try:
            found = read_row(row, detect_format(row, place, columns), columns).content_id
        except BadRow as error:
            raise DataError(f"{place}: {error}. Fix or remove it.") from None
        times[found] = times.get(found, 0) + 1
        ids.append(found if times[found] == 1 else f"{found}-{times[found]}")
    table = read_scores(scores, revision)
    at = pc.index_in(string_column(ids), value_set=table.example_ids).fill_null(-1).to_numpy()
    if missing := [ids[n] for n in np.flatnonzero(at < 0)]:
        raise ArtifactError(
            f"{table.source} has no score for {counted(len(missing), 'example')} of"
            f" {len(ids):,} ({named(missing)}). Score this data (`sftmix score CONFIG`), or use the"
            " data that the table was made from."
        )
    kept = dataset.remove_columns([c for c in ("example_id",) if c in dataset.column_names])
    return kept.add_column("example_id", ids).add_column("confidence", table.values[at])


class PairSampler(Sampler[int]):
    """The examples of an epoch, partners next to each other, each pair at an even place: a batch
    of an even size divides none. Two examples without a partner follow one another.

    epoch: returns the number of the epoch that begins.
    """

    def __init__(self, matching: Matching, epoch: Callable[[], int]):
        self.matching = matching
        self.epoch = epoch
        self.partner: NDArray[np.int64] = np.full(matching.num_examples, -1)
        self.lam: NDArray[np.float64] = np.ones(matching.num_examples)

    def __len__(self) -> int:
        return self.matching.num_examples

    def __iter__(self) -> Iterator[int]:
        drawn = self.matching.units(self.epoch(), 0, self.matching.num_units)
        first, second = drawn.units.T
        is_pair = second >= 0
        self.partner[:] = -1
        self.partner[first[is_pair]] = second[is_pair]
        self.lam[first] = drawn.lam
        waiting: list[int] = []  # an example without a partner, until there is another
        for one, other in drawn.units.tolist():
            if other >= 0:
                yield from (one, other)
            else:
                waiting.append(one)
                if len(waiting) == 2:
                    yield from waiting
                    waiting = []
        yield from waiting


class _Collator:
    """TRL's collator; the rows' positions in the data go along."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(examples)
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([example[ROW] for example in examples])
        return batch


class SFTMixTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer with the loss L = L_NTP + mu L_Mixup of confident and unconfident pairs
    (https://arxiv.org/abs/2410.05248, section 3).

    train_dataset has a column of confidences. The upper half of the examples left after TRL's
    truncation is confident; ties are ordered by `example_id`, where there is one. Both terms are
    means over their own tokens of the whole optimiser step, over all processes and accumulated
    batches. Logs `ntp_loss` and `mixup_loss` besides TRL's figures, which lack the entropy and the
    accuracy in training: there are no logits.

    Raises ConfigError for what the method excludes, DataError for missing or infinite confidences.
    """

    train_dataset: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(self, model: Any, args: SFTMixConfig | None = None, **options: Any):
        args = args or SFTMixConfig(output_dir="trainer_output")
        if not isinstance(args, SFTMixConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}, expected an SFTMixConfig: it has the settings of"
                " the pairs."
            )
        data = options.get("train_dataset")
        if not isinstance(data, Dataset) or args.confidence_column not in data.column_names:
            found = (
                f"has the columns {data.column_names}"
                if isinstance(data, Dataset)
                else f"is a {type(data).__name__}"
            )
            raise DataError(
                f"train_dataset {found}; expected a datasets.Dataset with the column"
                f" {args.confidence_column!r} (`with_confidence` adds it)."
            )
        if options.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func takes the place of the method's loss. Remove it.")
        super().__init__(model, args, **options)
        if self._is_vision_dataset:
            raise ConfigError("SFTMixTrainer has no images yet. Use text alone.")
        parallel = self.accelerator.parallelism_config
        if parallel is not None and parallel.non_data_parallel_size > 1:
            raise ConfigError(
                "SFTMixTrainer works with data parallelism alone (DDP, FSDP, ZeRO), and"
                f" {parallel.non_data_parallel_size} processes share a batch here."
            )
        self.sampler = PairSampler(self._matching(), lambda: int((self.state.epoch or 0) + 1e-6))
        self.train_dataset = self.train_dataset.add_column(ROW, range(len(self.train_dataset)))
        self.data_collator = _Collator(self.data_collator)
        self.loss_is_scaled_for_ga = True  # by the counts of the whole step
        self._counts = StepCounts(0, 0)

    def _matching(self) -> Matching:
        name = self.args.confidence_column
        values = np.asarray(self.train_dataset[name], dtype=np.float64)
        if bad := int((~np.isfinite(values)).sum()):
            raise DataError(
                f"{name} of {counted(bad, 'example')} of train_dataset is missing or not finite,"
                " expected numbers, which can be ranked. Fix or remove these rows."
            )
        if "example_id" in self.train_dataset.column_names:
            ids = list(self.train_dataset["example_id"])
        else:
            ids = [f"{number:012d}" for number in range(len(values))]
        part = np.array(split_values(ids, values))
        confident, middle, unconfident = (
            np.flatnonzero(part == name) for name in (CONFIDENT, MIDDLE, UNCONFIDENT)
        )
        return Matching(confident, unconfident, middle, self.args.seed, self.args.mixup_alpha)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW]

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> PairSampler:
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [self._rows(batch) for batch in batches]
        counts = torch.tensor(
            [sum(len(found.labels) for found in rows), sum(len(found.pairs) for found in rows)]
        ).to(self.accelerator.device)
        self._counts = StepCounts(*self.accelerator.reduce(counts, "sum").tolist())
        return batches, num_items

    def _rows(self, batch: dict[str, Any]) -> PairRows:
        """Returns what the loss reads of a micro-batch: its pairs are neighbours."""
        here = batch[ROW].cpu().numpy()
        pairs = np.flatnonzero(self.sampler.partner[here[:-1]] == here[1:])
        device = batch["labels"].device
        return pair_rows(
            batch["input_ids"],
            batch["labels"] != -100,
            torch.from_numpy(np.stack([pairs, pairs + 1], axis=1)).to(device),
            torch.from_numpy(self.sampler.lam[here[pairs]]).to(device),
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the share of this process and micro-batch in the loss of the step, times the
        number of processes, whose gradients are averaged; in evaluation, TRL's loss."""
        if not self.model.training:
            inputs.pop(ROW, None)  # where the training data is evaluated
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ConfigError("SFTMixTrainer computes no logits in training.")
        found = self._rows(inputs)
        mixes = self.args.mixup_weight > 0
        request = LossRequest(
            rows=found.rows,
            labels=found.labels,
            pairs=found.pairs if mixes else found.pairs[:0],
            lam=found.lam if mixes else found.lam[:0],
            num_ntp_tokens=self._counts.num_ntp_tokens,
            num_mixup_tokens=self._counts.num_mixup_tokens,
            mixup_weight=self.args.mixup_weight,
            backend=None if self.args.kernel_backend == "auto" else self.args.kernel_backend,
        )
        output, result = self._run(model, request, self._transform, inputs)
        assert isinstance(result, LossResult), "the model never called its head"
        loss = result.loss
        if self.aux_loss_enabled:
            share = len(found.labels) / max(1, self._counts.num_ntp_tokens)
            loss = loss + self.router_aux_loss_coef * share * output.aux_loss
        # the shares of all processes, as one number
        tokens = inputs["attention_mask"].sum()
        parts = torch.stack([result.ntp, result.mixup, tokens.to(result.ntp.dtype)]).detach()
        ntp, mixup, tokens = self.accelerator.reduce(parts, "sum").tolist()
        self._total_train_tokens += int(tokens)
        figures = self._metrics["train"]
        steps = self.current_gradient_accumulation_steps
        figures["ntp_loss"].append(ntp * steps)  # TRL logs the mean over micro-batches
        figures["mixup_loss"].append(mixup * steps)
        figures["num_tokens"] = [self._total_train_tokens]
        return loss * self.accelerator.num_processes

    @cached_property
    def _transform(self) -> LogitTransform:
        """What the model does to its logits after the head. Collective: all processes ask in their
        first step."""

        def logits(ids: Tensor, mask: Tensor, request: ProbeRequest, _: None) -> Tensor:
            inputs = {"input_ids": ids, "attention_mask": mask}
            output, _ = self._run(self.model_wrapped, request, LogitTransform(), inputs)
            return output.logits  # type: ignore[no-any-return]

        return find_logit_transform(logits, self.accelerator.device)  # type: ignore[arg-type]

    def _run(
        self, model: Any, request: Any, transform: LogitTransform, inputs: dict[str, Any]
    ) -> tuple[Any, Any]:
        plain = self.accelerator.unwrap_model(model)
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        given = {name: inputs[name] for name in inputs if name not in (ROW, "labels")}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        with computing(plain, request, transform) as head:
            output = model(**given, use_cache=False)
        return output, head.result
