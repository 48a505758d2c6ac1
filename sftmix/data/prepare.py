"""The data stage: read, check, encode and count every example.

Writes into its folder

    train.arrow, held_out.arrow   one row per example: ids, tokens, response mask, messages
    images.arrow                  each image once, where a model reads images
    tokenizer/                    the tokenizer with the chat template of the run
    dropped.jsonl, truncated.jsonl   example_id, place and reason of what is missing or cut
    skipped.jsonl                 place and problem of bad rows (data.on_error: skip)
    summary.json                  the counts, as printed

Every example that was read is in exactly one of: train, held out, dropped, skipped, left out by
`data.limit`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sftmix.batches.images import ImageProcessor, copy_processor, has_processor
from sftmix.config.schema import Config, DataSource
from sftmix.data import generator, readers
from sftmix.data.conversations import BadRow, Example
from sftmix.data.encoding import ChatEncoder
from sftmix.data.formats import check_format, columns_of, detect_format, read_row
from sftmix.data.images import ImageStore
from sftmix.data.template import MASK_POLICY, choose_template, reads_clock
from sftmix.data.tokenizer import (
    load_tokenizer,
    render_for_training,
    template_text,
    tokenizer_identity,
    train_tokenizer,
    with_template,
)
from sftmix.errors import DataError, counted
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("num_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        ("is_truncated", pa.bool_()),
        ("is_noisy", pa.bool_()),  # only for generated data
        ("group", pa.string()),
        ("place", pa.string()),
        ("messages", pa.string()),  # JSON
    ]
)
# Numbers in images.arrow; only where an example has one.
WITH_IMAGES = SCHEMA.append(pa.field("images", pa.list_(pa.int32())))
# conversations at a time: bounds memory, and keeps the tokenizer's threads busy
ENCODE_BATCH = 1000


@dataclass
class Summary:
    """Counts of the data stage. num_read = train + held_out + sum(dropped) + num_skipped +
    num_left_out. notes: sentences on what was given and is not used as it stands."""

    num_read: int = 0
    num_train: int = 0
    num_held_out: int = 0
    num_left_out: int = 0
    num_skipped: int = 0
    num_duplicates: int = 0
    num_truncated: int = 0
    num_tokens: int = 0
    num_response_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the summary for the screen."""
        shares = (
            f"{self.num_response_tokens / max(1, self.num_tokens):.0%} of {self.num_tokens:,}"
            " training tokens carry loss"
        )
        copies = counted(
            self.num_duplicates,
            "has the same content as an earlier one and is kept",
            "have the same content as an earlier one and are kept",
        )
        others = (
            (
                self.num_skipped,
                f"{self.num_skipped:,} skipped as bad rows (data/skipped.jsonl)",
            ),
            (self.num_left_out, f"{self.num_left_out:,} left out by data.limit and source weights"),
            (self.num_duplicates, f"{copies} (ids end in -2, -3, ...)"),
            (
                self.num_truncated,
                f"{self.num_truncated:,} truncated to data.max_length (data/truncated.jsonl)",
            ),
        )
        return [
            f"{counted(self.num_read, 'example')} read: {self.num_train:,} to train on,"
            f" {self.num_held_out:,} held out; {shares}",
            *(line for count, line in others if count),
            *(
                f"{count:,} dropped: {reason} (data/dropped.jsonl)"
                for reason, count in sorted(self.dropped.items())
            ),
            *self.notes,
        ]


def data_settings(config: Config) -> dict[str, Any]:
    """Returns everything that the stage's output depends on: the cache key."""
    return {
        **config.data.model_dump(mode="json"),
        "content": [readers.source_identity(source) for source in config.data.all_sources],
        "tokenizer": tokenizer_identity(config),
        "mask_policy": MASK_POLICY,
        "date": config.tokenizer.date,
        "seed": config.run.seed,
    }


