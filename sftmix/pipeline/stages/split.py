"""The split stage: confident and unconfident examples, and how much of them a matching would
mix."""

from __future__ import annotations

from sftmix.confidence.table_files import CONFIDENCE
from sftmix.pairing.on_files import COVERAGE, mix_coverages, split_scores, write_parts
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.inputs import read_examples


def run(context: StageContext) -> Facts:
    """Writes split.parquet and the lists of each part. Prints the mix coverage of both kinds of
    matching."""
    config, examples = context.config, read_examples(context)
    sizes = split_scores(
        context.inputs["score"] / CONFIDENCE,
        examples.table.data.table,
        config.split,
        context.folder,
        seed=config.run.seed,
    )
    print("  " + ", ".join(f"{count:,} {part}" for part, count in sizes.items()))
    lengths = examples.column("num_response_tokens")
    write_parts(context.folder, sizes, lengths)
    coverage = mix_coverages(context.folder, lengths, config.mixup, config.run.seed)
    shown = ", ".join(f"{share:.1%} {way}" for way, share in coverage.items())
    print(f"  mix coverage ({COVERAGE}): {shown} matching")
    return {"sizes": sizes, "mix_coverage": coverage}
