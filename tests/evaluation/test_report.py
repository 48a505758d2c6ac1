"""What the report computes, draws and shows, on small tables and run folders of its own."""

import base64
import datetime
import html
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matchings import split_by_confidence
from matplotlib.figure import Figure
from pages import assert_shown_well
from processes import ROOT

from sftmix.confidence.definition import CONFIDENCE_SCHEMA
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.config.schema import Config, SplitConfig, TrainConfig
from sftmix.data.prepare import SCHEMA
from sftmix.evaluation import plots
from sftmix.evaluation.report import (
    HELD_OUT_TITLE,
    ONE_SEED,
    TITLES,
    UNITS,
    build_report,
    cells,
    print_table,
)
from sftmix.evaluation.report_examples import (
    RunOutputs,
    ScoredExamples,
    agreement_of,
    duplicates,
    extremes,
    truncated,
)
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT
from sftmix.pairing.on_files import write_parts
from sftmix.storage import artifacts
from sftmix.storage.files import write_json
from sftmix.train.log import HELD_OUT, NTP


def scored_examples(count=40, *, ids=None, confidence=None, variability=None, is_perplexity=True):
    rng = np.random.default_rng(0)
    ids = ids or [f"{n:016x}" for n in range(count)]
    confidence = (
        -np.exp(rng.normal(size=count))
        if confidence is None
        else np.asarray(confidence, dtype=float)
    )
    finite = np.where(np.isfinite(confidence), confidence, -1e9)
    table = [
        {
            "example_id": i,
            "group": None,
            "messages": f'[{{"role": "user", "content": "<b>{i}</b>"}}]',
        }
        for i in ids
    ]
    return ScoredExamples(
        pa.chunked_array([ids]),
        confidence,
        rng.random(count) if variability is None else np.asarray(variability, dtype=float),
        np.array(split_by_confidence(ids, finite)),
        rng.integers(1, 200, count),
        rng.random(count) < 0.3,
        is_perplexity,
        table,
    )


def test_most_and_least_confident_examples_leave_out_what_is_not_finite():
    scored = scored_examples(5, confidence=[-3.0, -np.inf, -1.0, np.nan, -2.0])
    most, least = (section["rows"] for section in extremes(scored))
    assert [row["value"] for row in most] == [1.0, 2.0, 3.0] and [
        row["value"] for row in least
    ] == [3.0, 2.0, 1.0]


def test_copies_are_grouped_by_content():
    scored = scored_examples(
        6,
        ids=["aa", "bb", "aa-2", "cc", "aa-3", "bb-2"],
        confidence=[-1.0, -2.0, -4.0, -9.0, -2.0, -2.5],
    )
    found = duplicates(scored)
    assert (found["num_groups"], found["num_examples"]) == (2, 5)
    first, second = found["rows"]
    assert (
        first["example_id"],
        first["num_copies"],
        first["lowest"],
        first["highest"],
        first["spread"],
    ) == ("aa", 3, 1.0, 4.0, 3.0)
    assert (second["example_id"], second["num_copies"], second["spread"]) == ("bb", 2, 0.5)
    # Most confident first: aa, bb, aa-3 | bb-2, aa-2, cc.
    assert found["num_apart"] == 2 and first["parts"] == "2 confident, 1 unconfident"
    together = replace(
        scored, part=np.array([CONFIDENT, UNCONFIDENT, CONFIDENT, CONFIDENT, CONFIDENT, MIDDLE])
    )
    assert duplicates(together)["num_apart"] == 1


def test_truncated_examples_are_counted_in_each_part():
    scored = scored_examples()
    found = truncated(scored)
    assert (
        found["num_truncated"]
        == scored.is_truncated.sum()
        == sum(row["num_truncated"] for row in found["parts"])
        > 0
    )
    shares = {row["part"]: row["share"] for row in found["parts"]}
    assert shares[CONFIDENT] == scored.is_truncated[scored.part == CONFIDENT].mean()
    expected = sorted((-scored.confidence[scored.is_truncated]).tolist(), reverse=True)[:10]
    assert [row["value"] for row in found["rows"]] == expected


