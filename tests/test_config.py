"""``--config FILE``: flags win, values are checked as flags are, and a run's own record repeats it."""

import pytest

from fastkd.cli import distill, main, teacher
from fastkd.cli.config import read_options, write_options

NEEDED = "teacher: runs/teacher\ntasks: [sst2, mrpc]\noutput: runs/mkd\n"


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses the options of ``fastkd distill mkd`` from the text of a file and from flags."""
    parsed = []
    for module in (distill, teacher):
        monkeypatch.setattr(module, "run", lambda args: parsed.append(args) or 0)

    def parse(text, *flags):
        (tmp_path / "run.yaml").write_text(text)
        assert main(["distill", "mkd", "--config", str(tmp_path / "run.yaml"), *flags]) == 0
        return parsed[-1]

    return parse


def test_options_come_from_the_file(parse):
    args = parse(f"{NEEDED}max_train_rows: 100\nlearning-rate: 1e-4\nbaseline: false\n# a remark\n")
    assert (args.teacher, args.tasks, args.output) == ("runs/teacher", "sst2,mrpc", "runs/mkd")
    assert (args.max_train_rows, args.learning_rate, args.baseline) == (100, 1e-4, False)
    assert args.batch_size == 128
    assert parse(f"{NEEDED}no-baseline: true").baseline is False


def test_a_flag_wins_on_either_side_of_the_file(parse, tmp_path):
    text = f"{NEEDED}epochs: 3\nbaseline: false\n"
    args = parse(text, "--epochs", "10", "--baseline")
    assert (args.epochs, args.baseline) == (10, True)
    assert main(["distill", "mkd", "--epochs=7", f"--config={tmp_path / 'run.yaml'}"]) == 0
    assert parse(text).epochs == 3


def test_a_flag_wins_over_what_it_excludes(parse, tmp_path):
    text = f"{NEEDED}ratio: 0.25\n"
    (tmp_path / "makd.yaml").write_text(text)
    parse(NEEDED)  # makes the command stop at its options
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "run", lambda args: parsed.append(args) or 0)
        assert main(["distill", "makd", "--config", str(tmp_path / "makd.yaml")]) == 0
        assert main(["distill", "makd", "--config", str(tmp_path / "makd.yaml"), "--rank=8"]) == 0
    assert [(args.ratio, args.rank) for args in parsed] == [(0.25, None), (None, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown option 'epoch'; the nearest known one is 'epochs'"),
        ("bath_size: 3", "unknown option 'bath-size'; the nearest known one is 'batch-size'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("epochs: many", "argument --epochs: 'many' must be a positive number"),
        ("epochs: true", "argument --epochs: 'true' must be a positive number"),
        ("epochs: [1, 2]", "argument --epochs: '1,2' must be a positive number"),
        ("batch-size: 1.5", "argument --batch-size: '1.5' must be a positive number"),
        ("loss: l1", "argument --loss: invalid choice: 'l1'"),
        ("baseline: 1", "baseline must be true or false, not '1'"),
        ("epochs:", "epochs must have a value"),
        ("data-dir: null", "data-dir must have a value"),
        ("epochs: {a: 1}", "epochs must have a value or a list of values"),
        ("batch-size: 3\nbatch_size: 4", "gives batch-size twice"),
        ("epochs: 3\nepochs: 4", "gives epochs twice"),
        ("tasks: []", "tasks must have a value or a list of values"),
        ("- epochs", "must hold options"),
        ("", "must hold options"),
        ("epochs: [1", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused(parse, capsys, text, message):
    with pytest.raises(SystemExit) as stopped:
        parse(text, "--teacher", "t", "--tasks", "sst2", "--output", "o")
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert "run.yaml" in error


def test_a_missing_file_is_named(parse, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["teacher", "--config", str(tmp_path / "none.yaml")])
    assert f"No such file or directory: '{tmp_path / 'none.yaml'}'" in capsys.readouterr().err


def test_an_option_that_neither_gives_is_missed(parse, capsys):
    with pytest.raises(SystemExit):
        parse("epochs: 3", "--teacher", "t", "--output", "o")
    assert "the following arguments are required: --tasks" in capsys.readouterr().err


def test_the_record_of_a_run_repeats_it(parse, tmp_path):
    first = parse(f"{NEEDED}epochs: 2.5\nlearning-rate: 1e-5\nbaseline: false\nseeds: 1,2\n")
    write_options(tmp_path, "distill mkd", vars(first))
    record = (tmp_path / "options.yaml").read_text()
    second = parse(record)
    assert vars(second) | {"config": None} == vars(first) | {"config": None}
    assert "config" not in read_options(tmp_path / "options.yaml")
