"""The measured error of plans, printed with each: `benchmarks/planner.py`, whose results a test
compares."""

ERRORS = (
    "error of plans, against real steps of small models on a CPU; on a GPU not measured:",
    "  memory 20 of 20 within 5%, median 0.0%, largest 0.0%",
    "  bytes sent 20 of 20 within 1%, median 0.0%, largest 0.0%",
    "  seconds, with --calibrate, 15 of 20 within 15%, median 3.6%, largest 26.4%",
)
