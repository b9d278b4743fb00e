"""Frames of a video file on the CPU, with PyAV: the portable path, and the definition of what a
clip contains.

Nothing a header says is believed: frames are counted by reading the packets, a file that decodes
fewer frames than it has packets is sampled again on what really came, and rotation is applied here.
A file is never handed to FFmpeg before it is known to be a regular file under the data root that
begins like a video, and then FFmpeg may use container demuxers and plain files only, so that no
list or address in a file can make it open anything else.

Everything that can be wrong with a file raises VideoError with a `kind` of KINDS.
"""

import io
import os
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
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
    "crash": "ends the process that decodes it",
    "changed": "not the file that a scan found good, and not usable now",
}
MAX_PIXELS = 8192 * 4320
MAX_FRAMES = 100_000
TIMEOUT_S = 60.0
Within = tuple[Path, int, int] | None  # a tar file, first byte and number of bytes of the video
# a packet of these is a frame, and a key frame needs nothing that stands before it
_SEEKABLE = ("vp9", "mjpeg")
_KEY_FRAMES = 8  # looked at for a change of size when not all frames are

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
    held: dict[str, Any]  # what `probe` says of the file, as far as it was seen


@dataclass
class Opened:
    """A container with its first real video stream and all packets of that stream."""

    container: Any
    stream: Any
    packets: list[Any]
    short: str | None
    hidden: int  # packets that an edit list hides: others may need them, FFmpeg drops their frames
    first: Any = None  # the first frame that was decoded

    @property
    def counted(self) -> int:
        """Frames there are to see."""
        return len(self.packets) - self.hidden

    def held(self, frames: int, short: str | None) -> dict[str, Any]:
        """What is known of the video once a frame was decoded."""
        duration = self.container.duration
        return {
            "codec": self.stream.codec_context.codec.canonical_name,
            "pixel_format": self.first.format.name,
            "width": self.first.width,
            "height": self.first.height,
            "rotation": round(self.first.rotation),
            "frames": frames,
            "duration": None if duration is None else duration / av.time_base,
            "short": short,
        }


def decode(
    path: Path, pick: Callable[[int], Sequence[int]], root: Path, within: Within = None
) -> Decoded:
    """The frames that `pick(number of frames)` asks for (in order, repeats allowed).

    Decoding stops at the last frame wanted, passes over what no wanted frame needs where that
    changes no pixel, and only wanted frames become RGB. `root` is the folder under which the file
    must lie once links are followed; `within` says where in a tar file it is. Raises VideoError.
    """
    with open_video(path, root, within) as video:
        try:
            counted = video.counted
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
            frames = np.stack([kept[i] for i in wanted])
            return Decoded(frames, counted, short, video.held(counted, short))
        except KeyError as error:
            raise VideoError("corrupt", f"frame {error} comes only sometimes") from error
        except _DAMAGE as error:
            raise VideoError("corrupt", f"decoding fails: {_said(error)}") from error


def probe(path: Path, root: Path, within: Within = None, *, deep: bool) -> dict[str, Any]:
    """What a file holds: codec, pixel format, width, height (as stored), rotation (degrees
    counter-clockwise), frames, duration (seconds, None if unknown), short (reason or None),
    resized (whether the frame size changes on the way), hidden (frames that an edit list hides).

    All packets are read; `deep` decodes all frames, else some key frames. Raises VideoError.
    """
    with open_video(path, root, within) as video:
        frames, short = video.counted, video.short
        sizes: list[tuple[int, int]] = []
        try:
            every = (frame for _, frame in _frames(video))
            for frame in every if deep else _key_frames(video):
                video.first = video.first or frame
                sizes.append((frame.width, frame.height))
        except _DAMAGE as error:
            raise VideoError("corrupt", f"decoding fails: {_said(error)}") from error
        if not sizes:
            raise VideoError("unreadable", f"none of {frames} frames can be decoded")
        if deep and len(sizes) < frames:
            short = f"{len(sizes)} of {frames} frames can be decoded"
            frames = len(sizes)
        resized = len(set(sizes)) > 1
        return {**video.held(frames, short), "resized": resized, "hidden": video.hidden}


@contextmanager
def open_video(path: Path, root: Path, within: Within = None) -> Iterator[Opened]:
    """Check a file, open it, count its frames by reading all packets. Raises VideoError."""
    check_file(path, root, within)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        source: Any = str(path) if within is None else io.BytesIO(read_bytes(path, within))
        container = av.open(source, mode="r", options=_OPEN_OPTIONS, timeout=TIMEOUT_S)
    except _DAMAGE as error:
        raise VideoError("unreadable", f"cannot be opened: {_said(error)}") from error
    with container:
        try:
            stream = _video_stream(container)
            packets, hidden = [], 0
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet)
                    hidden += packet.is_discard
                if len(packets) > MAX_FRAMES:
                    raise VideoError("too-long", f"more than {MAX_FRAMES} frames")
                if time.monotonic() > deadline:
                    raise VideoError("timeout", f"reading took more than {TIMEOUT_S:.0f} s")
            if len(packets) == hidden:
                raise VideoError("unreadable", "there are no frames in it")
            short = _cut_off(container, stream, packets)
        except _DAMAGE as error:
            raise VideoError("unreadable", f"cannot be read: {_said(error)}") from error
        yield Opened(container, stream, packets, short, hidden)


