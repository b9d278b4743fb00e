"""Parameter groups and learning rate schedules."""

import math

import torch
from torch import nn

from timefast.config import OptimConfig

# tables of vectors that are added to tokens, by the last part of their names
EMBEDDINGS = ("cls_token", "pos_embed", "time_embed", "temp_embed", "st_embed")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; biases and other vectors are never decayed, embeddings only if the config says so.

    The published code decays every tensor of more than one dimension, embeddings included,
    although its models list those as exempt.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        embedding = name.split(".")[-1] in EMBEDDINGS
        decay = parameter.ndim > 1 and (config.decay_embeddings or not embedding)
        (decayed if decay else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        amsgrad=config.amsgrad,
        fused=True,  # skips a non-finite step on the device, without asking the host
    )


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step `step` (from 0). A function of position: nothing to save."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(int(epoch) >= at for at in config.lr_steps)
    left = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))
