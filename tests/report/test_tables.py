import dataclasses
import re

import numpy as np
import pytest

from jaxsae.report import ReportInputs, summary_table, tables
from jaxsae.report.markup import Code, clean

NAN = float("nan")


def cells(table, row: int) -> list[str]:
    return [cell.text if isinstance(cell, Code) else cell for cell in table.rows[row]]


@pytest.mark.parametrize("value", [None, NAN, np.float32("nan"), float("inf")])
def test_formats__print_a_dash_for_what_is_not_known(value):
    row = {"ci_low": value, "ci_high": 0.5}
    formats = (tables.number, tables.count, tables.signed, tables.byte_size, tables.duration)
    assert [text(value) for text in formats] == ["–"] * 5
    assert tables.interval(row) == "–"
    assert tables.quality_band(value) is None
    assert tables.side_of_zero(row) == "–"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (917 * 10**9, "854.0 GiB"),
        (2**40, "1.0 TiB"),
    ],
)
def test_byte_size__is_in_powers_of_1024(size, text):
    assert tables.byte_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (56760, "15 h 46 min"),
    ],
)
def test_duration__carries_into_minutes_and_hours(seconds, text):
    assert tables.duration(seconds) == text


def test_signed__never_prints_a_negative_zero():
    assert [tables.signed(value) for value in (-0.00004, 0.0, 0.028, -0.0021)] == [
        "+0.0000",
        "+0.0000",
        "+0.0280",
        "-0.0021",
    ]


@pytest.mark.parametrize(
    ("fvu", "band"),
    [
        (0.0, "excellent"),
        (0.05, "excellent"),
        (0.0501, "good"),
        (0.1, "good"),
        (0.2, "fair"),
        (0.2001, "poor"),
        (3.0, "poor"),
    ],
)
def test_quality_band__has_its_limits_inclusive(fvu, band):
    assert tables.quality_band(fvu) == band


def test_sae_table__ends_with_the_statistics_of_known_values(make_inputs):
    rows = [{"layer": layer, "fvu": fvu, "kl": None} for layer, fvu in enumerate((0.02, NAN, 0.06, 0.22))]
    table = tables.sae_table(make_inputs(sae=rows))
    column = table.header.index("FVU")
    assert [row[column] for row in table.rows] == [
        *("0.0200", "–", "0.0600", "0.2200"),
        *("0.1000", "0.0600", "0.0200", "0.2200", "0.0864"),  # std: sqrt(mean of squares .0176 − mean² .01)
    ]
    assert [row[0] for row in table.rows[-5:]] == ["mean", "median", "min", "max", "std"]
    assert [row[table.header.index("Band")] for row in table.rows[:4]] == ["excellent", "–", "good", "poor"]
    assert {row[table.header.index("KL")] for row in table.rows} == {"–"}


def test_sae_detail_table__shows_what_flatters_only_beside_what_does_not(make_inputs):
    rows = [
        {"layer": 0, "fvu": 0.25, "explained_variance_legacy": 0.9, "delta_ce": 0.5, "ce_recovered": 0.95, "mse": 2.0},
        {"layer": 1, "fvu": 0.75, "explained_variance_legacy": None, "delta_ce": 1.5, "ce_recovered": 0.85},
    ]
    inputs = make_inputs(sae=rows)
    details, main = tables.sae_detail_table(inputs), tables.sae_table(inputs)
    found = {title: [row[column] for row in details.rows[:3]] for column, title in enumerate(details.header)}
    assert found["Layer"] == ["0", "1", "mean"]
    assert (found["FVU"], found["EV legacy"]) == (["0.2500", "0.7500", "0.5000"], ["0.9000", "–", "0.9000"])
    assert (found["ΔCE"], found["CE recovered"]) == (["0.5000", "1.5000", "1.0000"], ["95.0%", "85.0%", "90.0%"])
    assert (found["MSE"], found["max"]) == (["2.000", "–", "2.000"], ["–", "–", "–"])
    assert not {"EV legacy", "CE recovered"} & set(main.header)