def test_agreement_is_taken_over_what_is_finite_in_both():
    ids = list("abcdef")
    a = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 9.0])
    b = np.array([1.0, 3.0, 2.0, 4.0, 5.0, -np.inf])
    found = agreement_of(pa.chunked_array([ids]), a, b, SplitConfig(), "checkpoints, online")
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))  # of 1234 and 1324
    assert found.same_part == 0.5 and (found.num_examples, found.num_left_out) == (4, 2)
    assert found.line().startswith(
        "checkpoints, online: Spearman 0.8000, 50.0% of 4 examples in the same part, 2 left out"
    )
    assert (
        agreement_of(
            pa.chunked_array([ids]),
            a,
            b,
            SplitConfig(confident_share=0.25, unconfident_share=0.25),
            "",
        ).same_part
        == 1.0
    )


@pytest.mark.parametrize("settings", [{}, {"highest_is_confident": False}])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.4)])
def test_agreement_splits_as_the_run_does(settings, shares):
    """Within strata, from the side that the config calls confident: sorted by hand."""
    rng = np.random.default_rng(0)
    ids, strata = [f"id{n:02}" for n in range(41)], np.array(["x", "y"])[rng.integers(0, 2, 41)]
    scores = rng.random((2, 41))
    sign = 1 if settings.get("highest_is_confident", True) else -1
    expected = np.zeros((2, 41), dtype=object)
    for table, values in zip(expected, scores, strict=True):
        for stratum in "xy":
            rows = np.flatnonzero(strata == stratum)
            table[rows] = split_by_confidence(
                [ids[n] for n in rows],
                sign * values[rows],
                confident_share=shares[0],
                unconfident_share=shares[1],
            )
    split = SplitConfig(
        **settings, stratify_by="group", confident_share=shares[0], unconfident_share=shares[1]
    )
    given = pa.chunked_array([strata.tolist()])
    found = agreement_of(pa.chunked_array([ids]), *scores, split, "a, b", strata=given)
    assert found.same_part == (expected[0] == expected[1]).mean()


def test_agreement_of_too_few_examples_is_no_figure():
    found = agreement_of(
        pa.chunked_array([["a", "b"]]),
        np.array([1.0, np.nan]),
        np.array([1.0, 2.0]),
        SplitConfig(),
        "checkpoints, live",
    )
    assert found.cells() == ["checkpoints, live", "-", "100.0%", "1", "1"]


def test_data_map_keeps_both_ends_and_thins_evenly(monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 10)
    confidence = -np.random.default_rng(0).permutation(101) - 1.0
    scored = scored_examples(
        101, confidence=confidence, variability=np.where(confidence == -1, np.nan, 1.0)
    )
    points, num_left_out = plots.points_of_data_map(scored)
    assert num_left_out == 1 and len(points) == 10
    assert sorted(-confidence[points]) == np.linspace(2, 101, 10).tolist()


@pytest.mark.parametrize("is_perplexity", [True, False])
def test_figures_have_the_same_bytes_each_time(is_perplexity):
    confidence = None if is_perplexity else np.linspace(-3, 5, 40)
    scored = scored_examples(confidence=confidence, is_perplexity=is_perplexity)
    points, _ = plots.points_of_data_map(scored)
    image = plots.data_map(scored, points)
    assert image == plots.data_map(scored, points) and image.startswith(b"\x89PNG")
    # 150 dpi; no date, no software
    assert int.from_bytes(image[16:20], "big") == 8 * 150 and b"tEXt" not in image
    assert plots.confidence_histogram(scored) == plots.confidence_histogram(scored)


def test_cuts_lie_halfway_between_the_parts_and_name_them():
    scored = scored_examples(confidence=-np.arange(1.0, 41.0))
    assert plots.cuts(scored.shown, scored.part) == [(20.5, CONFIDENT, UNCONFIDENT)]
    assert plots.cuts(scored.confidence, scored.part) == [(-20.5, UNCONFIDENT, CONFIDENT)]
    thirds = np.array(
        split_by_confidence(
            scored.example_ids.to_pylist(),
            scored.confidence,
            confident_share=0.25,
            unconfident_share=0.25,
        )
    )
    assert plots.cuts(scored.shown, thirds) == [
        (10.5, CONFIDENT, MIDDLE),
        (30.5, MIDDLE, UNCONFIDENT),
    ]


