"""Decoding with NVIDIA DALI: on a GPU's video decoder, or on the CPU for the codecs it has there.

The worker processes read and vet the files and draw every random choice (samples.py); what they
hand over is decoded here batch by batch, augmented, resized and cropped in one go, normalised and
labelled, on a stream of its own, while the model trains on the batch before. docs/adr/0005 says why
this is DALI's dynamic mode and not one of its pipelines.

A batch holds what the CPU pipeline would have put there: the same frames and the same crops, with
pixels that differ by how two decoders turn chroma of half the resolution into colour.
"""

import contextlib
import ctypes
import ctypes.util
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timefast.data.augment_tensor import augment_tensor
from timefast.data.batch import Batch, ClipSpec
from timefast.errors import RunError
from timefast.pipelines.labels import clip_labels
from timefast.pipelines.samples import BackEnd, Chosen, Encoded, Raw, Samples

logger = logging.getLogger("timefast")

INSTALL = 'DALI is not installed; `pip install -e ".[dali]"` provides it'
NO_NVCUVID = (
    "libnvcuvid, the driver's video decoder, cannot be loaded; in a container set "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
)
_TELLING = 4  # videos of a batch that all fail, and are all good, say that DALI cannot work here


def why_not(device: torch.device) -> list[str]:
    """Why DALI cannot decode for this device; empty if it can."""
    if not importlib.util.find_spec("nvidia") or not importlib.util.find_spec("nvidia.dali"):
        return [INSTALL]
    try:
        import nvidia.dali.backend
        import nvidia.dali.experimental.dynamic  # noqa: F401
    except Exception as error:  # a broken installation raises what it likes
        return [f"DALI does not import: {type(error).__name__}: {error}"]
    if device.type != "cuda":
        return []
    reasons = [] if has_nvcuvid() else [NO_NVCUVID]
    if nvidia.dali.backend.GetCUDADeviceCount() == 0:  # type: ignore[attr-defined]
        reasons.append("DALI sees no GPU; its CUDA version may need a newer driver")
    return reasons


def has_nvcuvid() -> bool:
    for name in ("libnvcuvid.so.1", ctypes.util.find_library("nvcuvid")):
        if name is not None:
            with contextlib.suppress(OSError):
                ctypes.CDLL(name)
                return True
    return False


def back_end(device: torch.device) -> BackEnd:
    return "mixed" if device.type == "cuda" else "cpu"


def full_name(device: torch.device) -> str:
    import nvidia.dali

    where = "the GPU" if device.type == "cuda" else "the CPU: VP8, VP9 and MJPEG only"
    return f"dali ({nvidia.dali.__version__}, decoding on {where}; PyAV for other files)"