def test_band_table__counts_every_layer_once(make_inputs):
    rows = [{"layer": layer, "fvu": fvu} for layer, fvu in enumerate((0.02, 0.3, 0.07, NAN, 0.01))]
    table = tables.band_table(make_inputs(sae=rows))
    found = {row[0]: (row[2], row[3]) for row in table.rows}
    assert found == {
        "excellent": ("2", "0, 4"),
        "good": ("1", "2"),
        "fair": ("0", ""),
        "poor": ("1", "1"),
        "not measured": ("1", "3"),
    }


def test_halves__leave_the_middle_layer_out():
    rows = [{"layer": layer} for layer in (4, 0, 3, 1, 2)]
    early, late = tables.halves(rows)
    assert ([row["layer"] for row in early], [row["layer"] for row in late]) == ([0, 1], [3, 4])
    assert tables.halves(rows[:1]) == ([], [])


def test_detection_table__is_sorted_by_auroc_with_unknown_last_and_the_method_marked(make_inputs):
    inputs = make_inputs()
    broken = [{"name": "broken", "auroc": NAN}, *reversed(inputs.detection)]
    table = tables.detection_table(make_inputs(detection=broken, method="tracks"))
    names = [row[0].text for row in table.rows]
    assert names[0] == "logprob_probe_tracks"
    assert names[-1] == "broken"
    assert [names[index] for index in table.marked] == ["tracks"]
    assert cells(table, names.index("tracks"))[1:4] == ["method", "0.701", "[0.680, 0.721]"]


def test_detection_table__names_sample_sizes_once_where_they_agree(make_inputs):
    same = make_inputs()
    assert tables.detection_table(same).caption == "Every row: 2,924 answers in 1,560 groups, 53.1% hallucinated."
    other = [{**same.detection[0], "n": 17}, *same.detection[1:]]
    table = tables.detection_table(make_inputs(detection=other))
    assert table.caption == ""
    assert cells(table, 0)[table.header.index("Answers")] == "17"


def test_phase_table__sums_known_times_and_names_what_to_run(make_inputs):
    phases = [
        {"name": "train", "status": "done", "seconds": 50.0, "output_bytes": 1024, "peak_bytes": 4096},
        {"name": "track", "status": "done", "seconds": None, "output_bytes": 1024, "peak_bytes": 2048},
        {"name": "detect", "status": "missing", "seconds": None},
    ]
    table = tables.phase_table(make_inputs(phases=phases))
    assert cells(table, 2)[1] == "missing: run jaxsae detect"
    assert cells(table, 3)[:5] == ["all", "2 of 3", "50.0 s", "2.0 KiB", "4.0 KiB"]


def test_count_table__shares_are_of_the_category(make_inputs):
    counts = {"right": 3, "wrong": 1, "by_category": {"": {"right": 0, "wrong": 0}, "often": {"right": 3, "wrong": 1}}}
    table = tables.count_table(make_inputs(counts=counts))
    assert [row[4] for row in table.rows] == ["–", "25.0%", "25.0%"]
    assert table.rows[0][0] == "(no category)"


def test_agreement_table__gives_shares_and_kappa_of_each_pair(make_inputs):
    labels = {
        "hallucinated_by_rule": {"alias": 6, "exact": 8},
        "agreement": [
            {"a": "alias", "b": "exact", "n": 8, "agreement": 0.75, "kappa": None},
            {"a": "exact", "b": "alias", "n": 8, "agreement": 0.75, "kappa": 0.25},
        ],
    }
    table = tables.agreement_table(make_inputs(labels=labels))
    assert cells(table, 0) == ["alias", "exact", "75.0%", "100.0%", "75.0%", "–"]
    assert cells(table, 1) == ["exact", "alias", "100.0%", "75.0%", "75.0%", "0.250"]


