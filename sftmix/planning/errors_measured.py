"""The measured error of plans, printed with each; benchmarks/results/planner_cpu_202611.json."""

ERRORS = ("error: not measured yet",)
