"""python -m timefast.ablate: every row with every seed, once, and never another configuration."""

import json

import pytest

from bench import report
from timefast import ablate
from timefast.config import Parser, add_flags, given_flags

ROW = {"all_gap": 1.0, "protocol": "clip", "videos": {"videos": 2, "sha256": "x"}}


def test_the_rows_are_those_of_table_3():
    """No losses, each of the eight combinations once; TIME last."""
    sets = [frozenset(row.split(",")) - {"none"} for row in ablate.ROWS]
    assert len(set(sets)) == 8 and all(s <= {"order", "debias", "flow"} for s in sets)
    assert (sets[0], sets[-1]) == (frozenset(), frozenset({"order", "debias", "flow"}))


def test_flags_are_handed_on_as_they_were_given():
    parser = Parser()
    add_flags(parser)
    given = [
        "--no-amsgrad", "--compile", "--rand-augment", "none", "--short-side", "64,76",
        "--lr-steps", "none", "--lr", "3e-4", "--data", "a b/c", "--losses", "order,flow",
    ]  # fmt: skip
    flags = given_flags(parser.parse_args(given))
    again = given_flags(parser.parse_args(ablate.as_flags(flags)))
    assert again == flags and len(flags) == 8


def test_table_has_mean_and_sample_deviation_of_each_row():
    rows = [
        {**ROW, "losses": losses, "seed": seed, "all_original": 50.0 + seed, "all_shuffled": 40.0}
        for losses in ("none", "order,flow")
        for seed in (0, 2)
    ]
    lines = ablate.table(rows).splitlines()
    assert lines[0] == "| order | debias | flow | all: original | shuffled | gap |"
    assert lines[2] == "|  |  |  | 51.0 ± 1.4 | 40.0 ± 0.0 | 1.0 ± 0.0 |"
    assert lines[3].startswith("| ✓ |  | ✓ | 51.0 ± 1.4 |")
    assert lines[5] == "Top-1 in percent; seeds 0, 2. clip."


def test_ablation_trains_each_run_once_and_measures_it(tiny_run, tmp_path, monkeypatch, capsys):
    trained = []
    real = ablate.train
    monkeypatch.setattr(ablate, "train", lambda flags: (trained.append(flags), real(flags))[1])
    out, results = tmp_path / "out", tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    flags = ["--data", str(tiny_run.parent / "data"), "--recipe", "demo", "--out", str(out)]
    small = ["--dim", "32", "--heads", "2", "--depth", "1", "--max-steps", "1", "--workers", "0"]
    rows = ["--rows", "none", "debias,flow", "--seeds", "3"]

    assert ablate.main([*flags, *small, *rows, "--plan"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and not trained and "--method.losses=debias,flow" in commands[1]

    assert ablate.main([*flags, *small, *rows, "--record", str(results)]) == 0
    assert len(trained) == 2
    record = json.loads((out / "ablation.json").read_text())
    first, second = record["rows"]
    assert (first["losses"], second["losses"]) == ("none", "debias,flow") and first["seconds"] > 0
    assert {"all_gap", "temporal_original", "static_shuffled"} <= first.keys()
    assert {"aligned", "conflict"} & first.keys()  # this data set knows of a cue
    config = json.loads((out / "debias-flow-3" / "config.json").read_text())["config"]
    assert config["method"]["losses"] == ["debias", "flow"] and config["run"]["seed"] == 3
    assert "| ✓ | ✓ |" in (out / "ablation.md").read_text()
    (file,) = results.glob("demo-losses_*.json")
    assert "+ debias, flow" in report.demo_losses(tmp_path, "") and file.stem.count("_") == 3

    assert ablate.main([*flags, *small, *rows]) == 0  # everything is there
    assert len(trained) == 2
    assert json.loads((out / "ablation.json").read_text())["rows"] == record["rows"]

    assert ablate.main([*flags, *small, *rows, "--lr", "1"]) == 2
    assert "--lr: 0.002 there, 1.0 asked for" in capsys.readouterr().err
    longer = [*small[:-3], "2", *small[-2:]]
    assert ablate.main([*flags, *longer, *rows]) == 0  # goes on with both
    assert len(trained) == 4
    assert json.loads((out / "none-3" / "config.json").read_text())["total_steps"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--losses", "order"], "--losses: every row and seed sets its own"),
        (["--seed", "1"], "--seed: every row and seed sets its own"),
        (["--seeds", "-1"], "--seeds: expected 0 or more"),
        (["--seeds", "0", "0"], "--seeds: expected each at most once, got 0 0"),
        (["--rows", "flow", "flow"], "--rows: expected each at most once, got flow flow"),
        (["--record", "/no/such/folder"], "there is no such folder"),
        (["--recipe", "dmeo"], "there is no such recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_ends_with_2(flags, said, capsys):
    assert ablate.main(flags) == 2
    assert said in capsys.readouterr().err
