"""Named complete runs. A recipe is a function without arguments that returns a TrainConfig."""

from collections.abc import Callable
from dataclasses import replace

from timefast.config import (
    Backbone,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from timefast.errors import InputError


def demo() -> TrainConfig:
    """TIME on the generated demo set, a small TimeSformer from scratch, minutes on two cores.

    Expect:  temporal classes about 85 (without TIME about 51), shuffled about 29 (45).
    Run:     python -m timefast.train --backbone timesformer

    The initialisation matters: with the published one, made for ImageNet weights, neither this
    model nor its baseline learns any order from 480 videos.
    """
    return TrainConfig(
        recipe="demo",
        model=ModelConfig(
            image_size=64, dim=64, depth=3, heads=4, drop_path=0.1, init="scratch", weights="none"
        ),
        data=DataConfig(short_side=(64, 76), test_short_side=64, rand_augment=None),
        method=MethodConfig(
            smoothing_class=0.1,
            smoothing_order=0.1,
            smoothing_flow=0.1,
            flow_rule="tau",  # minmax calls the noise of still patches motion
            flow_tau=0.5,
        ),
        optim=OptimConfig(
            epochs=16,
            batch_size=16,
            lr=2e-3,
            decay_embeddings=False,
            amsgrad=False,
            schedule="cosine",
            warmup_epochs=2,
        ),
        run=RunConfig(views=(1, 1), eval_every=4),
    )


def time_timesformer_ssv2() -> TrainConfig:
    """TIME on Something-Something V2, TimeSformer-B, 8 frames at 224, from ImageNet weights.

    Expect:  acc@1 63.7, acc@5 87.8 (without TIME: 62.1, 86.4), as published; not yet rerun here.
    Run:     python -m timefast.train --recipe time_timesformer_ssv2 --data /path/to/ssv2

    The published runs used fp16 with loss scaling on 8 GPUs of 8 clips each; on a GPU this takes
    bf16 unless --precision fp16 is given, and 64 clips a step.
    """
    return TrainConfig(recipe="time_timesformer_ssv2", model=ModelConfig(drop_path=0.1))


def time_motionformer_ssv2() -> TrainConfig:
    """TIME on Something-Something V2, Motionformer-B, 8 frames at 224, from ImageNet weights.

    Expect:  acc@1 64.7, acc@5 89.3 (without TIME: 63.8, 88.5), as published; not yet rerun here.
    Run:     python -m timefast.train --recipe time_motionformer_ssv2 --data /path/to/ssv2
    """
    model = ModelConfig(backbone="motionformer", drop_path=0.2)
    return TrainConfig(recipe="time_motionformer_ssv2", model=model)


def time_xvit_ssv2() -> TrainConfig:
    """TIME on Something-Something V2, X-ViT-B, 8 frames at 224, from ImageNet weights.

    Expect:  acc@1 63.5, acc@5 88.1 (without TIME: 60.1, 85.2), as published; not yet rerun here.
    Run:     python -m timefast.train --recipe time_xvit_ssv2 --data /path/to/ssv2
    """
    model = ModelConfig(backbone="xvit", drop_path=0.0)
    return TrainConfig(recipe="time_xvit_ssv2", model=model)


def _without_time(recipe: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    def baseline() -> TrainConfig:
        config = recipe()
        name = "baseline_" + config.recipe.removeprefix("time_")
        return replace(config, recipe=name, method=replace(config.method, losses=()))

    baseline.__doc__ = f"The same run as {recipe.__name__} with the classification loss alone."
    return baseline


_TIME_RECIPES = (demo, time_timesformer_ssv2, time_motionformer_ssv2, time_xvit_ssv2)
RECIPES: dict[str, Callable[[], TrainConfig]] = {}
for _recipe in _TIME_RECIPES:
    RECIPES[_recipe.__name__] = _recipe
    RECIPES["baseline_" + _recipe.__name__.removeprefix("time_")] = _without_time(_recipe)


def get_recipe(name: str | None, backbone: Backbone | None, has_data: bool) -> TrainConfig:
    """The recipe named, or the one that fits: demo without data, time_<backbone>_ssv2 with it."""
    if name is None:
        name = f"time_{backbone or 'timesformer'}_ssv2" if has_data else "demo"
    if name not in RECIPES:
        raise InputError(
            f"--recipe {name}: there is no such recipe; there are {', '.join(RECIPES)}"
        )
    config = RECIPES[name]()
    if backbone and backbone != config.model.backbone:
        if not name.endswith("demo"):
            raise InputError(
                f"--backbone {backbone}: recipe {name} trains {config.model.backbone}; "
                "leave one of the two flags out"
            )
        config = replace(config, model=replace(config.model, backbone=backbone))
    return config