def test_a_split_by_something_else_has_no_cut_in_the_confidence():
    variability = np.random.default_rng(1).permutation(40) + 1.0
    scored = scored_examples(confidence=-np.arange(1.0, 41.0), variability=variability)
    scored = replace(scored, part=np.where(variability < 10, CONFIDENT, UNCONFIDENT))
    assert plots.cuts(scored.shown, scored.part) == [] and plots.cuts(variability, scored.part) == [
        (9.5, CONFIDENT, UNCONFIDENT)
    ]


@pytest.mark.parametrize("is_across", [True, False])
def test_a_line_is_drawn_at_each_cut_and_the_outer_parts_are_named(is_across):
    axes = Figure().subplots()
    plots._draw_cuts(
        axes, [(2.0, CONFIDENT, MIDDLE), (3.0, MIDDLE, UNCONFIDENT)], is_across=is_across
    )
    assert [line.get_data()[is_across][0] for line in axes.lines] == [2.0, 3.0]
    assert [(text.get_text(), text.xy[is_across]) for text in axes.texts] == [
        (CONFIDENT, 2.0),
        (UNCONFIDENT, 3.0),
    ]


DEGENERATE = {
    "one checkpoint": {"variability": np.zeros(40)},
    "all equal": {"confidence": np.full(40, -1.5), "variability": np.ones(40)},
    "all zero": {"confidence": np.zeros(40), "is_perplexity": False},
    "positive": {"confidence": np.linspace(3, 9, 40), "is_perplexity": False},
    "of both signs": {"confidence": np.linspace(-1e-9, 1e-9, 40), "is_perplexity": False},
    "large": {"confidence": -np.geomspace(1, 1e200, 40), "variability": np.geomspace(1, 1e150, 40)},
    "some not finite": {"confidence": [-np.inf, np.nan, *-np.arange(1.0, 39.0)]},
    "nothing finite": {"confidence": np.full(40, -np.inf)},
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.filterwarnings("error")
def test_figures_cope_with_any_scale(case):
    scored = scored_examples(**DEGENERATE[case])
    assert plots.confidence_histogram(scored).startswith("<svg")
    points, num_left_out = plots.points_of_data_map(scored)
    assert (len(points), num_left_out) == {
        "some not finite": (38, 2),
        "nothing finite": (0, 40),
    }.get(case, (40, 0))
    if len(points):
        assert plots.data_map(scored, points).startswith(b"\x89PNG")


NASTY = "<script>alert('x')</script> & {{ 7 * 7 }}"


@pytest.fixture
def finished(tmp_path):
    """Returns a function that makes the folders that the report reads, for 30 examples, and returns
    them."""

    def make(*, confidence, variability=None, is_ours=True, compare=None, **settings):
        compare = compare or {}
        sources = (
            {"compare": list(compare)}
            if is_ours
            else {"scores": "elsewhere.parquet", "scores_column": "quality"}
        )
        config = Config.model_validate(
            {
                "run": {"dir": tmp_path},
                "model": {"path": "m"},
                "data": {"path": "d.jsonl"},
                "baseline": {"enabled": False},
                "confidence": sources,
                **settings,
            }
        )
        ids = [f"{n:032x}" for n in range(27)]
        ids += [f"{ids[4]}-2", f"{ids[4]}-3", f"{ids[9]}-2"]
        messages = [
            [{"role": "user", "content": NASTY}, {"role": "assistant", "content": f"answer {n}"}]
            for n in range(30)
        ]
        columns = {
            "example_id": ids,
            "input_ids": [[1, 2, 3]] * 30,
            "response_mask": [[False, True, True]] * 30,
            "num_tokens": [3] * 30,
            "num_response_tokens": list(range(1, 31)),
            "is_truncated": [n % 10 == 3 for n in range(30)],
            "is_noisy": [False] * 30,
            "group": [NASTY] * 30,
            "place": [f"d.jsonl:{n}" for n in range(30)],
            "messages": [json.dumps(m) for m in messages],
        }
        inputs = {name: tmp_path / name for name in ("data", "score", "split", "train", "evaluate")}
        for folder in (*inputs.values(), tmp_path / "report"):
            folder.mkdir()
        with pa.ipc.new_stream(str(inputs["data"] / "train.arrow"), SCHEMA) as writer:
            writer.write_table(pa.Table.from_pydict(columns, schema=SCHEMA))
        counts = {
            "num_read": 30,
            "num_train": 30,
            "num_held_out": 0,
            "num_left_out": 0,
            "num_truncated": 3,
            "dropped": {},
        }
        write_json(inputs["data"] / "summary.json", counts)
        metadata = ScoreMetadata("checkpoints", [{"path": "m"}], [1], {}, [], {})
        for folder, values in {
            inputs["score"]: confidence,
            **{inputs["score"] / "compared" / m: v for m, v in compare.items()},
        }.items():
            folder.mkdir(parents=True, exist_ok=True)
            known = {"example_id": ids, "confidence": values, "rank": [None] * 30}
            empty = {name: [None] * 30 for name in ("minimum", "maximum", "variability")}
            given = {"variability": variability} if variability is not None else {}
            schema = metadata.to_schema(CONFIDENCE_SCHEMA) if is_ours else CONFIDENCE_SCHEMA
            pq.write_table(
                pa.Table.from_pydict({**known, **empty, **given}, schema=schema),
                folder / "confidence.parquet",
            )
        parts = split_by_confidence(ids, np.asarray(confidence))
        pq.write_table(
            pa.table({"example_id": ids, "part": parts}), inputs["split"] / "split.parquet"
        )
        sizes = {part: parts.count(part) for part in (CONFIDENT, MIDDLE, UNCONFIDENT)}
        write_parts(inputs["split"], sizes, np.arange(1, 31))
        artifacts.seal(
            inputs["split"],
            stage="split",
            settings={},
            facts={"sizes": sizes, "mix_coverage": {"random": 0.5}},
        )
        facts = {
            "real_tokens_per_second": 1.0,
            "num_parameters": 1,
            "num_steps": 1,
            "world_size": 1,
            "precision": "fp32",
            "device": "a processor of this test",
            "num_real_tokens": 1234,
            "energy_joules": 7200.0,
        }
        (inputs["train"] / "model").mkdir()
        facts |= {"training_seconds": 60.0, "checkpoint_seconds": 30.0, "waited_seconds": 105.0}
        facts |= {"evaluation_seconds": 6.0}
        artifacts.seal(inputs["train"], stage="train", settings={}, facts=facts)
        (inputs["train"] / "metrics.jsonl").write_text("")
        write_json(inputs["evaluate"] / "metrics.json", {})
        return RunOutputs(config, inputs)

    return make


def text_of(page):
    """Returns what a reader sees, with single spaces."""
    body = re.sub(r"<(svg|style|pre)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_page_shows_the_map_copies_and_truncated_examples_and_escapes_data(finished, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0), variability=np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    page, image = (
        (tmp_path / "report" / "index.html").read_text(),
        (tmp_path / "report" / "data_map.png").read_bytes(),
    )
    assert f"data:image/png;base64,{base64.b64encode(image).decode()}" in page
    assert "<script" not in page and html.escape(NASTY, quote=False).replace("'", "&#39;") in page
    text = text_of(page)
    assert NASTY in text  # once and only once escaped
    assert (
        "30 of 30 training examples. Dashed: where the split cuts." in text
        and "mean perplexity" in text
    )
    assert "5 examples in 2 groups; in 2 groups the split puts copies into different parts." in text
    assert re.search(
        r"3 5 29 24 1 confident, 2 unconfident user .*? 2 10 30 20 1 confident, 1 unconfident user",
        text,
    )
    assert (
        "3 training examples are cut off" in text
        and "confident 15 2 13.3% unconfident 15 1 6.7%" in text
    )
    assert "no finite confidence" not in text and "Agreement" not in text


def test_a_table_of_the_users_without_variability_and_with_positive_values_is_shown_as_it_is(
    finished, tmp_path
):
    run = finished(confidence=np.linspace(0.001, 0.03, 30), is_ours=False)
    build_report(run, tmp_path / "report")
    text = text_of((tmp_path / "report" / "index.html").read_text())
    assert (
        "There is none: the score table gives no variability" in text
        and not (tmp_path / "report" / "data_map.png").exists()
    )
    # the highest is the most confident
    assert "perplexity conversation" not in text and "confidence conversation 0.03 user" in text
    assert "Least confident examples confidence conversation 0.001 user" in text


def test_the_report_says_how_many_are_not_finite_or_thinned_out(finished, monkeypatch, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0), variability=np.arange(1.0, 31.0))
    path = run.inputs["score"] / "confidence.parquet"
    table = pq.read_table(path)
    for name, value in (("confidence", -np.inf), ("variability", np.nan)):
        values = table[name].to_numpy().copy()
        values[3 if name == "confidence" else 7] = value
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)
    build_report(run, tmp_path / "report")
    text = text_of((tmp_path / "report" / "index.html").read_text())
    assert (
        "28 of 30 training examples. 2 are not drawn" in text
        and "1 example has no finite confidence" in text
    )
    monkeypatch.setattr(plots, "MAX_POINTS", 10)
    build_report(run, tmp_path / "report")
    text = text_of((tmp_path / "report" / "index.html").read_text())
    assert "10 of 30 training examples, thinned evenly over their ranking. 2 are not drawn" in text


