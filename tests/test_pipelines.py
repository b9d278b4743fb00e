"""Videos that are wrong in every way a video can be, and batches that nothing may change."""

import json
import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timefast.data.batch import ClipSpec, Record, VideoSet
from timefast.data.sampling import view_frames
from timefast.demo_data import encode
from timefast.errors import InputError, RunError
from timefast.ops import flow_labels
from timefast.pipelines import cpu_decode, manifest, samples
from timefast.pipelines.cpu_decode import KINDS, VideoError, check_file, decode, probe
from timefast.pipelines.loader import ClipLoader
from timefast.pipelines.manifest import NAME, read_manifest
from timefast.scan import scan

SPEC = ClipSpec(
    frames=4, crop=32, short_side=(32, 40), test_short_side=32, rand_augment=None,
    flow_rule="tau", flow_tau=0.5,
)  # fmt: skip


def moving_square(frames=20, height=48, width=64):
    """A clip whose frames differ: a bright square moves from left to right over a dark ramp."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:] = np.linspace(0, 60, width)[:, None]
    for t in range(frames):
        left = t * (width - width // 4) // max(frames - 1, 1)
        clip[t, height // 4 : height // 2 + 1, left : left + max(width // 4, 1)] = 230
    return clip


def write(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, **options):
    """Encode frames; `times` are their numbers on a clock of 12 a second, if irregular."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.options = options
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts = times[number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def webm(tmp_path_factory):
    """Bytes of a good VP9 file of 20 frames."""
    path = tmp_path_factory.mktemp("webm") / "a.webm"
    encode(moving_square(), path)
    return path.read_bytes()


def everything(n):
    return list(range(n))


def kind_of(path, root=None):
    with pytest.raises(VideoError) as caught:
        decode(path, everything, root or path.parent)
    assert caught.value.kind in KINDS and caught.value.reason
    return caught.value.kind


def put(folder, content, name="a.webm"):
    path = folder / name
    path.write_bytes(content)
    return path


def packet_places(path):
    """Where in the file each frame's packet begins."""
    with av.open(str(path)) as container:
        return [p.pos for p in container.demux(video=0) if p.size]


# -- good files of every kind


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv444p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mkv", "mjpeg", "yuvj420p"),
    ],
)
def test_every_codec_gives_the_frames_that_were_encoded(tmp_path, name, codec, pix_fmt):
    frames = moving_square()
    path = write(tmp_path / name, frames, codec, pix_fmt)
    decoded = decode(path, lambda n: [0, 7, 7, 19], tmp_path)
    assert decoded.counted == 20 and decoded.short is None
    assert decoded.frames.dtype == np.uint8
    assert np.abs(decoded.frames.astype(int) - frames[[0, 7, 7, 19]]).mean() < 8


def test_only_wanted_frames_are_converted(tmp_path, webm, monkeypatch):
    converted = []

    class Counting:
        def __init__(self):
            self.inner = av.video.reformatter.VideoReformatter()

        def reformat(self, *args, **kwargs):
            converted.append(args)
            return self.inner.reformat(*args, **kwargs)

    monkeypatch.setattr(cpu_decode, "VideoReformatter", Counting)
    decode(put(tmp_path, webm), lambda n: [2, 5, 5], tmp_path)
    assert len(converted) == 2


def test_nothing_after_the_last_wanted_frame_is_decoded(tmp_path, webm):
    path = put(tmp_path, webm)
    whole = decode(path, everything, tmp_path)
    ruined = bytearray(webm)
    for where in packet_places(path)[8:]:
        ruined[where + 12 : where + 20] = b"\xff" * 8
    path = put(tmp_path, ruined, "ruined.webm")
    assert kind_of(path) == "corrupt"
    assert (decode(path, lambda n: [2, 5], tmp_path).frames == whole.frames[[2, 5]]).all()


