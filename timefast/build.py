"""What a run is built of: its device, its videos, what a clip is, the model."""

import dataclasses

import torch

from timefast import distributed
from timefast.config import TrainConfig
from timefast.data import open_videos
from timefast.data.batch import ClipSpec, VideoSet
from timefast.data.rng import torch_seed
from timefast.data.subsets import labels_of, restrict
from timefast.device import check_impl, pick_device, share_cores_with_workers
from timefast.errors import InputError
from timefast.models import VideoTransformer, create_model


def look_up(config: TrainConfig) -> tuple[torch.device, VideoSet, VideoSet]:
    """What may differ between machines: the device of this process, and the videos."""
    check_impl(config.run.impl)
    processes = distributed.world_size()
    if config.optim.batch_size < processes:
        raise InputError(
            f"--batch-size {config.optim.batch_size}: expected at least one clip for each of "
            f"{processes} processes"
        )
    device = pick_device(config.run.device)
    if device.type == "cuda" and processes > 1:
        device = pick_device(f"cuda:{distributed.local_rank()}")
        torch.cuda.set_device(device)
    share_cores_with_workers(device)
    assert config.data.root is not None
    root = config.data.root
    videos, validation = open_videos(root, "train"), open_videos(root, "validation")
    if config.data.subset is not None:
        labels = labels_of(videos, config.data.subset)
        videos, validation = restrict(videos, labels), restrict(validation, labels)
    return device, videos, validation


def refuse_other_videos(videos: VideoSet) -> None:
    """InputError if the processes of a run see different training videos."""
    prints = distributed.gather(videos.fingerprint())
    other = next((number for number, seen in enumerate(prints) if seen != prints[0]), None)
    if other is not None:
        raise InputError(
            f"--data {videos.root}: process 0 sees {prints[0]['videos']} training videos, process "
            f"{other} sees {prints[other]['videos']}, or other ids or labels"
        )


def clip_spec(config: TrainConfig) -> ClipSpec:
    flow = "flow" in config.method.losses
    return ClipSpec(
        frames=config.model.frames,
        crop=config.model.image_size,
        short_side=config.data.short_side,
        test_short_side=config.data.test_short_side,
        rand_augment=config.data.rand_augment,
        flow_rule=config.method.flow_rule if flow else None,
        flow_tau=config.method.flow_tau if flow else None,
        patch_size=config.model.patch_size,
    )


def build_model(
    config: TrainConfig, classes: int, *, initial_weights: bool = True
) -> VideoTransformer:
    """A new model; the seed decides every random value of it.

    Without `initial_weights` those of an image model are not read: a checkpoint replaces all.
    """
    torch.manual_seed(torch_seed(config.run.seed, 0, 0, "initial weights"))
    fields = dataclasses.asdict(config.model)
    weights = fields.pop("weights")
    if fields["init"] == "auto":  # the published one is made for ImageNet weights
        fields["init"] = "scratch" if weights == "none" else "published"
    model = create_model(
        **fields,
        num_classes=classes,
        impl=config.run.impl,
        time_heads=bool({"order", "flow"} & set(config.method.losses)),
    )
    if weights != "none" and initial_weights:
        from timefast.weights import load_imagenet

        load_imagenet(model, weights)
    return model
