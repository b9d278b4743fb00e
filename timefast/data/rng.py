"""Counter-based randomness: every random choice is a function of (seed, epoch, sample, purpose).

Neither the number of workers nor a restart can change a choice made this way, so a run that is
resumed needs to know its position and nothing else.
"""

import zlib

import numpy as np


def generator(seed: int, epoch: int, sample: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose ("frames", "crop", ...) of one sample in one epoch."""
    return np.random.default_rng([seed, epoch, sample, zlib.crc32(purpose.encode())])


def torch_seed(seed: int, epoch: int, sample: int, purpose: str) -> int:
    """A 63-bit seed for torch, drawn the same way."""
    return int(generator(seed, epoch, sample, purpose).integers(2**63))
