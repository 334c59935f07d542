"""Reports of the papers' experiments: scores, what is kept of them, and verdicts."""

import csv
from dataclasses import fields, replace

import pytest

from experiments import mixkd, table
from experiments.claims import beats, gains_most_with_little_data, verdict, verdicts
from experiments.scores import Score, add, read, write


def score(row, column, seed, value):
    rest = {field.name: {"float": 1.0, "int": 1}.get(field.type, "x") for field in fields(Score)}
    return Score(**{**rest, "row": row, "column": column, "seed": seed, "score": value})


def scores_of(row, values):
    return [score(row, column, seed, value) for (column, seed), value in values.items()]


def test_what_other_runs_kept_stays_if_their_settings_were_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    claim = beats("SM", "KD", "SM beats KD")

    def keep(run, rows, columns, epochs=3):
        own = table.Table(
            "t", "T", tmp_path / run, ("KD", "SM"), ("a", "b", "c"), (claim,), {"epochs": epochs, "model": run}
        )
        for row, points in rows.items():
            write(own.group_folder(row) / "scores.csv", [score(row, column, 1, points) for column in columns])
        own.report()
        own.keep()

    keep("first", {"KD": 50.0, "SM": 60.0, "once": 1.0}, "ab")
    keep("second", {"SM": 80.0}, "bc")
    found = {(line.row, line.column): line.score for line in read(tmp_path / "results" / "t.csv")}
    of_first = {("KD", "a"): 50, ("KD", "b"): 50, ("SM", "a"): 60, ("once", "a"): 1, ("once", "b"): 1}
    assert found == {**of_first, ("SM", "b"): 80, ("SM", "c"): 80}
    lines = (tmp_path / "results" / "t.md").read_text().splitlines()
    assert "a | b | c | average" in " ".join(lines[0].split())
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["KD", "SM", "once"]
    assert "20.00" in (tmp_path / "results" / "t-verdicts.md").read_text()
    assert (tmp_path / "results" / "t.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"other settings \(epochs 3 there, 4 here\)"):
        keep("third", {"SM": 90.0}, "bc", epochs=4)


def test_nothing_of_another_teacher_stays_in_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")

    def keep(row, columns, day, of_teacher):
        own = table.Table("t", "T", tmp_path / day, ("teacher", "KD", "SM"), ("a", "b"), (), {})
        scores = {"teacher": of_teacher, row: 50.0}
        lines = [score(name, column, 1, scores[name]) for name in scores for column in columns]
        write(own.group_folder(row) / "scores.csv", [replace(line, date=day) for line in lines])
        own.report()
        own.keep()
        kept = read(tmp_path / "results" / "t.csv")
        return {(line.row, line.column) for line in kept if line.row != "teacher"}

    assert keep("KD", "ab", "monday", 80.25) == {("KD", "a"), ("KD", "b")}
    assert keep("SM", "b", "tuesday", 80.25) == {("KD", "a"), ("KD", "b"), ("SM", "b")}  # trained again, the same
    assert keep("SM", "a", "friday", 80.5) == {("KD", "b"), ("SM", "b"), ("SM", "a")}


def test_perplexities_of_rows_that_were_kept_before_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    for run, rows in (("first", ["KD"]), ("second", ["SM"]), ("third", ["SM", "KD"])):
        own = table.Table("t", "T", tmp_path / run, ("KD", "SM"), ("a",), (), {})
        for row in rows:
            write(own.group_folder(row) / "scores.csv", [score(row, "a", 1, 50.0)])
        own.report()
        (own.folder / "perplexity.md").write_text(run)
        if run == "second":
            with pytest.raises(ValueError, match=r"t\.csv has KD, whose perplexities are not in .*second: train these"):
                own.keep()
        else:
            own.keep()
        kept = (tmp_path / "results" / "t-perplexity.md").read_text()
        assert kept == ("third" if run == "third" else "first")


def test_seeds_of_other_calls_stay(tmp_path):
    path = tmp_path / "scores.csv"
    add(path, [score("KD", "a", seed, 50.0) for seed in (1, 2)])
    add(path, [score("KD", "a", seed, 60.0) for seed in (2, 3)])
    assert [(line.seed, line.score) for line in read(path)] == [(1, 50), (2, 60), (3, 60)]
    add(path, [replace(score("KD", "a", 4, 70.0), learning_rate=2.0)])
    assert [(line.seed, line.score) for line in read(path)] == [(4, 70)]


@pytest.mark.parametrize(
    ("differences", "words", "mean", "error", "p"),
    [
        ([1.0, 2.0, 6.0], "within noise", 3.0, 1.5275, 0.1885),
        ([1.0, 1.4, 1.1], "holds here", 1.1667, 0.1202, 0.0104),
        ([-1.0, -1.4, -1.1], "does not hold here", -1.1667, 0.1202, 0.0104),
        ([1.0, 2.0, 1.2], "holds here", 1.4, 0.3055, 0.0445),
        ([1.0, 2.2, 1.2], "within noise", 1.4667, 0.3712, 0.0585),
        ([0.0, 0.0], "within noise", 0.0, 0.0, 1.0),
        ([2.0, 2.0], "holds here", 2.0, 0.0, 0.0),
        ([(70.1 - 70.0) + (60.0 - 60.1), (80.3 - 80.2) + (50.1 - 50.2)], "within noise", 0.0, 0.0, 1.0),
        ([5.0], "not enough measured", 5.0, None, None),
        ([], "not enough measured", None, None, None),
    ],
)
def test_verdicts(differences, words, mean, error, p):
    found = verdict(differences)
    assert found.words == words
    for got, want in ((found.mean, mean), (found.error, error), (found.p, p)):
        assert got == (None if want is None else pytest.approx(want, abs=2e-4))


def test_a_claim_compares_students_of_one_seed_on_an_average_of_columns():
    good = scores_of("good", {("a", 1): 70, ("b", 1): 50, ("a", 2): 72, ("b", 2): 9, ("a", 3): 11, ("c", 1): 99})
    bad = scores_of("bad", {("a", 1): 69, ("b", 1): 47, ("a", 2): 71, ("b", 2): 6.8, ("a", 3): 10})
    assert beats("good", "bad", "").differences([*good, *bad]) == pytest.approx([2, 1.6])  # seed 3 lacks a column
    table = verdicts([beats("good", "bad", "good is better")], [*bad, *good]).splitlines()
    cells = ["good is better", "within noise", "1.80", "0.20", "0.07", "2"]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == cells
    assert len(verdicts([beats("good", "worst", "good is better")], [*bad, *good]).splitlines()) == 2  # no such row
    bad[0] = replace(bad[0], score=69.8)  # the seeds agree
    assert "| < 0.01 |" in verdicts([beats("good", "bad", "good is better")], [*bad, *good])


def test_a_claim_averages_the_same_columns_of_all_its_seeds():
    good = scores_of("good", {("a", 1): 1, ("b", 1): 5, ("a", 2): 2, ("c", 2): 90})
    bad = scores_of("bad", {("a", 1): 0, ("b", 1): 0, ("a", 2): 0, ("c", 2): 0})
    claim = beats("good", "bad", "")
    assert claim.differences([*good, *bad]) == [1, 2]  # one column of two seeds, not two columns of one
    more = scores_of("good", {("a", 3): 3, ("b", 3): 9, ("b", 2): 6}) + scores_of("bad", {("a", 3): 0, ("b", 3): 0})
    assert claim.differences([*good, *bad, *more, score("bad", "b", 2, 0)]) == [3, 4, 6]


def test_little_data_is_the_smallest_part_against_the_largest():
    claim = gains_most_with_little_data("SM+TMKD", "KD", "", mixkd.Cell.parse)
    kd = scores_of("KD", {(c, s): 50 for c in ("rte:1%", "rte:10%", "rte:100%", "sst2:1%") for s in (1, 2)})
    gained = {"rte:1%": 6, "rte:10%": 100, "rte:100%": 2, "sst2:1%": 30}
    mix = [score("SM+TMKD", s.column, s.seed, s.score + gained[s.column] + s.seed * (s.column == "rte:1%")) for s in kd]
    assert claim.differences([*mix, *kd]) == [5, 6]


def test_scores_survive_their_file(tmp_path):
    lines = [score("a, b", "sst2:1%", 1, 100 / 3), score("c", "rte", 2, 0.0)]
    write(tmp_path / "scores.csv", lines)
    assert read(tmp_path / "scores.csv") == lines
    with open(tmp_path / "scores.csv", newline="") as file:
        assert next(csv.reader(file)) == [field.name for field in fields(Score)]


def test_a_row_without_all_columns_has_no_mean_over_them(tmp_path):
    own = table.Table("t", "T", tmp_path, ("KD", "SM"), ("a", "b"), (), {})
    for row, columns in (("KD", "ab"), ("SM", "a")):
        lines = [replace(score(row, column, 1, 50.0), parameters=100, seconds=60.0) for column in columns]
        write(own.group_folder(row) / "scores.csv", lines)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in own.report().splitlines()]
    assert [(line[3], line[-1]) for line in cells[2:]] == [("50.0", "1.0 min"), ("–", "–")]


def test_a_table_shows_the_least_latency_of_models_of_one_size_and_no_average_of_one_column(tmp_path):
    own = table.Table("t", "T", tmp_path, ("KD", "SM"), ("a", "b"), (), {})
    taken = {"KD": (100, 5.0), "SM": (100, 3.0), "other": (101, 4.0)}
    for row, (parameters, latency) in taken.items():
        line = replace(score(row, "a", 1, 50.0), parameters=parameters, inner_parameters=1, latency_ms=latency)
        line = replace(line, seconds=90.0, threads=2)
        write(own.group_folder(row) / "scores.csv", [line])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in own.report().splitlines()]
    assert cells[0] == ["", "a", "parameters (inner)", "latency", "training"]
    assert [line[3] for line in cells[2:]] == ["3.00 ms", "3.00 ms", "4.00 ms"]
    assert [line[4] for line in cells[2:]] == ["3.0 min"] * 3
    assert [line.latency_ms for line in read(tmp_path / "scores.csv")] == [5, 3, 4]
