"""The measured sentences and tables of README.md and docs/, made from the results behind them.

`MEASURED` has, per page, functions that return what the page must say. A new figure needs a result
in benchmarks/ and a function here.
"""

import json
import statistics

from processes import ROOT
from scipy import stats

BENCHMARKS = ROOT / "benchmarks"


def result(name):
    """Of benchmarks/results, or with its folder of benchmarks/."""
    path = BENCHMARKS / (name if "/" in name else f"results/{name}")
    return json.loads((path.parent / f"{path.name}.json").read_text())


def values(arm, metric):
    return [seed[metric] for _, seed in sorted(arm["seeds"].items())]


def spread(numbers, form):
    mean, deviation = statistics.mean(numbers), statistics.stdev(numbers)
    return f"{mean:{form}} ± {deviation:{form}}"


def difference(numbers, others, form):
    """The mean of the paired differences with its 95% t interval."""
    pairs = [a - b for a, b in zip(numbers, others, strict=True)]
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5
    half = stats.t.ppf(0.975, len(pairs) - 1) * error
    return f"{mean:+{form}} [{mean - half:+{form}}, {mean + half:+{form}}]"


def arms_of(name):
    return {arm["arm"]: arm for arm in result(name)["arms"]}


def loss_table(name, labels):
    arms = arms_of(f"quality/{name}")
    control = values(arms["ntp"], "loss")
    rows = [f"| ntp | {spread(control, '.4f')} | |"]
    for arm, label in labels.items():
        losses = values(arms[arm], "loss")
        rows.append(f"| {label} | {spread(losses, '.4f')} | {difference(losses, control, '.4f')} |")
    return "\n".join(rows)


MATCHED = {"ntp-twice": "ntp, as many tokens as with the reference"}


def smollm2():
    return loss_table(
        "smollm2-alpaca", {"sftmix": "sftmix", "random-pairs": "random pairs", **MATCHED}
    )


def overtrained():
    labels = {"random-pairs": "random pairs", "label-smoothing": "label smoothing", **MATCHED}
    return loss_table("smollm2-overtrained", {"sftmix": "sftmix", **labels})


def quickstart():
    arms = arms_of("quality/quickstart")
    losses, matches = ({a: values(arms[a], m) for a in arms} for m in ("loss", "exact_match"))
    percent = {arm: [100 * match for match in found] for arm, found in matches.items()}
    rows = []
    for arm in ("ntp", "sftmix"):
        mean, deviation = statistics.mean(percent[arm]), statistics.stdev(percent[arm])
        cells = [arm, "6", spread(losses[arm], ".4f"), "", f"{mean:.1f}% ± {deviation:.1f}", ""]
        if arm == "sftmix":
            cells[3] = difference(losses[arm], losses["ntp"], ".4f")
            cells[5] = difference(percent[arm], percent["ntp"], ".1f")
        rows.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    return "\n".join(rows).replace("|  |", "| |")


def quickstart_deviation():
    arms = arms_of("quality/quickstart")
    ntp, sftmix = (
        100 * statistics.stdev(values(arms[arm], "exact_match")) for arm in ("ntp", "sftmix")
    )
    return (
        "over six seeds of the quickstart study exact match has a standard deviation of"
        f" {ntp:.1f} points (NTP) and {sftmix:.1f} (SFTMix)."
    )


def loss_price():
    rows = result("kernels_cpu_202611")["results"]["2048,512,32000"]
    ms = {row["provider"]: row["ms"] for row in rows if "ms" in row}
    ratios = {row["ratio"]: row.get("value") for row in rows if "ratio" in row}
    times = {row["provider"]: row["times_ntp_ours"] for row in rows if "ms" in row}
    ours = "sftmix (ours)"
    peer = "ntp (F.linear_cross_entropy, 4096)"
    assert min((n for n in ms if n.startswith("ntp (F.linear")), key=ms.get) == peer
    naive = times[ours] / times["ntp (F.cross_entropy)"]
    return (
        f"SFTMix takes {ratios[f'{ours} / ntp (ours)']:.2f} times our NTP alone, {naive:.2f} times"
        " `F.cross_entropy` on full logits, and"
        f" {ratios[f'{ours} / {peer}']:.2f} times the best peer's NTP"
        " (`F.linear_cross_entropy` with chunks of 4096 rows). Textbook SFTMix takes"
        f" {times['sftmix (textbook)']:.2f} times our NTP, compiled"
        f" {times['sftmix (textbook, compiled)']:.2f} times"
    )