def test_agreement_is_in_the_page_the_markdown_and_what_is_printed(finished, capsys, tmp_path):
    live = -np.arange(1.0, 31.0)
    live[[14, 15]] = live[[15, 14]]  # 15 and 16: one pair changes places across the cut
    online = -np.arange(30.0, 0.0, -1.0)
    online[0] = np.nan
    run = finished(
        confidence=-np.arange(1.0, 31.0),
        variability=np.ones(30),
        compare={"live": live, "online": online},
    )
    build_report(run, tmp_path / "report")
    spearman = 1 - 6 * 2 / (30 * (30**2 - 1))
    rows = (
        ["checkpoints, live", f"{spearman:.4f}", "93.3%", "30", "0"],
        ["checkpoints, online", "-1.0000", "3.4%", "29", "1"],
    )
    text, lines = (
        text_of((tmp_path / "report" / "index.html").read_text()),
        (tmp_path / "report" / "report.md").read_text().splitlines(),
    )
    for row in rows:
        assert " ".join(row) in text and f"| {' | '.join(row)} |" in lines
    out = capsys.readouterr().out
    assert (
        f"  checkpoints, live: Spearman {spearman:.4f}, 93.3% of 30 examples in the same part, 0"
        " left out (not finite)\n" in out
    )
    assert "checkpoints, online: Spearman -1.0000, 3.4% of 29 examples" in out and out.index(
        "online:"
    ) < out.index("SFTMix beside")