@pytest.mark.parametrize("wanted", [[39], [3, 20, 21, 38], [0, 9], [17, 17, 30], [8], [7, 8]])
def test_parts_that_no_wanted_frame_needs_are_passed_over_without_a_trace(
    tmp_path, monkeypatch, wanted
):
    path = write(tmp_path / "a.webm", moving_square(40), "libvpx-vp9", g="8")
    whole = decode(path, everything, tmp_path)
    original, seen = cpu_decode._frames, []

    def counting(*args):
        for number, frame in original(*args):
            seen.append(number)
            yield number, frame

    monkeypatch.setattr(cpu_decode, "_frames", counting)
    found = decode(path, lambda n: wanted, tmp_path)
    assert (found.frames == whole.frames[wanted]).all() and found.counted == 40
    needed = {i for w in wanted for i in range(w // 8 * 8, w + 1)}
    assert seen == sorted(needed)


def test_nothing_is_passed_over_in_a_file_that_is_not_as_expected(tmp_path, webm, monkeypatch):
    path = write(tmp_path / "a.webm", moving_square(40), "libvpx-vp9", g="8")
    whole = decode(path, everything, tmp_path)
    original = cpu_decode._stretches

    def one_too_many(packets, wanted):  # as if a packet of it gave no frame
        return [(start, end + 3) for start, end in original(packets, wanted)]

    monkeypatch.setattr(cpu_decode, "_stretches", one_too_many)
    for wanted in ([5, 39], [3, 20]):
        found = decode(path, lambda n, w=wanted: w, tmp_path)
        assert (found.frames == whole.frames[wanted]).all()


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_videos_shorter_than_the_clip_repeat_frames(tmp_path, frames):
    path = write(tmp_path / "a.webm", moving_square(frames), "libvpx-vp9")
    decoded = decode(path, lambda n: view_frames(n, 8), tmp_path)
    assert decoded.counted == frames and decoded.frames.shape[0] == 8


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    times = np.cumsum([0, 5, 1, 1, 9, 1, 2, 1, 1, 4, 1, 1, 7, 1, 1, 1, 3, 1, 1, 1])
    path = write(tmp_path / "a.webm", moving_square(), "libvpx-vp9", times=times.tolist())
    decoded = decode(path, everything, tmp_path)
    assert decoded.counted == 20 and decoded.short is None
    left = [int(np.argmax(f[20, :, 0] > 140)) for f in decoded.frames]
    assert left == sorted(left) and left[-1] > 40


@pytest.mark.parametrize(("height", "width"), [(2, 2), (47, 63), (16, 1600)])
def test_odd_small_and_wide_sizes_become_clips(tmp_path, height, width):
    write(tmp_path / "0.webm", moving_square(5, height, width), "libvpx-vp9")
    batch = next(loader(tmp_path, 1, train=False).batches(0))
    assert batch.video.shape == (1, 3, 4, 32, 32) and not batch.failures


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_of_the_header_is_applied(tmp_path, degrees):
    frames = moving_square()
    raw = bytearray(write(tmp_path / "a.mp4", frames).read_bytes())
    matrix = raw.index(b"tkhd") + 4 + 40  # after version, times, id, duration, layer, volume
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    one = 1 << 16
    raw[matrix : matrix + 36] = struct.pack(
        ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30
    )
    decoded = decode(put(tmp_path, raw, "r.mp4"), everything, tmp_path)
    upright = np.rot90(frames, -degrees // 90, axes=(1, 2))  # clockwise as seen
    assert decoded.frames.shape == upright.shape
    assert np.abs(decoded.frames.astype(int) - upright).mean() < 8


def test_frames_that_an_edit_list_hides_are_decoded_and_not_counted(tmp_path):
    """As in a file that was cut without encoding it anew."""
    frames = moving_square()
    write(tmp_path / "whole.mp4", frames)
    with (
        av.open(str(tmp_path / "whole.mp4")) as source,
        av.open(str(tmp_path / "a.mp4"), "w") as out,
    ):
        stream = source.streams.video[0]
        target = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                early = 8 * stream.duration // 20
                packet.pts, packet.dts = packet.pts - early, packet.dts - early
                packet.stream = target
                out.mux(packet)
    decoded = decode(tmp_path / "a.mp4", everything, tmp_path)
    assert decoded.counted == 12 and decoded.short is None
    assert np.abs(decoded.frames.astype(int) - frames[8:]).mean() < 4
    held = probe(tmp_path / "a.mp4", tmp_path, deep=False)
    assert (held["frames"], held["hidden"]) == (12, 8)


def test_first_real_video_stream_is_taken_whatever_stands_before_it(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        streams = [container.add_stream("libx264", rate=12) for _ in range(2)]
        for stream, width in zip(streams, (64, 32), strict=True):
            stream.height, stream.width, stream.pix_fmt = 48, width, "yuv420p"
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        for stream, width in zip(streams, (64, 32), strict=True):
            for frame in moving_square(6, 48, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in (sound, *streams):
            container.mux(stream.encode())
    assert decode(tmp_path / "a.mkv", everything, tmp_path).frames.shape == (6, 48, 64, 3)


def test_change_of_size_on_the_way_gives_frames_of_the_first_size(tmp_path):
    parts = [put(tmp_path, b"", name) for name in ("1.mkv", "2.mkv")]
    sizes = ((48, 64), (24, 32))
    for path, size in zip(parts, sizes, strict=True):
        write(path, moving_square(6, *size), "libvpx-vp9")
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        target = None
        for number, part in enumerate(parts):
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                target = target or out.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size:
                        packet.pts += 500 * number
                        packet.dts = packet.pts
                        packet.stream = target
                        out.mux(packet)
    decoded = decode(tmp_path / "a.mkv", everything, tmp_path)
    assert decoded.frames.shape == (12, 48, 64, 3)
    assert (decoded.frames[-1] > 140).any()


# -- bad files


def test_empty_tiny_text_and_headless_files_have_their_own_kinds(tmp_path, webm):
    assert kind_of(put(tmp_path, b"")) == "empty"
    assert kind_of(put(tmp_path, webm[:1])) == "not-a-video"
    page = put(tmp_path, b"<html><body>403 Forbidden</body>")
    with pytest.raises(VideoError, match="<html><body>403") as caught:
        decode(page, everything, tmp_path)
    assert caught.value.kind == "not-a-video"
    assert kind_of(put(tmp_path, webm[:200])) == "unreadable"
    assert kind_of(put(tmp_path, b"\0\0\0\x18ftypisom" + b"\0" * 100, "a.mp4")) == "unreadable"


@pytest.mark.parametrize("frames", [1, 10, 19])
def test_cut_file_is_used_as_far_as_it_goes_and_called_short(tmp_path, webm, frames):
    whole = put(tmp_path, webm, "whole.webm")
    path = put(tmp_path, webm[: packet_places(whole)[frames] + 9])  # within the next frame
    decoded = decode(path, everything, tmp_path)
    assert decoded.counted == frames and decoded.short is not None
    # nothing stands in for what is missing
    assert (decoded.frames == decode(whole, everything, tmp_path).frames[:frames]).all()


def test_video_that_ends_before_its_packets_is_sampled_again(tmp_path, webm, monkeypatch):
    path = put(tmp_path, webm)
    original = cpu_decode._decode
    calls = []

    def ends_after_seven(video, wanted):
        calls.append(max(wanted))
        kept, came = original(video, wanted)
        if max(wanted) >= 7:
            return {i: f for i, f in kept.items() if i < 7}, 7
        return kept, came

    monkeypatch.setattr(cpu_decode, "_decode", ends_after_seven)
    decoded = decode(path, lambda n: view_frames(n, 4), tmp_path)
    assert calls == [view_frames(20, 4)[-1], view_frames(7, 4)[-1]]
    assert decoded.counted == 7 and "7 of 20" in decoded.short
    monkeypatch.undo()
    assert (decoded.frames == decode(path, lambda n: view_frames(7, 4), tmp_path).frames).all()


def test_damage_in_the_middle_is_short_or_corrupt_and_twice_the_same(tmp_path, webm):
    middle = len(webm) // 2
    for hole in (bytes(200), bytes(b ^ 0xFF for b in webm[middle : middle + 60])):
        path = put(tmp_path, webm[:middle] + hole + webm[middle + len(hole) :])
        verdicts = []
        for _ in range(2):
            try:
                decoded = decode(path, everything, tmp_path)
                verdicts.append((decoded.counted, decoded.short))
            except VideoError as error:
                verdicts.append((error.kind, None))
        assert verdicts[0] == verdicts[1]
        assert verdicts[0] == ("corrupt", None) or verdicts[0][1] or verdicts[0][0] == 20


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    assert kind_of(tmp_path / "a.mp4") == "no-video"


@pytest.mark.parametrize("with_video", [False, True])
def test_cover_picture_is_no_video(tmp_path, with_video):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        streams = [cover]
        if with_video:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            streams.append(stream)
        for stream, frames in zip(
            streams, (moving_square(1, 32, 32), moving_square(6)), strict=False
        ):
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    if with_video:
        assert decode(tmp_path / "a.mp4", everything, tmp_path).frames.shape == (6, 48, 64, 3)
    else:
        with pytest.raises(VideoError, match="it holds cover picture"):
            decode(tmp_path / "a.mp4", everything, tmp_path)


def test_declared_sizes_and_counts_above_the_caps_are_refused_before_decoding(
    tmp_path, monkeypatch
):
    path = write(tmp_path / "a.webm", moving_square(), "libvpx-vp9")

    def never(*_):
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(cpu_decode, "_decode", never)
    monkeypatch.setattr(cpu_decode, "MAX_FRAMES", 19)
    assert kind_of(path) == "too-long"
    monkeypatch.setattr(cpu_decode, "MAX_PIXELS", 64 * 48 - 1)
    assert kind_of(path) == "too-large"
    options = {**cpu_decode._OPEN_OPTIONS, "max_pixels": "1000"}
    monkeypatch.setattr(cpu_decode, "_OPEN_OPTIONS", options)
    assert kind_of(path) == "too-large"


def test_slow_decoder_is_given_up(tmp_path, webm, monkeypatch):
    path = put(tmp_path, webm)
    ticks = iter(range(0, 10**6, 40))
    monkeypatch.setattr(cpu_decode.time, "monotonic", lambda: next(ticks))
    assert kind_of(path) == "timeout"


# -- files that would lead elsewhere


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.webm\n",
        "#EXTM3U\n#EXTINF:1,\nsecret.webm\n",
        "\x1a\x45\xdf\xa3 ffconcat version 1.0\nfile secret.webm\n",
        "RIFF\0\0\0\0AVI ffconcat version 1.0\nfile secret.webm\n",
    ],
)
def test_lists_of_other_files_open_none_of_them(tmp_path, webm, text, monkeypatch):
    put(tmp_path, webm, "secret.webm")
    monkeypatch.setattr(socket, "socket", None)
    path = put(tmp_path, text.encode("latin-1"))
    assert kind_of(path) in ("not-a-video", "unreadable")
    opened = []
    monkeypatch.setattr(cpu_decode, "check_file", lambda *_: opened.append("unchecked"))
    assert kind_of(path) == "unreadable"  # FFmpeg refuses as well, should the first look be fooled
    assert opened


def test_addresses_never_reach_the_network(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.chdir(tmp_path)
    for name in ("http:/127.0.0.1/a.webm", "concat:a.webm|b.webm", "pipe:0"):
        assert kind_of(tmp_path / name) == "missing"


def test_files_that_are_none_each_have_their_kind(tmp_path, webm):
    put(tmp_path, webm)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    signal.alarm(20)  # a pipe must not block
    try:
        assert kind_of(tmp_path / "fifo") == "special-file"
    finally:
        signal.alarm(0)
    assert kind_of(tmp_path / "nothing.webm") == "missing"
    assert kind_of(tmp_path / "a.webm" / "b.webm", tmp_path) == "missing"
    assert kind_of(tmp_path, tmp_path) == "directory"
    assert kind_of(tmp_path / "dangling") == "dangling-link"
    assert kind_of(tmp_path / "loop") in ("unreadable", "dangling-link")


def test_file_that_may_not_be_read_says_so(tmp_path, webm, monkeypatch):
    path = put(tmp_path, webm)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(VideoError) as caught:
        check_file(path, tmp_path)
    assert caught.value.kind == "permission"


def test_links_may_lead_anywhere_under_the_root_and_nowhere_else(tmp_path, webm):
    root = tmp_path / "root"
    root.mkdir()
    put(root, webm, "real.webm")
    put(tmp_path, webm, "secret.webm")
    (root / "inside.webm").symlink_to(root / "real.webm")
    (root / "outside.webm").symlink_to(tmp_path / "secret.webm")
    (root / "folder").symlink_to(tmp_path)
    assert decode(root / "inside.webm", everything, root).counted == 20
    assert kind_of(root / "outside.webm") == "outside-root"
    assert kind_of(root / "folder" / "secret.webm", root) == "outside-root"
    assert kind_of(root / ".." / "secret.webm", root) == "outside-root"


def damaged(raw, data):
    """The bytes after some cuts, insertions and replacements that hypothesis draws."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        piece = data.draw(st.binary(min_size=1, max_size=40))
        how = data.draw(st.sampled_from(["replace", "insert", "cut", "remove"]))
        if how == "replace":
            raw[where : where + len(piece)] = piece
        elif how == "insert":
            raw[where:where] = piece
        elif how == "remove":
            del raw[where : where + len(piece)]
        else:
            del raw[max(where, 1) :]
    return bytes(raw)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_gives_frames_or_a_known_kind(tmp_path, webm, data):
    path = put(tmp_path, damaged(webm, data), "fuzzed.webm")
    try:
        decoded = decode(path, everything, tmp_path)
    except VideoError as error:
        assert error.kind in KINDS
    else:
        assert len(decoded.frames) == decoded.counted >= 1


# -- batches


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve small videos, each with its own pixels."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for number in range(12):
        frames = moving_square(10, 36, 48)
        frames[:, :8] = rng.integers(0, 200, (8, 48, 3))
        encode(frames, folder / f"{number}.webm")
    return folder


def video_set(folder, count, split="train"):
    records = tuple(
        Record(str(i), folder / f"{i}.webm", i % 3, f"class {i % 3}") for i in range(count)
    )
    return VideoSet("own", split, folder, records, ("class 0", "class 1", "class 2"))


def loader(folder, count, *, train=True, spec=SPEC, **options):
    return ClipLoader(
        video_set(folder, count),
        spec,
        train=train,
        **{"batch_size": 5, "pipeline": "cpu", **options},
    )


def equal(one, two):
    return len(one) == len(two) and all(
        torch.equal(a.video, b.video)
        and torch.equal(a.label, b.label)
        and torch.equal(a.sample, b.sample)
        and torch.equal(a.view, b.view)
        and torch.equal(a.flow_label, b.flow_label)
        and a.failures == b.failures
        for a, b in zip(one, two, strict=True)
    )


def test_batch_has_the_shapes_it_promises(videos):
    batches = list(loader(videos, 12).batches(0))
    assert len(batches) == len(loader(videos, 12)) == 3
    assert [len(b.label) for b in batches] == [5, 5, 2]  # the last batch is short, not dropped
    first = batches[0]
    assert first.video.shape == (5, 3, 4, 32, 32) and first.video.dtype == torch.float32
    assert -1 <= first.video.min() < first.video.max() <= 1
    assert first.flow_label.shape == (5, 3, 4) and first.flow_label.dtype == torch.int64
    assert first.label.tolist() == [i % 3 for i in first.sample.tolist()]
    assert sorted(i for b in batches for i in b.sample.tolist()) == list(range(12))


def test_workers_and_restarts_change_no_batch(videos):
    spec = replace(SPEC, rand_augment="rand-m20-mstd0.5-inc1")
    plain = loader(videos, 12, spec=spec)
    epochs = [list(plain.batches(epoch)) for epoch in range(2)]
    assert not torch.equal(epochs[0][0].sample, epochs[1][0].sample)
    assert equal(epochs[0], list(plain.batches(0)))
    for workers in (1, 2):
        many = loader(videos, 12, spec=spec, workers=workers)
        next(iter(many.batches(0)))  # an epoch given up on its way leaves nothing behind
        assert equal(epochs[1], list(many.batches(1)))
        assert equal(epochs[0][1:], list(many.batches(0, start=1)))
    assert equal(epochs[1][2:], list(loader(videos, 12, spec=spec).batches(1, start=2)))
    assert list(plain.batches(0, start=3)) == []


def test_seed_decides_the_batches(videos):
    one, two = (next(loader(videos, 12, seed=seed).batches(0)) for seed in (0, 1))
    assert not torch.equal(one.sample, two.sample)


def test_reading_batches_draws_nothing_from_torch(videos):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(loader(videos, 12, workers=1).batches(0))
    assert torch.equal(torch.rand(1), expected)


def test_flow_labels_describe_the_crop_the_model_sees(videos):
    batch = next(loader(videos, 12).batches(0))
    assert torch.equal(batch.flow_label, flow_labels(batch.video, rule="tau", tau=0.5))
    assert batch.flow_label.bool().any()
    assert (
        next(loader(videos, 12, spec=replace(SPEC, flow_rule=None)).batches(0)).flow_label is None
    )


def test_one_frame_video_has_no_motion_in_its_labels(tmp_path):
    encode(moving_square(1), tmp_path / "0.webm")
    batch = next(loader(tmp_path, 1).batches(0))
    assert (batch.flow_label == 0).all()


def test_bad_video_is_replaced_by_the_next_good_one_and_reported(videos, tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.webm").write_bytes((videos / f"{number}.webm").read_bytes())
    good = [i for b in loader(tmp_path, 12).batches(0) for i in b.sample.tolist()]
    (tmp_path / NAME).unlink()  # as if nobody had seen the files while they were good
    broken = {good[3], good[4], good[11]}
    for number in broken:
        (tmp_path / f"{number}.webm").write_bytes(b"")
    batches = list(loader(tmp_path, 12).batches(0))
    samples = [i for b in batches for i in b.sample.tolist()]
    expected = list(good)
    expected[3] = expected[4] = good[5]
    expected[11] = good[0]  # after the last comes the first
    assert samples == expected
    failures = [f for b in batches for f in b.failures]
    assert {int(f.id) for f in failures} == broken
    assert {f.kind for f in failures} == {"empty"}
    assert equal(batches, list(loader(tmp_path, 12, workers=2).batches(0)))


def test_evaluation_never_substitutes(videos, tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.webm").write_bytes((videos / f"{number}.webm").read_bytes())
    (tmp_path / "1.webm").write_bytes(b"<html>")
    (tmp_path / "5.webm").unlink()
    batches = list(loader(tmp_path, 6, train=False, views=(2, 3)).batches(0))
    assert [b.sample[::6].tolist() for b in batches] == [[0, 2, 3, 4], []]
    assert [(f.id, f.kind) for b in batches for f in b.failures] == [
        ("1", "not-a-video"),
        ("5", "missing"),
    ]
    assert batches[1].video.shape == (0, 3, 4, 32, 32)


def test_views_of_a_video_stand_together_and_differ(videos):
    batch = next(loader(videos, 3, train=False, views=(2, 3)).batches(0))
    assert batch.video.shape == (18, 3, 4, 32, 32) and batch.flow_label is None
    assert batch.sample.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert batch.view.tolist() == list(range(6)) * 3
    for clips in batch.video.split(6):
        for a in range(6):
            for b in range(a):
                assert not torch.equal(clips[a], clips[b])
    assert not batch.notices


def test_views_that_cannot_differ_are_reported(tmp_path):
    encode(moving_square(4), tmp_path / "0.webm")
    batch = next(loader(tmp_path, 1, train=False, views=(3, 1)).batches(0))
    assert [n.kind for n in batch.notices] == ["views-collapsed"] and not batch.failures


def test_cut_file_is_used_and_noticed(tmp_path, webm):
    put(tmp_path, webm[: len(webm) // 2], "0.webm")
    batch = next(loader(tmp_path, 1).batches(0))
    assert len(batch.label) == 1 and not batch.failures
    assert [n.kind for n in batch.notices] == ["short"]


def test_evaluation_does_not_depend_on_batch_size_or_workers(videos):
    def clips(**options):
        batches = loader(videos, 7, train=False, views=(1, 3), **options).batches(0)
        return torch.cat([batch.video for batch in batches])

    expected = clips(batch_size=7)
    assert torch.equal(clips(batch_size=2), expected)
    assert torch.equal(clips(batch_size=3, workers=2), expected)


def test_nothing_but_bad_videos_ends_with_their_names(tmp_path):
    for number in range(3):
        put(tmp_path, b"", f"{number}.webm")
    for workers in (0, 1):
        with pytest.raises(InputError, match="3 videos in a row.*\n.*webm: empty"):
            list(loader(tmp_path, 3, batch_size=2, workers=workers).batches(0))


def test_so_many_bad_videos_in_a_row_end_the_epoch(videos, tmp_path):
    order = [i for b in loader(videos, 12).batches(0) for i in b.sample.tolist()]
    for place, number in enumerate(order):
        good = (videos / f"{number}.webm").read_bytes()
        put(tmp_path, b"" if 5 <= place < 8 else good, f"{number}.webm")
    assert len(list(loader(tmp_path, 12, max_bad_in_a_row=4).batches(0))) == 3
    batches = loader(tmp_path, 12, max_bad_in_a_row=3).batches(0)
    assert len(next(batches).label) == 5
    with pytest.raises(InputError, match="3 videos in a row"):
        next(batches)


def test_scanned_files_are_not_tried_again_and_changed_ones_are_told_apart(videos, tmp_path):
    for number in range(4):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    put(tmp_path, b"", "0.webm")
    put(tmp_path, b"<html>", "1.webm")
    scan(tmp_path, workers=1)
    put(tmp_path, (videos / "1.webm").read_bytes(), "1.webm")  # repaired
    put(tmp_path, b"<html> was good when it was scanned", "2.webm")
    reader = loader(tmp_path, 4, train=False)
    (tmp_path / "0.webm").touch()
    os.utime(tmp_path / "0.webm", ns=(0, read_manifest(tmp_path / NAME)["0.webm"]["mtime_ns"]))
    batch = next(reader.batches(0))
    assert batch.sample.tolist() == [1, 3]
    assert [(f.id, f.kind) for f in batch.failures] == [("0", "empty"), ("2", "changed")]


def test_workers_ignore_the_signals_of_the_run(videos):
    reader = loader(videos, 12, workers=1)
    batches = reader.batches(0)
    next(batches)
    (pid,) = reader._pool.pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert len(list(batches)) == 2 and reader._pool.pids == [pid]


def test_auto_says_what_it_took_and_why(videos, caplog):
    with pytest.raises(ValueError, match="pipeline"):
        loader(videos, 3, pipeline="decord")
    with caplog.at_level("INFO", "timefast"):
        assert loader(videos, 3, pipeline="auto").pipeline == f"cpu (PyAV {av.__version__})"
    assert "cpu (PyAV" in caplog.text


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (replace(SPEC, short_side=(24, 40)), {}),
        (replace(SPEC, test_short_side=24), {}),
        (replace(SPEC, rand_augment="strong"), {}),
        (SPEC, {"batch_size": 0}),
        (SPEC, {"views": (1, 2)}),
    ],
)
def test_clips_that_cannot_be_made_are_refused_at_once(videos, spec, options):
    with pytest.raises(InputError):
        loader(videos, 3, spec=spec, **options)


# -- what training notes down


def test_training_without_a_manifest_writes_one(videos, tmp_path, monkeypatch):
    for number in range(12):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    put(tmp_path, b"<html>", "3.webm")
    put(tmp_path, b"", "4.webm")
    (tmp_path / "5.webm").unlink()  # may be there the next time: not noted
    first = loader(tmp_path, 12, workers=2)
    batches = list(first.batches(0))
    list(first.batches(1))
    first.close()
    text = (tmp_path / NAME).read_text().splitlines()
    found = read_manifest(tmp_path / NAME)
    assert len(text) == len(found) == 11  # one line a video, though each is seen in two epochs
    verdicts = {path: line["verdict"] for path, line in found.items()}
    assert verdicts.pop("3.webm") == "not-a-video" and verdicts.pop("4.webm") == "empty"
    assert set(verdicts.values()) == {"ok"}
    assert found["0.webm"]["frames"] == 10 and found["0.webm"]["codec"] == "vp9"
    tried = []
    original = samples.decode
    monkeypatch.setattr(samples, "decode", lambda p, *a: (tried.append(p.name), original(p, *a))[1])
    assert equal(list(loader(tmp_path, 12).batches(0)), batches)
    assert not {"3.webm", "4.webm"} & set(tried)
    scan(tmp_path, workers=1)
    assert {line["verdict"] for line in read_manifest(tmp_path / NAME).values()} == {
        "ok", "not-a-video", "empty",
    }  # fmt: skip


def test_scan_looks_again_at_what_training_found_bad(videos, tmp_path):
    put(tmp_path, (videos / "0.webm").read_bytes(), "0.webm")
    line = {"path": "0.webm", "size": 0, "mtime_ns": 0, "deep": False, "verdict": "unreadable"}
    found = os.stat(tmp_path / "0.webm")
    line |= {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "reason": "a bad moment"}
    (tmp_path / NAME).write_text(json.dumps({**line, "by": "training"}) + "\n")
    assert scan(tmp_path, workers=1)["0.webm"]["verdict"] == "ok"
    (tmp_path / NAME).write_text(json.dumps(line) + "\n")
    assert scan(tmp_path, workers=1)["0.webm"]["verdict"] == "unreadable"


def test_data_folder_that_cannot_be_written_to_is_said_once(videos, tmp_path, monkeypatch, caplog):
    for number in range(12):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")

    def read_only(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(manifest, "JsonLines", read_only)
    with caplog.at_level("INFO", "timefast"):
        assert len(list(loader(tmp_path, 12).batches(0))) == 3
    assert caplog.text.count("is not added to") == 1


def test_evaluation_and_other_processes_write_no_manifest(videos, tmp_path):
    for number in range(4):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    list(loader(tmp_path, 4, train=False).batches(0))
    list(loader(tmp_path, 4, rank=1, world_size=2).batches(0))
    assert not (tmp_path / NAME).exists()


# -- processes that hang or die


def test_video_that_hangs_a_decoder_is_bad_and_its_worker_is_replaced(
    videos, tmp_path, monkeypatch, caplog
):
    for number in range(12):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    plain = list(loader(tmp_path, 12).batches(0))
    (tmp_path / NAME).unlink()
    order = [i for b in plain for i in b.sample.tolist()]
    original = samples.decode

    def hangs(path, *args):
        if path.name == f"{order[2]}.webm":
            time.sleep(60)
        return original(path, *args)

    monkeypatch.setattr(samples, "decode", hangs)
    monkeypatch.setattr(cpu_decode, "TIMEOUT_S", 0.5)
    reader = loader(tmp_path, 12, workers=2)
    before = time.monotonic()
    with caplog.at_level("WARNING", "timefast"):
        batches = list(reader.batches(0))
    assert time.monotonic() - before < 10
    assert [i for b in batches for i in b.sample.tolist()] == order[:2] + [order[3]] + order[3:]
    assert [(int(f.id), f.kind) for b in batches for f in b.failures] == [(order[2], "timeout")]
    assert equal(batches[1:], plain[1:])
    assert f"hangs (exit code -9) at {tmp_path}/{order[2]}.webm" in caplog.text
    before = time.monotonic()
    assert len(list(reader.batches(1))) == 3  # nobody tries it again
    assert time.monotonic() - before < 1
    assert f"{order[2]}.webm" not in read_manifest(tmp_path / NAME)  # may have been the machine
    reader.close()


def test_worker_that_is_killed_is_replaced_and_its_batches_made_again(videos, caplog):
    expected = list(loader(videos, 12, batch_size=2).batches(0))
    reader = loader(videos, 12, batch_size=2, workers=2)
    batches = reader.batches(0)
    found = [next(batches)]
    for pid in reader._pool.pids:
        os.kill(pid, signal.SIGKILL)
    before = time.monotonic()
    with caplog.at_level("WARNING", "timefast"):
        found += batches
    assert time.monotonic() - before < 10
    assert equal(found, expected)
    assert "ended (exit code -9)" in caplog.text
    reader.close()


def test_video_that_ends_its_process_twice_is_bad(videos, tmp_path, monkeypatch):
    for number in range(12):
        put(tmp_path, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    original = samples.decode

    def ends(path, *args):
        if path.name == "7.webm":
            os._exit(139)
        return original(path, *args)

    monkeypatch.setattr(samples, "decode", ends)
    reader = loader(tmp_path, 12, workers=1)
    batches = list(reader.batches(0))
    assert [(f.id, f.kind) for b in batches for f in b.failures] == [("7", "crash")]
    reader.close()


def test_workers_that_cannot_live_end_the_run(videos, monkeypatch):
    monkeypatch.setattr(samples.Samples, "make", lambda *_: os._exit(1))
    reader = loader(videos, 12, workers=1)
    with pytest.raises(RunError, match="in a row ended.*--workers 0"):
        next(reader.batches(0))
    reader.close()


def test_error_of_ours_in_a_worker_is_shown_with_its_place(videos, monkeypatch):
    monkeypatch.setattr(samples, "resize_crop", lambda *_: 1 / 0)
    reader = loader(videos, 12, workers=1)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*ZeroDivisionError"):
        next(reader.batches(0))
    reader.close()


@pytest.mark.parametrize("how", ["killed", "exit"])
def test_workers_end_with_the_process_that_started_them(videos, how, tmp_path, capfd):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def run():
        multiprocessing.current_process()._config.pop("tempdir", None)  # of the tests
        tempfile.tempdir = str(tmp_path)
        reader = loader(videos, 12, workers=2)
        next(reader.batches(0))
        theirs.send(reader._pool.pids)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=run)
    process.start()
    pids = ours.recv()
    process.join(10)
    assert process.exitcode == (-9 if how == "killed" else 0)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "Traceback" not in capfd.readouterr().err
    if how == "exit":
        assert os.listdir(tmp_path) == []  # nor is anything left behind


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
