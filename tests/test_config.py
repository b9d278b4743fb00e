"""The configuration: flags, recipes, round trip."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from timefast.config import (
    ModelConfig,
    Parser,
    TrainConfig,
    add_flags,
    flag_of,
    given_flags,
    sections,
)
from timefast.errors import InputError
from timefast.failures import LEAST_BUDGET
from timefast.recipes import RECIPES, get_recipe
from timefast.run_folder import stored_config


def parse(*argv):
    parser = Parser()
    add_flags(parser)
    return given_flags(parser.parse_args(list(argv)))


def test_flags_not_given_leave_no_trace():
    assert parse() == {}


def test_each_field_has_one_flag_of_its_own():
    flags = [
        flag_of(section, spec.name)
        for section in sections()
        for spec in dataclasses.fields(getattr(TrainConfig(), section))
    ]
    assert len(flags) == len(set(flags))


def test_flags_replace_fields_of_a_recipe():
    changes = parse("--lr", "3e-4", "--data", "/tmp/x", "--losses", "order,flow", "--views", "2x3")
    config = RECIPES["demo"]().replace(changes)
    assert config.optim.lr == 3e-4
    assert config.data.root == Path("/tmp/x")
    assert config.method.losses == ("order", "flow")
    assert config.run.views == (2, 3)


def test_losses_none_means_classification_alone():
    assert parse("--losses", "none") == {("method", "losses"): ()}
    config = RECIPES["demo"]().replace(parse("--losses", "none"))
    assert config.method.weights() == (0.0, 0.0, 0.0)


def test_dotted_spelling_sets_the_same_field():
    assert parse("--optim.batch-size", "4") == parse("--batch-size", "4")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batchsize", "4"], "did you mean --batch-size"),
        (["--losses", "ordr"], "expected one of order, debias, flow"),
        (["--short-side", "1,2,3"], "expected 2 values"),
        (["--backbone", "resnet"], "invalid choice"),
    ],
)
def test_wrong_flags_exit_with_2_and_a_hint(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_impossible_values_name_the_flag():
    with pytest.raises(InputError, match="--image-size: expected a multiple of patch_size=16"):
        ModelConfig(image_size=100)
    with pytest.raises(InputError, match="--batch-size"):
        RECIPES["demo"]().replace({("optim", "batch_size"): 0})
    with pytest.raises(InputError, match="--flow-tau"):
        RECIPES["demo"]().replace({("method", "flow_tau"): None})


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--lr", "nan"), ("--lr", "0"), ("--weight-decay", "-1"), ("--beta1", "1"),
        ("--eps", "0"), ("--warmup-epochs", "-1"), ("--clip-grad", "-1"), ("--clip-grad", "inf"),
        ("--smoothing-order", "1"), ("--smoothing-class", "-0.1"), ("--weight-flow", "-1"),
        ("--flow-tau", "-1"), ("--mlp-ratio", "0"), ("--frames", "1"), ("--views", "1x2"),
        ("--views", "0x1"), ("--workers", "-1"), ("--max-bad-fraction", "2"),
        ("--short-side", "60,76"), ("--short-side", "76,64"), ("--test-short-side", "60"),
        ("--losses", "order,order"), ("--rand-augment", "foo"),
        ("--max-bad-in-a-row", "0"), ("--out", ""), ("--data", ""), ("--seed", "-1"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_before_any_work(flag, value, capsys):
    with pytest.raises((InputError, SystemExit)) as refused:
        RECIPES["demo"]().replace(parse(flag, value))
    if isinstance(refused.value, SystemExit):
        assert refused.value.code == 2 and flag in capsys.readouterr().err
    else:
        assert str(refused.value).startswith(flag)


def test_rand_augment_says_how_to_switch_it_off():
    with pytest.raises(InputError, match="'foo' is not understood.*; none switches it off$"):
        RECIPES["demo"]().replace(parse("--rand-augment", "foo"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_the_round_trip_to_json(name):
    config = RECIPES[name]()
    assert config.recipe == name
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("baseline_")])
def test_the_baseline_twin_differs_in_the_losses_alone(name):
    ours = RECIPES[name]()
    twin = RECIPES["baseline_" + name.removeprefix("time_")]()
    assert twin.method.losses == ()
    same = dataclasses.replace(twin, recipe=ours.recipe, method=ours.method)
    assert same == ours


def test_the_recipe_follows_from_backbone_and_data():
    assert get_recipe(None, "timesformer", has_data=False).recipe == "demo"
    assert get_recipe(None, "timesformer", has_data=True).recipe == "time_timesformer_ssv2"
    with pytest.raises(InputError, match="there are demo"):
        get_recipe("nope", None, has_data=False)
    with pytest.raises(InputError, match="trains timesformer"):
        get_recipe("time_timesformer_ssv2", "xvit", has_data=True)


def test_published_recipe_has_the_published_numbers():
    config = RECIPES["time_timesformer_ssv2"]()
    optim, model, data, method = config.optim, config.model, config.data, config.method
    assert (optim.lr, optim.epochs, optim.batch_size, optim.accumulate) == (1e-4, 35, 64, 1)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 0.05)
    assert optim.amsgrad and optim.decay_embeddings
    assert (optim.schedule, optim.lr_steps, optim.warmup_epochs) == ("step", (20, 30), 0)
    assert optim.clip_grad is None and config.run.seed == 0
    assert (method.flow_rule, method.flow_tau) == ("minmax", None)
    assert method.weights() == (1.0, 1.0, 1.0)
    smoothing = method.smoothing_class, method.smoothing_order, method.smoothing_flow
    assert smoothing == (0.2, 0.2, 0.2)
    assert (model.frames, model.image_size, model.patch_size, model.drop_path) == (8, 224, 16, 0.1)
    assert (model.weights, model.init) == ("imagenet", "auto")  # then published
    assert (data.short_side, data.test_short_side) == ((256, 320), 224)
    assert data.rand_augment == "rand-m20-mstd0.5-inc1"
    assert config.run.views == (1, 3)


def test_a_stored_field_that_nobody_knows_is_refused():
    values = TrainConfig().to_dict()
    values["optim"]["momentum"] = 0.9
    with pytest.raises(InputError, match="momentum"):
        TrainConfig.from_dict(values)


def test_a_stored_configuration_says_what_it_lacks(tmp_path):
    for stored, missing in (({"a": 1}, "config"), ({"config": {}}, "recipe")):
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(InputError, match=f"it has no entry '{missing}'; choose another --out"):
            stored_config(tmp_path)


def test_the_least_number_of_bad_videos_is_told():
    said = f"more than {LEAST_BUDGET}"
    file = Path(__file__).parent.parent / "docs/data.md"
    parser = Parser()
    add_flags(parser)
    assert said in " ".join(parser.format_help().split()) and said in file.read_text("utf-8")


def test_help_of_every_flag_is_written():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert all(action.help for action in parser._actions)