def test_settings_table__has_one_row_per_leaf(make_inputs):
    table = tables.settings_table({"sae": {"k": 8, "x": {"name": ""}}, "seed": None}, header=("a", "b"))
    assert [cells(table, row) for row in range(3)] == [["sae.k", "8"], ["sae.x.name", "''"], ["seed", "None"]]


def test_clip__says_how_much_there_was():
    assert tables.clip("abc", 3) == "abc"
    assert tables.clip("abcd" * 500, 4) == "abcd … (2,000 characters in all)"


def test_summary_table__stays_within_100_columns(make_inputs):
    long = make_inputs(n_layers=24)
    rows = [{**row, "name": f"{row['name']}_{'x' * 200}"} for row in long.detection]
    names = [{**row, "name": "d" * 200} for row in long.differences]
    hard = make_inputs(
        n_layers=24, detection=rows, differences=names, pass_difference="d" * 200, method=rows[0]["name"]
    )
    for inputs in (long, hard):
        lines = summary_table(inputs).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) > 24 + len(inputs.detection)


def test_summary_table__holds_the_numbers(make_inputs):
    text = summary_table(make_inputs())
    assert re.search(r"logprob_probe_tracks +method +0\.912 +\[0\.891, 0\.932\]", text)
    assert re.search(r"noise canary +0\.497 +\[0\.472, 0\.521\]", text)
    assert "tracks over stack: +0.0030 [-0.0021, +0.0079], holds 0" in text
    assert len(re.findall(r"^ +\d ", text, re.MULTILINE)) == 6


def test_summary_table__of_an_empty_run_names_the_stages():
    text = summary_table(ReportInputs(config_name="c", command="x", created="t"))
    assert "run jaxsae train" in text
    assert "run jaxsae detect" in text


def test_summary_table__keeps_a_hostile_name_on_its_line(make_inputs):
    rows = [{"name": "a\nb\x1b[31m", "auroc": 0.6}]
    text = summary_table(make_inputs(detection=rows))
    assert clean("a\nb\x1b[31m") in text
    assert "\x1b" not in text


def test_category_table__has_the_columns_that_rows_have(make_inputs):
    row = {"detector": "d", "category": "", "n_right": 9, "n_wrong": 2, "auroc": 0.7, "ci_low": 0.6, "ci_high": 0.8}
    plain = tables.category_table(make_inputs(by_category=[row]))
    assert plain.header == ("Detector", "Category", "Right", "Hallucinated", "AUROC", "95% interval")
    assert cells(plain, 0) == ["d", "(no category)", "9", "2", "0.700", "[0.600, 0.800]"]
    within = {"within_auroc": 0.65, "within_ci_low": 0.55, "within_ci_high": None}
    full = tables.category_table(make_inputs(by_category=[row | within, row | {"kind": "k", "category": "c"}]))
    assert cells(full, 0)[2] == ""
    assert cells(full, 0)[-2:] == ["0.650", "–"]
    assert cells(full, 1)[1:3] == ["c", "k"]
    assert len(full.align) == len(full.header) == len(full.rows[1]) == 9


def test_choice_table__has_a_row_per_choice_the_most_frequent_first(make_inputs):
    inputs = make_inputs()
    table = tables.choice_table(tables.named(inputs.detection, inputs.method))
    assert table.rows == (("logistic", "prompt, late_births", "2", "1.2, 1.3"), ("svm", "metrics", "1", "1.1"))


def test_ablation_table__has_both_differences_of_a_family_in_its_row(make_inputs):
    inputs = make_inputs()
    first, second = tables.ablation_table(inputs).rows
    assert first[1:4] == ("+0.0110", "[+0.0070, +0.0150]", "above 0")
    assert first[4:] == ("+0.0070", "[+0.0030, +0.0110]", "above 0")
    assert second[3] == second[6] == "holds 0"
    only = dataclasses.replace(inputs, ablations=[row for row in inputs.ablations if row["kind"] == "added"])
    assert tables.ablation_table(only).rows[0][4:] == (tables.ABSENT,) * 3