class Dali:
    """Turns what the workers read into batches on a device."""

    def __init__(self, samples: Samples, device: torch.device, threads: int, labels: bool):
        import nvidia.dali.experimental.dynamic as dynamic

        self._ndd: Any = dynamic
        self._samples, self._device, self._labels = samples, device, labels
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        how: dict[str, Any] = {"num_threads": threads}
        if self._stream is not None:
            how |= {"device_id": device.index, "cuda_stream": self._stream}
        self._context = dynamic.EvalContext(**how)
        self._said: set[str] = set()
        self._beyond_dali: set[int] = set()  # samples that PyAV decodes and DALI does not

    def batch(self, raw: Raw) -> Batch:
        """The batch, complete on the device. Not to be called by two threads at a time.

        Raises RunError if DALI turns out not to work here at all.
        """
        with contextlib.ExitStack() as on:
            if self._stream is not None:
                on.enter_context(torch.cuda.stream(self._stream))
            on.enter_context(self._context)
            on.enter_context(self._ndd.EvalMode.sync_cpu)
            batch = self._batch(raw)
        if self._stream is not None:
            self._stream.synchronize()
        return batch

    def _batch(self, raw: Raw) -> Batch:
        for reason in raw.seen.routed:
            self._say(f"{reason}: decoded by PyAV, not by DALI")
        wanted = {
            video.position: made
            for video, made in zip(raw.chosen, raw.made, strict=True)
            if isinstance(made, Encoded) and video.sample not in self._beyond_dali
        }
        decoded, error = self._decode(wanted)
        chosen: list[Chosen] = []
        clips: list[torch.Tensor | _Uncut] = []
        for video, made in zip(raw.chosen, raw.made, strict=True):
            if isinstance(made, Encoded) and video.position in decoded:
                chosen.append(video)
                drawn, fill = made.drawn, self._samples.fill()
                frames = augment_tensor(decoded[video.position], drawn, fill).contiguous()
                clips += _uncut(frames, made, self._samples.spec)
                continue
            if isinstance(made, Encoded):  # PyAV decodes it, or says what is wrong with it
                good = self._samples.first_good(
                    raw.epoch, video.position, video.step, self._samples.clips, raw.seen
                )
                if good is None:
                    continue
                if good[0].sample == video.sample and video.sample not in self._beyond_dali:
                    self._beyond_dali.add(video.sample)
                    path = self._samples.videos.records[video.sample].path
                    self._say(f"what DALI cannot decode: decoded by PyAV, first {path}", error)
                video, made = good
            chosen.append(video)
            clips += made
        tried = {video.sample for video in raw.chosen if video.position in wanted}
        if len(tried) >= _TELLING and not decoded and tried <= self._beyond_dali:
            raise RunError(
                f"DALI decodes none of {len(tried)} videos that PyAV decodes. It says: {error}\n"
                "Use --pipeline cpu; `python -m timefast.info` says what is missing here."
            )
        batch = self._samples.batch(self._finish(clips), chosen, raw.seen).to(self._device)
        if self._labels and clips:
            batch.flow_label = clip_labels(batch.video, self._samples.spec)
        return batch

    def _decode(self, wanted: dict[int, Encoded]) -> tuple[dict[int, torch.Tensor], str]:
        """Frames uint8 [F, height, width, 3] on the device by position, without those that DALI
        cannot decode; and what it said of the last of these.

        A bad video fails the batch it is in and nothing else, so each is tried alone then.
        """
        try:
            return dict(zip(wanted, self._frames(list(wanted.values())), strict=True)), ""
        except RuntimeError:
            decoded, error = {}, ""
            for position, video in wanted.items():
                try:
                    (decoded[position],) = self._frames([video])
                except RuntimeError as problem:
                    error = " ".join(str(problem).split())
            return decoded, error

    def _frames(self, videos: Sequence[Encoded]) -> list[torch.Tensor]:
        if not videos:
            return []
        ndd = self._ndd
        found = ndd.decoders.video(
            ndd.batch([video.data for video in videos], device="cpu"),
            frames=ndd.batch([np.array(v.frames, np.int32) for v in videos], device="cpu"),
            pad_mode="none",  # a frame that is not there is an error, and not black
            device="cpu" if self._stream is None else "gpu",
        )
        frames = [torch.from_dlpack(frames) for frames in found.tensors.tolist()]
        for video, got in zip(videos, frames, strict=True):
            expected = len(video.frames), video.height, video.width, 3
            if got.shape != expected:
                raise RuntimeError(f"expected frames {expected}, got {tuple(got.shape)}")
        return frames

    def _finish(self, clips: list["torch.Tensor | _Uncut"]) -> torch.Tensor:
        """All clips as one tensor, those that DALI decoded cut, resized and normalised together."""
        spec, ndd = self._samples.spec, self._ndd
        video = torch.empty(len(clips), 3, spec.frames, spec.crop, spec.crop, device=self._device)
        places = [i for i, clip in enumerate(clips) if isinstance(clip, _Uncut)]
        for i, clip in enumerate(clips):
            if isinstance(clip, torch.Tensor):
                video[i] = clip
        if places:
            uncut = [clip for clip in clips if isinstance(clip, _Uncut)]
            resized = ndd.resize(
                ndd.as_batch([clip.frames for clip in uncut], layout="FHWC"),
                size=(spec.crop, spec.crop),
                roi_start=ndd.batch([np.array(c.begin, np.float32) for c in uncut], device="cpu"),
                roi_end=ndd.batch([np.array(c.end, np.float32) for c in uncut], device="cpu"),
                antialias=False,
                dtype=ndd.float32,
            )
            normal = ndd.crop_mirror_normalize(
                resized,
                mean=[255 * value for value in spec.mean],
                std=[255 * value for value in spec.std],
                dtype=ndd.float32,
                output_layout="CFHW",
            )
            video[places] = torch.from_dlpack(ndd.as_tensor(normal))
        return video

    def _say(self, what: str, why: str = "") -> None:
        """Once for each class of file."""
        if (key := what.partition(":")[0]) not in self._said:
            self._said.add(key)
            logger.info("%s%s", what, f" ({why[:200]})" if why else "")


@dataclass(frozen=True)
class _Uncut:
    """Frames uint8 [T, height, width, 3], and the part of them that becomes a clip."""

    frames: torch.Tensor
    begin: tuple[float, float]  # top and left, in pixels of the source
    end: tuple[float, float]


def _uncut(frames: torch.Tensor, video: Encoded, spec: ClipSpec) -> list[_Uncut]:
    height, width = video.cuts.size
    down, across = video.height / height, video.width / width
    return [
        _Uncut(
            frames[clip * spec.frames : (clip + 1) * spec.frames],
            (top * down, left * across),
            ((top + spec.crop) * down, (left + spec.crop) * across),
        )
        for clip, top, left in video.cuts.corners
    ]