def check_file(path: Path, root: Path, within: Within = None) -> None:
    """Whether this is a regular file below `root` that begins like a video; raises VideoError.

    Nothing but the first bytes of a regular file is read: a pipe does not block.
    """
    place, begin, size = within or (path, 0, 64)
    try:
        real = Path(os.path.realpath(place))
        if not real.is_relative_to(os.path.realpath(root)):
            raise VideoError("outside-root", f"{place} leads to {real}, which is not under {root}")
        mode = os.stat(real).st_mode
        if stat.S_ISDIR(mode):
            raise VideoError("directory", "is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise VideoError("special-file", "is a pipe, socket or device, not a file")
        with open(real, "rb") as file:
            file.seek(begin)
            first = file.read(min(size, 64))
    except FileNotFoundError as error:
        if place.is_symlink():
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


def read_bytes(path: Path, within: Within = None) -> bytes:
    """The whole video, of a file that was checked."""
    place, begin, size = within or (path, 0, -1)
    with open(place, "rb") as file:
        file.seek(begin)
        return file.read(size)


def _begins_like_video(first: bytes) -> bool:
    matroska = first.startswith(b"\x1a\x45\xdf\xa3")
    iso = first[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    avi = first.startswith(b"RIFF") and first[8:12] == b"AVI "
    return matroska or iso or avi


def _video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture, ready to decode with one thread."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ("cover picture" if s.type == "video" else s.type for s in container.streams)
        found = ", ".join(kinds)
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
    stamps = [p.pts for p in packets if p.pts is not None and not p.is_discard]
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


def _decode(
    video: Opened, wanted: set[int], *, seek: bool = True
) -> tuple[dict[int, np.ndarray], int | None]:
    """Wanted frames by number; and, if the video ended before the last of them, its frame count."""
    context = video.stream.codec_context
    last = max(wanted)
    whole = [(0, len(video.packets))]
    stretches = whole
    if seek and not video.hidden and context.codec.canonical_name in _SEEKABLE:
        stretches = _stretches(video.packets, wanted)
        if stretches == [(0, last + 1)]:
            stretches = whole
    promised = context.width, context.height
    # keeps its tables from frame to frame; its default, a thread per core, costs a small frame
    # fifty times what the conversion does
    reformatter = VideoReformatter()
    kept: dict[int, np.ndarray] = {}
    came, size = 0, None
    for number, frame in _frames(video, stretches):
        if size is None:
            video.first, size = frame, (frame.width, frame.height)
            if stretches is not whole and size != promised:
                break  # the frames passed over may be of another size
        if number in wanted:
            # a change of size on the way is brought back to the size of the first frame
            rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
            turns = round(frame.rotation / 90) % 4  # counter-clockwise
            kept[number] = np.rot90(rgb, turns) if turns else rgb
        if number == last:
            return kept, None
        came = number + 1
    if stretches is not whole:  # not as expected, so nothing is passed over
        context.flush_buffers()
        return _decode(video, wanted, seek=False)
    return kept, came


def _stretches(packets: list[Any], wanted: set[int]) -> list[tuple[int, int]]:
    """First and end packet of each part to decode, from a key frame to a wanted frame."""
    keys = [i for i, packet in enumerate(packets) if i == 0 or packet.is_keyframe]
    found: list[tuple[int, int]] = []
    for number in sorted(wanted):
        start = keys[bisect_right(keys, number) - 1]
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((start, number + 1))
    return found


def _frames(
    video: Opened, stretches: Sequence[tuple[int, int]] | None = None
) -> Iterator[tuple[int, Any]]:
    """Frames with their numbers, in the order in which they are shown: all, or of stretches of
    packets, up to the first stretch that holds fewer frames than packets."""
    deadline = time.monotonic() + TIMEOUT_S
    context, packets = video.stream.codec_context, video.packets
    for start, end in stretches or [(0, len(packets))]:
        if start:
            context.flush_buffers()
        number = start
        tail = [None] if end == len(packets) else []
        for packet in (*packets[start:end], *tail):
            for frame in context.decode(packet):
                yield number, frame
                number += 1
            if time.monotonic() > deadline:
                raise VideoError("timeout", f"decoding took more than {TIMEOUT_S:.0f} s")
        if number < end:
            return


def _key_frames(video: Opened) -> Iterator[Any]:
    """The first frame, and what some later key frames give."""
    context = video.stream.codec_context
    yield from (frame for _, frame in islice(_frames(video), 1))
    keys = [packet for packet in video.packets[1:] if packet.is_keyframe]
    for packet in keys[:: -(len(keys) // -_KEY_FRAMES) or 1]:
        context.flush_buffers()
        try:
            yield from context.decode(packet) + context.decode(None)
        except _DAMAGE:  # a recovery point that cannot stand alone says nothing about its size
            continue


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
