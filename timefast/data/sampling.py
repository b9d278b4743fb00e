"""Which frames of a video make a clip: integers in, integers out.

A video of n frames is cut into T segments of (n - 1) / T frames, whose ends are rounded half to
even and both belong to the segment, as in the published code. A clip takes one frame of each: a
random one in training, the middle one in evaluation. Neighbouring segments share an end, so a frame
may come twice; a video with fewer than T frames repeats frames.
"""

import numpy as np


def segments(n: int, frames: int) -> list[tuple[int, int]]:
    """First and last frame number of each of the `frames` segments of a video of n frames."""
    if n < 1 or frames < 1:
        raise ValueError(f"expected at least 1 frame, got a video of {n} and a clip of {frames}")
    size = (n - 1) / frames
    ends = [round(size * i) for i in range(frames + 1)]
    return list(zip(ends, ends[1:], strict=False))


def train_frames(n: int, frames: int, rng: np.random.Generator) -> list[int]:
    """A random frame of each segment, both ends included."""
    return [int(rng.integers(start, end + 1)) for start, end in segments(n, frames)]


def view_frames(n: int, frames: int, view: int = 0, views: int = 1) -> list[int]:
    """The frames of one of `views` temporal views.

    A segment start..end of m = end - start + 1 frames is divided evenly: view v takes
    start + floor((m (2 v + 1) - 1) / (2 views)). The only view takes the middle, floor((start +
    end) / 2), as published. All views differ as soon as one segment has as many frames as
    there are views; in a shorter video some coincide (`distinct_views`).
    """
    if not 0 <= view < views:
        raise ValueError(f"view: expected 0..{views - 1}, got {view}")
    return [
        start + ((end - start + 1) * (2 * view + 1) - 1) // (2 * views)
        for start, end in segments(n, frames)
    ]


def distinct_views(n: int, frames: int, views: int) -> int:
    """How many of the temporal views of a video of n frames really differ."""
    return len({tuple(view_frames(n, frames, view, views)) for view in range(views)})