ROW = {
    "model": "NTP baseline",
    "loss": 0.45,
    "perplexity": 1.57,
    "exact_match": 0.6,
    "tokens_per_second": 10_472.0,
    "minutes": 0.7,
}
LARGE = {
    "model": "SFTMix",
    "loss": 12.3456,
    "perplexity": 22026.466,
    "exact_match": 1.0,
    "tokens_per_second": 1e6,
    "minutes": 9999.99,
}


@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_printed_table_fits_60_columns_and_says_what_its_columns_mean(
    columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    print_table([ROW, LARGE, {**ROW, "loss": None}])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    [start] = [n for n, line in enumerate(out.splitlines()) if line.split() == TITLES]
    assert out.splitlines()[start + 3].split() == cells(LARGE)
    assert all(note in " ".join(out.split()) for note in (UNITS, ONE_SEED))
    assert all(f"{title}:" in UNITS for title in TITLES[1:])


def test_the_report_shows_what_was_waited_for_and_the_times_apart(finished, capsys, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    text, lines = (
        text_of((tmp_path / "report" / "index.html").read_text()),
        (tmp_path / "report" / "report.md").read_text().splitlines(),
    )
    assert (
        capsys.readouterr().out.count(" 1.75\n") == 1
        and "| SFTMix | - | - | - | 1 | 1.75 |" in lines
    )
    titles = "minutes | waited | training | evaluation | checkpoints and exports | start and end"
    titles += " | tokens | Wh"
    row = "SFTMix | 1.75 | 1.00 | 0.10 | 0.50 | 0.15 | 1,234 | 2"
    assert f"| {titles} |" in lines and f"| {row} |" in lines
    assert f"{titles} {row}".replace(" | ", " ") in text


def test_the_report_says_how_and_when_the_model_was_made_and_where_it_is(finished, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    manifest = (run.inputs["train"] / "manifest.json").stat().st_mtime
    date = f"{datetime.datetime.fromtimestamp(manifest, datetime.UTC):%Y-%m-%d}"
    for said in ("device a processor of this test", "precision fp32", f"trained on {date}"):
        assert said in text_of(page)
    (link,) = re.findall(r'<a href="([^"]*)"', page)
    assert (tmp_path / "report" / link).resolve() == (run.inputs["train"] / "model").resolve()
    assert "Pairs of the first epoch" in page
    without = run.config.mixup.model_copy(update={"weight": 0.0})
    plain = RunOutputs(run.config.model_copy(update={"mixup": without}), run.inputs)
    build_report(plain, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Pairs of the first epoch" not in page


def test_every_place_with_a_table_says_that_one_seed_decides_nothing(finished, capsys, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = text_of((tmp_path / "report" / "index.html").read_text())
    texts = [capsys.readouterr().out, page, (tmp_path / "report" / "report.md").read_text(), readme]
    assert [text.replace("\n", " ").count(ONE_SEED) for text in texts] == [1] * 4


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_report_says_what_held_out_losses_chose(finished, capsys, tmp_path, keep_best):
    run = finished(confidence=-np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    assert HELD_OUT_TITLE not in (tmp_path / "report" / "index.html").read_text()
    chooses = {"evaluate_every": 2, "keep_best": keep_best, "patience": 2}
    config = run.config.model_copy(update={"train": TrainConfig(**chooses)})
    manifest = json.loads((run.inputs["train"] / artifacts.MANIFEST).read_text())
    manifest["facts"] |= {"num_planned_steps": 12, "num_steps": 8, "best_step": 4}
    (run.inputs["train"] / artifacts.MANIFEST).write_text(json.dumps(manifest))
    lines = [{"step": n, NTP: 3.0} | ({HELD_OUT: 2.0} if n % 2 == 0 else {}) for n in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.inputs["train"] / "metrics.jsonl").write_text(text)
    capsys.readouterr()
    build_report(replace(run, config=config), tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert HELD_OUT_TITLE in page
    kept = f"SFTMix: step {4 if keep_best else 8} is kept, of 8 taken and 12 planned."
    markdown_text = (tmp_path / "report" / "report.md").read_text()
    for shown in (text_of(page), " ".join(capsys.readouterr().out.split()), markdown_text):
        assert kept in shown
        assert ("a little lower than those of other examples" in shown) == keep_best


def test_a_stage_that_did_not_count_what_was_waited_has_no_minutes(finished, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0))
    path = run.inputs["train"] / artifacts.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["facts"]["waited_seconds"]
    path.write_text(json.dumps(manifest))
    build_report(run, tmp_path / "report")
    assert (
        "| SFTMix | - | - | - | 1 | - |"
        in (tmp_path / "report" / "report.md").read_text().splitlines()
    )


def test_the_report_fits_a_phone_is_dark_in_the_dark_and_asks_for_nothing(finished, tmp_path):
    run = finished(confidence=-np.arange(1.0, 31.0), variability=np.arange(1.0, 31.0))
    build_report(run, tmp_path / "report")
    assert_shown_well(tmp_path / "report" / "index.html")
