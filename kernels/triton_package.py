"""Imports triton for the modules that need it, with a clear error if it is missing."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f'backend="triton" needs the package triton ({error}). torch for CUDA and ROCm brings it; '
        'elsewhere run `pip install triton`, or use backend="torch".'
    ) from None

__all__ = ["tl", "triton"]