def prepare(config: Config, folder: Path) -> tuple[Summary, str, dict[str, Any]]:
    """Runs the data stage into `folder`. Returns the counts, a hash of the encoded content, and the
    fingerprints that scores of these examples carry.

    Raises DataError for bad rows (all of them listed), an unsuitable template, or too little data.
    """
    summary = Summary()
    bad = readers.BadRows(folder / "skipped.jsonl" if config.data.on_error == "skip" else None)
    with contextlib.ExitStack() as opened:
        processor = image_processor(config)
        images = (
            opened.enter_context(ImageStore(folder, processor)) if processor is not None else None
        )
        train, held_out, noisy = _read(config, summary, bad, images)
    with (
        accessing(folder / "dropped.jsonl"),
        (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped_file,
        (folder / "truncated.jsonl").open("w", encoding="utf-8") as truncated_file,
    ):

        def drop(example: Example, reason: str) -> None:
            summary.dropped[reason] += 1
            record = {"example_id": example.example_id, "place": example.place, "reason": reason}
            dropped_file.write(json.dumps(record) + "\n")

        train, held_out = (
            [e for e in part if _has_response(e, drop)] for part in (train, held_out)
        )
        train, held_out = _limit(train, held_out, config, summary)
        tokenizer = _tokenizer(config, train, folder)
        encoder = ChatEncoder(
            tokenizer,
            date=config.tokenizer.date,
            keep_control_tokens=config.data.control_tokens == "keep",
            loss_on_inserted=config.data.loss_on_inserted,
            images=images,
        )
        # Includes the tokenizer and its template, because every exported model contains them.
        vocabulary = tokenizer.backend_tokenizer.to_str()
        template = template_text(tokenizer)
        identity = hashlib.sha256((template + vocabulary).encode())
        fingerprints = {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "template": hashlib.sha256(template.encode()).hexdigest(),
            "mask_policy": MASK_POLICY,
            "max_length": config.data.max_length,
            **({"date": config.tokenizer.date} if reads_clock(template) else {}),
            **({"images": images.processor.digest} if images and images.numbers else {}),
        }
        for name, part in (("train", train), ("held_out", held_out)):
            rows = _encode(part, encoder, config, noisy, drop, truncated_file, bad, summary)
            schema = WITH_IMAGES if images is not None and images.numbers else SCHEMA
            counts = _write_arrow(folder / f"{name}.arrow", rows, schema, identity)
            setattr(summary, f"num_{name}", counts["examples"])
            summary.num_truncated += counts["truncated"]
            if name == "train":
                summary.num_tokens, summary.num_response_tokens = (
                    counts["tokens"],
                    counts["response_tokens"],
                )
    bad.raise_if_any()
    summary.notes += [f"{what}: {count:,}" for what, count in sorted((+encoder.counts).items())]
    with accessing(folder / "tokenizer"):
        tokenizer.save_pretrained(folder / "tokenizer")
        if processor is not None and config.tokenizer_source is not None:
            copy_processor(config.tokenizer_source, folder / "tokenizer")
    write_json(folder / "summary.json", {**vars(summary), "dropped": dict(summary.dropped)})
    if config.evaluation.trained and summary.num_train < 2:
        raise DataError(
            f"{counted(summary.num_train, 'training example is', 'training examples are')} left; at"
            " least 2 are needed. " + " ".join(summary.lines())
        )
    if not config.evaluation.trained and summary.num_held_out == 0:
        raise DataError("no example is left to measure with. " + " ".join(summary.lines()))
    return summary, identity.hexdigest(), {**fingerprints, "data": identity.hexdigest()}


def image_processor(config: Config) -> ImageProcessor | None:
    """Returns the processor of images beside the tokenizer, or None. Raises ConfigError for one
    that cannot be loaded."""
    source = config.tokenizer_source
    if source is None or not has_processor(source):
        return None
    return ImageProcessor(source, load_tokenizer(config))


def _read(
    config: Config, summary: Summary, bad: readers.BadRows, images: ImageStore | None
) -> tuple[list[Example], list[Example], set[str]]:
    if config.data.generator is not None:
        train, held_out, noisy = generator.generate(config.data.generator, seed=config.run.seed)
        summary.num_read = len(train) + len(held_out)
        return train, held_out, noisy
    examples = [
        e
        for number, source in enumerate(config.data.all_sources)
        for e in _weighted(
            number, source, _read_source(source, bad, summary, images), config, summary
        )
    ]
    bad.raise_if_any()
    summary.notes += bad.notes
    summary.num_read += bad.count
    summary.num_skipped = bad.count
    if not examples:
        raise DataError("the data holds no example. Check data.path.")
    times: Counter[str] = Counter()
    for position, example in enumerate(examples):
        times[example.example_id] += 1
        if times[example.example_id] > 1:
            summary.num_duplicates += 1
            examples[position] = replace(
                example, example_id=f"{example.example_id}-{times[example.example_id]}"
            )
    # By a hash of the content, so that the choice does not depend on other examples, and copies are
    # never on both sides.
    share = config.data.held_out_share
    draw = {e.content_id: _uniform(config.run.seed, "held-out", e.content_id) for e in examples}
    threshold = (
        sorted(draw[e.content_id] for e in examples)[max(1, round(share * len(examples))) - 1]
        if share
        else -1.0
    )
    held_out = [e for e in examples if draw[e.content_id] <= threshold]
    return [e for e in examples if draw[e.content_id] > threshold], held_out, set()


def _read_source(
    source: DataSource, bad: readers.BadRows, summary: Summary, images: ImageStore | None
) -> list[Example]:
    columns = columns_of(source)
    check_format(source.format, columns)
    examples = []
    name = source.format
    unused: Counter[str] = Counter()
    found: set[str] = set()
    missed = {name for name in columns.ignored if "." in name}  # keys that no message has had
    num_unanswered = 0
    for place, row in readers.read_rows(source, bad):
        if name == "auto":
            name = detect_format(row, place, columns)
        found |= row.keys()
        missed = {key for key in missed if not columns.has_key(row, key)}
        try:
            read = read_row(row, name, columns, images=images, base=_folder_of(place))
        except BadRow as error:
            bad.add(place, f"{error} (format {name})", row)
            continue
        unused.update(read.unused)
        num_unanswered += read.unanswered
        examples.append(Example(read.content_id, read.messages, place, read.group, read.tools))
    if unused:
        names = ", ".join(f"{key} ({count:,})" for key, count in sorted(unused.items()))
        summary.notes.append(
            f"{source.path}: not used, with the number of rows: {names}. data.ignore_columns leaves"
            " out without this line"
        )
    if num_unanswered:
        summary.notes.append(
            f"{source.path}: {counted(num_unanswered, 'turn')} after the last answer left out"
        )
    wanted = {*columns.only, *(n for n in columns.ignored if "." not in n or n in missed)}
    useless = sorted(wanted - found)
    if useless and found:
        raise DataError(
            f"{source.path}: data.use_columns or data.ignore_columns names {useless}, which no row"
            f" has; the columns are {sorted(found)}, and keys of messages are named as in"
            " messages.name. Correct the names."
        )
    summary.num_read += len(examples)
    return examples


def _folder_of(place: str) -> Path:
    """Returns the folder of the file of a place, `file:line`."""
    path = Path(place.rpartition(":")[0])
    return path if path.is_dir() else path.parent


def _weighted(
    number: int, source: DataSource, examples: list[Example], config: Config, summary: Summary
) -> list[Example]:
    """Returns the examples `weight` times: whole copies, and a seeded draw for the remaining
    fraction. The draw depends on the source's number and not on its path: a data set that is moved
    gives the same examples."""
    whole, fraction = divmod(source.weight, 1)
    count = math.floor(fraction * len(examples) + 0.5)
    if examples and not whole and not count:
        summary.notes.append(
            f"{source.path}: none of its {counted(len(examples), 'example')} is used: the weight"
            f" {source.weight:g} rounds to nothing"
        )
    drawn = _drawn(examples, count, lambda n, e: (config.run.seed, number, e.example_id, n))
    summary.num_read += (int(whole) - 1) * len(examples) + count if whole else 0
    summary.num_left_out += 0 if whole else len(examples) - count
    return examples * int(whole) + drawn


def _limit(
    train: list[Example], held_out: list[Example], config: Config, summary: Summary
) -> tuple[list[Example], list[Example]]:
    """Keeps `data.limit` examples in all, at the same ratio of train to held out, in the order they
    were read; all without a limit."""
    limit, total = config.data.limit, len(train) + len(held_out)
    if limit is None or total <= limit:
        return train, held_out
    summary.num_left_out += total - limit
    num_held_out = (
        min(len(held_out), max(1, round(limit * len(held_out) / total))) if held_out else 0
    )

    def key(place: int, example: Example) -> tuple[object, ...]:
        return config.run.seed, "limit", example.example_id

    return _drawn(train, limit - num_held_out, key), _drawn(held_out, num_held_out, key)


def _drawn(
    examples: list[Example], count: int, key: Callable[[int, Example], tuple[object, ...]]
) -> list[Example]:
    """Returns `count` of the examples, in their order: those whose key has the lowest hashes."""
    by_hash = sorted(range(len(examples)), key=lambda n: _uniform(*key(n, examples[n])))
    return [examples[n] for n in sorted(by_hash[:count])]


def _uniform(*key: object) -> float:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64


def _has_response(example: Example, drop: Any) -> bool:
    trained = [example.messages[n] for n in example.trained_turns]
    if trained and all(m["content"].strip() or m.get("tool_calls") for m in trained):
        return True
    drop(example, "empty response" if trained else "no turn carries loss")
    return False


def _tokenizer(config: Config, train: list[Example], folder: Path) -> PreTrainedTokenizerBase:
    if config.tokenizer.train is None:
        return load_tokenizer(config)
    template = choose_template(config.tokenizer.chat_template, None)
    texts = render_for_training(train, template)
    tokenizer = train_tokenizer(texts, config.tokenizer.train, folder / "sentencepiece")
    return with_template(tokenizer, config.tokenizer.chat_template)


Row = dict[str, Any]


def _encode(
    part: list[Example],
    encoder: ChatEncoder,
    config: Config,
    noisy: set[str],
    drop: Any,
    truncated_file: Any,
    bad: readers.BadRows,
    summary: Summary,
) -> Iterator[Row]:
    """Yields the columns of WITH_IMAGES for every example that is not dropped."""
    limit = config.data.max_length
    for start in range(0, len(part), ENCODE_BATCH):
        batch = part[start : start + ENCODE_BATCH]
        for example, encoded in zip(batch, encoder.encode(batch), strict=True):
            if isinstance(encoded, BadRow):
                summary.num_skipped += 1
                if example.example_id == example.content_id:  # not a copy of another
                    bad.add(example.place, str(encoded))
                continue
            if isinstance(encoded, str):
                drop(example, encoded)
                continue
            ids, mask = encoded
            is_truncated = len(ids) > limit
            if is_truncated:
                match config.data.overlong:
                    case "error":
                        raise DataError(
                            f"{example.place}: {counted(len(ids), 'token')}, data.max_length is"
                            f" {limit}. Raise it, or set data.overlong to truncate or drop."
                        )
                    case "drop":
                        drop(example, f"longer than {counted(limit, 'token')}")
                        continue
                if encoder.cuts_image(ids, limit):
                    drop(example, f"an image ends after {counted(limit, 'token')}")
                    continue
                record = {
                    "example_id": example.example_id,
                    "place": example.place,
                    "num_tokens": len(ids),
                    "kept": limit,
                }
                ids, mask = ids[:limit], mask[:limit]
                if not mask.any():
                    drop(example, f"no response token within {counted(limit, 'token')}")
                    continue
                truncated_file.write(json.dumps(record) + "\n")
            yield {
                "example_id": example.example_id,
                "input_ids": ids,
                "response_mask": mask,
                "num_tokens": len(ids),
                "num_response_tokens": int(mask.sum()),
                "is_truncated": is_truncated,
                "is_noisy": example.example_id in noisy,
                "group": example.group,
                "place": example.place,
                "messages": json.dumps(example.messages, ensure_ascii=False),
                "images": encoder.image_numbers(example),
            }


def _write_arrow(path: Path, rows: Iterator[Row], schema: pa.Schema, identity: Any) -> Counter[str]:
    counts: Counter[str] = Counter(examples=0, truncated=0, tokens=0, response_tokens=0)
    with (
        accessing(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        while batch := list(itertools.islice(rows, ENCODE_BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            for row in batch:
                ids, mask = row["input_ids"], row["response_mask"]
                key = (path.name, row["example_id"], row["group"], len(ids))
                identity.update(repr(key).encode() + ids.tobytes() + np.packbits(mask).tobytes())
                counts.update(
                    examples=1,
                    truncated=int(row["is_truncated"]),
                    tokens=len(ids),
                    response_tokens=row["num_response_tokens"],
                )
    return counts
