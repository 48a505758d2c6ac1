"""The measured error of plans, printed with each: `benchmarks/planner.py`, whose results a test
compares."""

ERRORS = (
    "error of plans, against real steps of small models on a CPU; ours on a GPU not measured:",
    "  memory 66 of 66 within 5%, median 0.0%, largest 0.5%",
    "  bytes sent 66 of 66 within 1%, median 0.0%, largest 0.0%",
    "  seconds, with --calibrate, 63 of 66 within 15%, median 7.6%, largest 36.4%",
    "  tokens/s of published GPU runs 19 of 22 within 25%, median 15%, largest 29%",
)
