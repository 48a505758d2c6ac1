"""SFTMix: instruction tuning with a confidence-guided Mixup loss
(https://arxiv.org/abs/2410.05248).

    from sftmix import sftmix_loss, pair_rows, load_config, run, read_scores     (docs/python.md)

Names are imported when they are first used: `import sftmix` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftmix.batches.pair_rows import pair_rows
    from sftmix.confidence.table import read_scores
    from sftmix.config.reader import load_config
    from sftmix.kernels.fused_linear_mixup_cross_entropy import (
        fused_linear_mixup_cross_entropy as sftmix_loss,
    )
    from sftmix.pipeline.launching import run

__version__ = "0.1.0"
__all__ = ["load_config", "pair_rows", "read_scores", "run", "sftmix_loss"]

_LOSS = "fused_linear_mixup_cross_entropy"
_WHERE = {  # name -> module, and the name there
    "load_config": ("sftmix.config.reader", "load_config"),
    "pair_rows": ("sftmix.batches.pair_rows", "pair_rows"),
    "read_scores": ("sftmix.confidence.table", "read_scores"),
    "run": ("sftmix.pipeline.launching", "run"),
    "sftmix_loss": (f"sftmix.kernels.{_LOSS}", _LOSS),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sftmix' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
