"""The report stage: a page, a text and a table on the screen."""

from __future__ import annotations

from sftmix.evaluation.report import build_report
from sftmix.evaluation.report_examples import RunOutputs
from sftmix.pipeline.context import Facts, StageContext


def run(context: StageContext) -> Facts:
    """Writes the report and prints its table."""
    build_report(RunOutputs(context.config, context.inputs), context.folder)
    return {}