def step_price():
    ratios = result("step_cpu_202611")["ratios"]
    ours, peer = ratios["sftmix (ours) / ntp (ours)"], ratios["ntp (ours) / ntp (trl)"]
    return (
        f"SFTMix {ours['ratio']:.2f} [{ours['ratio_20']:.2f}, {ours['ratio_80']:.2f}] times NTP;"
        f" our NTP, padded, {peer['ratio']:.2f} times TRL 1.16's"
    )


def middle(numbers):
    return f"{statistics.median(numbers):.2f} [{min(numbers):.2f}, {max(numbers):.2f}]"


def train_price():
    ratios = result("train_cpu_202611")["ratios"]
    return (
        f"packed, {middle(ratios['packed / padded'])} times the real tokens/s of padded, and"
        f" {middle(ratios['packed / trl'])} times those of TRL's trainer"
    )


def smollm2_price():
    ratios = result("train_smollm2_cpu_202611")["ratios"]["packed / trl"]
    return f"With SmolLM2-135M it is {middle(ratios)} times TRL's rate"


def scoring_price():
    ratio = result("scoring_cpu_202611")["loop over transformers / ours"]["ratio"]
    return f"Scoring takes {1 / ratio:.2f} of the time of a plain loop over transformers"


def agreement():
    rows = result("from_the_log")["rows"]
    found, smollm2 = rows["ways to score"], rows["ways to score, SmolLM2-135M"]
    whole, late = found["online, all epochs"], found["online, without the first epoch"]
    low, high = (100 * share for share in smollm2["same_half"])
    return (
        f"`online` puts {100 * whole['same_half']:.1f}% of the examples into the same half"
        f" (Spearman {whole['spearman']:.2f}), and {100 * late['same_half']:.1f}%"
        f" ({late['spearman']:.2f}) without its first epoch. With a pretrained reference"
        f" (SmolLM2-135M, 2 epochs of 159 examples, six seeds) it is {low:.0f} to {high:.0f}%"
        " ({:.2f} to {:.2f})".format(*smollm2["spearman"])
    )


def recovery():
    found = result("recovery_cpu_202611")
    noticed, goes_on = (
        found[f"rank killed: {name} (s)"]["median"] for name in ("noticed", "goes on")
    )
    return (
        f"On 2 CPU cores a run with a killed rank has ended after {noticed:.0f} s, and is at its"
        f" next step {goes_on:.0f} s after the kill."
    )


def useful_shares():
    rows = result("packing_alpaca")["rows"]
    return "\n".join(
        f"| {row['batch']} | {row['ranks']} | {row['padded']:.1%} | {row['packed']:.1%} |"
        for row in rows
    )


def hashing():
    fast = result("checkpoint_cpu_202611")["share of digests"]["ratio"]
    return f"It takes {fast:.0%} of a save on a disk that writes 1.5 GB/s"


def ir_dro():
    ratio = result("from_the_log")["rows"]["IR-DRO"]["ratio"]
    return f"That costs a third of a step ({ratio:.2f} times NTP"


MEASURED = {
    "README.md": [
        quickstart,
        quickstart_deviation,
        smollm2,
        overtrained,
        loss_price,
        step_price,
        train_price,
        smollm2_price,
        scoring_price,
        agreement,
        recovery,
    ],
    "docs/packing.md": [useful_shares],
    "docs/reliability.md": [hashing],
    "docs/objectives.md": [ir_dro],
}
