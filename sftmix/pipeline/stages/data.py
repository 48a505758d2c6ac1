"""The data stage: read, check and encode all examples."""

from __future__ import annotations

from sftmix.data.prepare import prepare
from sftmix.pipeline.context import Facts, StageContext


def run(context: StageContext) -> Facts:
    """Writes train.arrow, held_out.arrow, the tokenizer, and what was dropped."""
    summary, identity, fingerprints = prepare(context.config, context.folder)
    for line in summary.lines():
        print(f"  {line}")
    return {"identity": identity, "fingerprints": fingerprints}
