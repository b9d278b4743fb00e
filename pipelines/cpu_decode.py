"""Frames of a video file on the CPU, with PyAV: the portable path, and the definition of what a
clip contains.

Nothing a header says is believed: frames are counted by reading the packets, a file that decodes
fewer frames than it has packets is sampled again on what really came, and rotation is applied here.
A file is never handed to FFmpeg before it is known to be a regular file under the data root that
begins like a video, and then FFmpeg may use container demuxers and plain files only, so that no
list or address in a file can make it open anything else.

Everything that can be wrong with a file raises VideoError with a `kind` of KINDS.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

NAME = f"cpu (PyAV {av.__version__})"
KINDS = {
    "missing": "no such file",
    "dangling-link": "a link to a file that is not there",
    "outside-root": "leads out of the data folder",
    "directory": "a folder",
    "special-file": "a pipe, socket or device",
    "permission": "may not be read",
    "empty": "zero bytes",
    "not-a-video": "does not begin like a Matroska/WebM, MP4/MOV or AVI file",
    "unreadable": "begins like a video but holds no readable frames",
    "no-video": "no video stream (sound or a cover picture only)",
    "no-decoder": "this FFmpeg has no decoder for it",
    "too-large": "more pixels a frame than MAX_PIXELS",
    "too-long": "more frames than MAX_FRAMES",
    "corrupt": "decoding fails on the way",
    "timeout": "took longer than TIMEOUT_S",
    "changed": "not the file that a scan found good, and not usable now",
}
MAX_PIXELS = 8192 * 4320
MAX_FRAMES = 100_000
TIMEOUT_S = 60.0

_OPEN_OPTIONS = {
    "format_whitelist": "matroska,webm,mov,mp4,avi",
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
}
# what damaged files have been seen to raise, beside FFmpeg's own errors
_DAMAGE = (
    av.FFmpegError, OSError, ValueError, LookupError, EOFError, RuntimeError, OverflowError,
    MemoryError,
)  # fmt: skip


class VideoError(Exception):
    """A video that cannot be used; `kind` is a key of KINDS."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """Frames of one video."""

    frames: np.ndarray  # uint8 RGB [number of indices, height, width, 3], rotated upright
    counted: int  # frames the file really has
    short: str | None  # why the file is thought to be cut off, if it is


@dataclass(frozen=True)
class Opened:
    """A container with its first real video stream and all packets of that stream."""

    container: Any
    stream: Any
    packets: list[Any]
    short: str | None


def decode(path: Path, pick: Callable[[int], Sequence[int]], root: Path) -> Decoded:
    """The frames that `pick(number of frames)` asks for (in order, repeats allowed).

    Decoding stops at the last frame wanted, and only wanted frames become RGB. `root` is the folder
    under which the file must lie once links are followed. Raises VideoError.
    """
    with open_video(path, root) as video:
        try:
            counted = len(video.packets)
            wanted = pick(counted)
            kept, came = _decode(video, set(wanted))
            short = video.short
            if came is not None:  # the end came before the last frame wanted
                short = f"{came} of {counted} frames can be decoded"
                if came == 0:
                    raise VideoError("unreadable", f"none of {counted} frames can be decoded")
                counted, wanted = came, pick(came)
                video.stream.codec_context.flush_buffers()
                kept, _ = _decode(video, set(wanted))
            return Decoded(np.stack([kept[i] for i in wanted]), counted, short)
        except KeyError as error:
            raise VideoError("corrupt", f"frame {error} comes only sometimes") from error
        except _DAMAGE as error:
            raise VideoError("corrupt", f"decoding fails: {_said(error)}") from error


def probe(path: Path, root: Path, *, deep: bool) -> dict[str, Any]:
    """What a file holds: codec, pixel format, width, height (as stored), rotation (degrees
    counter-clockwise), frames, duration (seconds, None if unknown), short (reason or None).

    All packets are read; `deep` decodes all frames, else only the first. Raises VideoError.
    """
    with open_video(path, root) as video:
        context = video.stream.codec_context
        frames, first = len(video.packets), None
        short = video.short
        try:
            came = 0
            for frame in _frames(video):
                first = first or frame
                came += 1
                if not deep:
                    break
        except _DAMAGE as error:
            raise VideoError("corrupt", f"decoding fails: {_said(error)}") from error
        if first is None:
            raise VideoError("unreadable", f"none of {frames} frames can be decoded")
        if deep and came < frames:
            frames, short = came, f"{came} of {frames} frames can be decoded"
        duration = video.container.duration
        return {
            "codec": context.name,
            "pixel_format": first.format.name,
            "width": first.width,
            "height": first.height,
            "rotation": round(first.rotation),
            "frames": frames,
            "duration": None if duration is None else duration / av.time_base,
            "short": short,
        }


@contextmanager
def open_video(path: Path, root: Path) -> Iterator[Opened]:
    """Check a file, open it, count its frames by reading all packets. Raises VideoError."""
    check_file(path, root)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        container = av.open(str(path), options=_OPEN_OPTIONS, timeout=TIMEOUT_S)
    except _DAMAGE as error:
        raise VideoError("unreadable", f"cannot be opened: {_said(error)}") from error
    with container:
        try:
            stream = _video_stream(container)
            packets = []
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    packets.append(packet)
                if len(packets) > MAX_FRAMES:
                    raise VideoError("too-long", f"more than {MAX_FRAMES} frames")
                if time.monotonic() > deadline:
                    raise VideoError("timeout", f"reading took more than {TIMEOUT_S:.0f} s")
            if not packets:
                raise VideoError("unreadable", "there are no frames in it")
            short = _cut_off(container, stream, packets)
        except _DAMAGE as error:
            raise VideoError("unreadable", f"cannot be read: {_said(error)}") from error
        yield Opened(container, stream, packets, short)


def check_file(path: Path, root: Path) -> None:
    """Whether this is a regular file below `root` that begins like a video; raises VideoError.

    Nothing but the first bytes of a regular file is read: a pipe does not block.
    """
    try:
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(root)):
            raise VideoError("outside-root", f"{path} leads to {real}, which is not under {root}")
        mode = os.stat(real).st_mode
        if stat.S_ISDIR(mode):
            raise VideoError("directory", "is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise VideoError("special-file", "is a pipe, socket or device, not a file")
        with open(real, "rb") as file:
            first = file.read(64)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise VideoError("dangling-link", f"links to {real}, which is not there") from error
        raise VideoError("missing", "there is no such file") from error
    except NotADirectoryError as error:
        raise VideoError("missing", "a part of its path is a file") from error
    except PermissionError as error:
        raise VideoError("permission", "may not be read by this user") from error
    except (OSError, ValueError) as error:
        raise VideoError("unreadable", f"cannot be opened: {_said(error)}") from error
    if not first:
        raise VideoError("empty", "has zero bytes")
    if not _begins_like_video(first):
        raise VideoError("not-a-video", f"begins with {first[:16]!r}, which is no video known here")


def _begins_like_video(first: bytes) -> bool:
    matroska = first.startswith(b"\x1a\x45\xdf\xa3")
    iso = first[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    avi = first.startswith(b"RIFF") and first[8:12] == b"AVI "
    return matroska or iso or avi


def _video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture, ready to decode with one thread."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        found = ", ".join(s.type for s in container.streams)
        if not found:
            raise VideoError("unreadable", "there are no streams in it")
        raise VideoError("no-video", f"has no video stream (it holds {found})")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError("no-decoder", "is of a codec that this FFmpeg cannot decode")
    if context.width * context.height > MAX_PIXELS or context.width == 0:
        size = f"{context.width}x{context.height}" if context.width else "refused before decoding"
        raise VideoError("too-large", f"frame size {size}; up to {MAX_PIXELS} pixels are decoded")
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _cut_off(container: Any, stream: Any, packets: list[Any]) -> str | None:
    """Whether packets end before the time that the header promises."""
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    if stream.duration is not None:
        promised = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        promised = container.duration / av.time_base
    else:
        return None
    if not stamps or not stream.average_rate:
        return None
    frame = 1 / float(stream.average_rate)
    lasts = float(max(stamps) * stream.time_base) + frame
    if promised - lasts < 0.9 * frame:
        return None
    return f"{len(packets)} frames, {lasts:.2f} s of the {promised:.2f} s that its header promises"


def _decode(video: Opened, wanted: set[int]) -> tuple[dict[int, np.ndarray], int | None]:
    """Wanted frames by number; and, if the video ended before the last of them, its frame count."""
    # keeps its tables from frame to frame; its default, a thread per core, costs a small frame
    # fifty times what the conversion does
    reformatter = VideoReformatter()
    kept: dict[int, np.ndarray] = {}
    last, came, size = max(wanted), 0, (0, 0)
    for number, frame in enumerate(_frames(video)):
        size = size if number else (frame.width, frame.height)
        if number in wanted:
            # a change of size on the way is brought back to the size of the first frame
            rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
            turns = round(frame.rotation / 90) % 4  # counter-clockwise
            kept[number] = np.rot90(rgb, turns) if turns else rgb
        if number == last:
            return kept, None
        came = number + 1
    return kept, came


def _frames(video: Opened) -> Iterator[Any]:
    """The frames in the order in which they are shown."""
    deadline = time.monotonic() + TIMEOUT_S
    for packet in (*video.packets, None):
        yield from video.stream.codec_context.decode(packet)
        if time.monotonic() > deadline:
            raise VideoError("timeout", f"decoding took more than {TIMEOUT_S:.0f} s")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
