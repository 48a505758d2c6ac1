"""Findings, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sftmix.errors import SftmixError

Verdict = Literal["ok", "warning", "bad", "skipped"]
VERDICTS: tuple[Verdict, ...] = ("ok", "warning", "bad", "skipped")


@dataclass(frozen=True)
class Finding:
    """found: what was found, and what was expected if that differs. remedy: what to do; may be
    empty. facts: the numbers behind it, for `--json`."""

    item: str
    verdict: Verdict
    found: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def line(self, width: int = 18) -> str:
        return (
            f"{self.verdict:<8} {self.item:<{width}}"
            f" {' '.join(f'{self.found} {self.remedy}'.split())}"
        )


def examine(item: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """Returns the findings of an item's function. If the function fails, that is a bad finding,
    because the item could not be examined."""
    try:
        return look()
    except Exception as error:  # any error is a finding; the other items continue
        text = " ".join(str(error).split())[:500]
        if isinstance(error, SftmixError):
            return [Finding(item, "bad", text)]
        return [
            Finding(
                item,
                "bad",
                f"could not be examined: {type(error).__name__}: {text}.",
                "Look into that first.",
            )
        ]


def count(findings: list[Finding]) -> dict[Verdict, int]:
    """Returns how many findings there are of each verdict."""
    return {
        verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS
    }
