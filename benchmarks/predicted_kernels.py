"""The least milliseconds of each loss of ours on an H100: matrix products by their measured rate,
kernels by their machine code (`machine_code.py`). Predicted, not measured.

Axes: T rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

from machine_code import bound_of, launches, report_of

from sftmix.engine.counting import Product
from sftmix.kernels.chunked_linear_mixup import balanced_chunks
from sftmix.planning.hardware import gpu
from sftmix.planning.timing import product_seconds

ITEMSIZE = 2  # of bfloat16
METHOD = (
    "at least: products at 798 TFLOP/s, other kernels by the slowest of memory (3.0 TB/s), issue"
    " and special functions of their machine code for sm_90, 5 us a launch"
)
EPILOGUES = {  # of the losses that have no other pass over the logits
    "sftmix (ours)": "pair epilogue",
    "ntp (ours)": "row epilogue",
    "dft (ours)": "row epilogue, by probability",
    "label-smoothing (ours)": "row epilogue, smoothed",
    "nll (ours)": "token losses",
}


def table(content: dict[str, Any]) -> list[str]:
    """Returns the table of docs/kernels.md. content: of loss_kernels.py on a machine without a
    GPU, or with one."""
    lines = [
        "| T, D, V | loss | predicted, at least (ms) | over the products | measured (ms) |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for shape, rows in content["results"].items():
        found = {row["provider"]: row for row in rows if "provider" in row}
        for name in EPILOGUES:
            least = found[name]["predicted_ms"]
            is_trained = name != "nll (ours)"
            products = found["products (three, bare)" if is_trained else "product (one, bare)"]
            ratio = least / products["predicted_ms"]
            measured = f"{found[name]['ms']:.1f}" if "ms" in found[name] else "not yet"
            lines.append(f"| {shape} | {name} | {least:.1f} | {ratio:.2f} | {measured} |")
    return lines


@functools.cache
def _report(name: str) -> dict[str, Any]:
    return report_of(launches()[name], "sm_90")


def milliseconds(
    provider: str, num_rows: int, hidden_size: int, vocab_size: int, softcap: float | None
) -> float | None:
    """Returns the prediction for a provider of `loss_providers.py`; None for one that has none."""
    h100 = gpu("H100", interconnect=3200, gpus_per_node=8)
    if provider.startswith("product"):
        count = 3 if "three" in provider else 1
        whole = Product("head", "product", num_rows, vocab_size, hidden_size, ITEMSIZE)
        return 1e3 * count * product_seconds(whole, h100)
    if provider not in EPILOGUES:
        return None
    kernel = _report(EPILOGUES[provider] + ("" if softcap is None else ", soft-capped"))
    is_trained, is_paired = provider != "nll (ours)", provider == "sftmix (ours)"
    seconds = 0.0
    for start, stop in balanced_chunks(num_rows, vocab_size, ITEMSIZE):
        rows = stop - start
        product = Product("head", "product", rows, vocab_size, hidden_size, ITEMSIZE)
        seconds += (3 if is_trained else 1) * product_seconds(product, h100)
        programs = rows // 2 if is_paired else rows
        seconds += bound_of(kernel, programs=programs, columns=vocab_size)
    moved = 0
    if is_trained:  # the backward scales both gradients, that of the weight from float32
        moved += (4 + ITEMSIZE) * vocab_size * hidden_size + 2 * ITEMSIZE * num_rows * hidden_size
    if is_paired:  # rows are brought into the order of the pairs, and their gradients back
        moved += 4 * ITEMSIZE * num_rows * hidden_size
    return 1e3 * (seconds + moved / h100.moved)
