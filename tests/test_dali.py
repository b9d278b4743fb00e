"""DALI's batches are those of the CPU pipeline; what DALI cannot decode goes to PyAV."""

import logging
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pipelines import (
    SPEC,
    damaged,
    equal,
    loader,
    moving_square,
    packet_places,
    put,
    video_set,
    write,
)  # fmt: skip

from timefast.data.augment import ENHANCE, GEOMETRY, OPS, Augmentation, apply_augmentations
from timefast.data.augment_tensor import augment_tensor
from timefast.demo_data import encode
from timefast.errors import InputError
from timefast.pipelines import dali_gpu
from timefast.pipelines.manifest import NAME, read_manifest
from timefast.pipelines.samples import why_not_dali

CPU = torch.device("cpu")
AUGMENTED = replace(SPEC, rand_augment="rand-m20-mstd0.5-inc1")
# mean difference of two decoders, in levels of 255, that comes from chroma of half the resolution
LEVELS = 3.0
needs_dali = pytest.mark.skipif(bool(dali_gpu.why_not(CPU)), reason="DALI is not installed")
FILL = (128, 120, 100)


def texture(frames=12, height=48, width=64, seed=0):
    """A smooth coloured picture that drifts: chroma as soft as that of a camera."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(40, 210, (1, 3, 4, 6)))
    big = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")[0]
    picture = big.clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return np.stack([np.roll(picture, (t, 2 * t), axis=(0, 1)) for t in range(frames)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        encode(texture(10 + number, seed=number), folder / f"{number}.webm")
    return folder


def copy(videos, to, count=10):
    for number in range(count):
        put(to, (videos / f"{number}.webm").read_bytes(), f"{number}.webm")
    return to


def alike(ours, theirs, levels=LEVELS):
    """Whether batches hold the same videos, pixels of two decoders and labels made of them."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("label", "sample", "view"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu())
        assert a.video.shape == b.video.shape and a.video.dtype == b.video.dtype
        if len(a.video):
            apart = (a.video.cpu() - b.video.cpu()).abs().mean((1, 2, 3, 4)) * 127.5
            assert apart.max() < levels, apart
        assert (a.flow_label is None) == (b.flow_label is None)
        assert [(f.id, f.kind) for f in a.failures] == [(f.id, f.kind) for f in b.failures]
        assert a.notices == b.notices


# -- augmentation on a device


@pytest.mark.parametrize("op", OPS)
def test_each_operation_on_a_tensor_does_what_pillow_does(op):
    frames = texture(3, 40, 53)
    levels = [0, 0.07, 0.3, 0.77, 1.0]
    if op in GEOMETRY or op in ENHANCE:
        levels += [-0.2, -0.63, -1.0]
    for level in levels:
        for resample in (2, 3):
            drawn = [Augmentation(op, level, resample)]
            expected = apply_augmentations(frames, drawn, FILL).astype(int)
            found = augment_tensor(torch.from_numpy(frames), drawn, FILL).numpy()
            assert np.abs(expected - found).max() <= 1
            assert (expected != found).mean() < 0.05


def test_one_value_and_tiny_pictures_are_augmented_too():
    for frames in (np.full((2, 5, 4, 3), 7, np.uint8), texture(2, 2, 2)):
        for op in OPS:
            expected = apply_augmentations(frames, [Augmentation(op, 1.0, 3)], FILL)
            found = augment_tensor(torch.from_numpy(frames), [Augmentation(op, 1.0, 3)], FILL)
            assert np.abs(expected.astype(int) - found.numpy()).max() <= 1, op


# -- batches


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu_pipeline(videos, workers):
    ours = loader(videos, 10, pipeline="dali", batch_size=4, workers=workers)
    theirs = loader(videos, 10, batch_size=4)
    assert ours.pipeline.startswith("dali") and "on the CPU" in ours.pipeline
    epochs = [list(ours.batches(epoch)) for epoch in range(2)]
    for epoch, batches in enumerate(epochs):
        alike(batches, list(theirs.batches(epoch)))
        assert batches[0].flow_label.shape == (4, 3, 4)
    assert equal(epochs[0][1:], list(ours.batches(0, start=1)))  # and the same at each restart
    ours.close()


@needs_dali
def test_crops_and_augmentation_are_those_of_the_cpu_pipeline(tmp_path):
    # with odd sizes both decoders treat chroma alike: what is left is rounding
    for number in range(10):
        encode(texture(10 + number, 47, 63, number), tmp_path / f"{number}.webm")
    plain, drawn = (
        [list(loader(tmp_path, 10, spec=s, pipeline=p).batches(0)) for p in ("dali", "cpu")]
        for s in (SPEC, AUGMENTED)
    )
    assert max((a.video - b.video).abs().max() for a, b in zip(*plain, strict=True)) < 1e-3
    alike(*drawn, levels=0.5)
    assert not equal(plain[0], drawn[0])


@needs_dali
def test_views_are_those_of_the_cpu_pipeline(videos):
    ours, theirs = (
        list(loader(videos, 5, train=False, views=(2, 3), batch_size=3, pipeline=p).batches(0))
        for p in ("dali", "cpu")
    )
    alike(ours, theirs)
    assert ours[0].view.tolist() == list(range(6)) * 3


@needs_dali
def test_uneven_times_give_the_same_frames(tmp_path):
    times = np.cumsum(np.random.default_rng(1).integers(1, 7, 20)).tolist()
    write(tmp_path / "0.webm", moving_square(), "libvpx-vp9", times=times)
    alike(*(list(loader(tmp_path, 1, pipeline=p).batches(0)) for p in ("dali", "cpu")))


@needs_dali
def test_bad_files_in_a_batch_cost_nothing_but_themselves(videos, tmp_path):
    """One file that is refused before DALI, and one that only DALI finds out about."""
    copy(videos, tmp_path)
    order = [i for b in loader(videos, 10, batch_size=5).batches(0) for i in b.sample.tolist()]
    put(tmp_path, b"", f"{order[1]}.webm")
    late = put(tmp_path, (videos / f"{order[3]}.webm").read_bytes(), f"{order[3]}.webm")
    raw = bytearray(late.read_bytes())
    for where in packet_places(late)[2:]:
        raw[where + 12 : where + 20] = b"\xff" * 8
    late.write_bytes(raw)
    ours = loader(tmp_path, 10, batch_size=5, pipeline="dali")
    theirs = loader(tmp_path, 10, batch_size=5)
    batches = list(ours.batches(0))
    assert [i for b in batches for i in b.sample.tolist()] == [
        order[0], order[2], order[2], order[4], *order[4:],
    ]  # fmt: skip
    assert [(int(f.id), f.kind) for b in batches for f in b.failures] == [
        (order[1], "empty"),
        (order[3], "corrupt"),
    ]
    alike(batches, list(theirs.batches(0)))
    alike(list(ours.batches(1)), list(theirs.batches(1)))  # and the epoch after goes on


@needs_dali
@pytest.mark.parametrize("damage", ["zeroed", "flipped", "cut", "one-frame"])
def test_both_decoders_agree_on_damaged_files(videos, tmp_path, damage):
    copy(videos, tmp_path, 5)
    raw = bytearray((videos / "2.webm").read_bytes())
    middle = len(raw) // 2
    if damage == "zeroed":
        raw[middle : middle + 200] = bytes(200)
    elif damage == "flipped":
        raw[middle : middle + 60] = bytes(b ^ 0xFF for b in raw[middle : middle + 60])
    elif damage == "cut":
        raw = raw[: len(raw) * 99 // 100]
    path = put(tmp_path, raw, "2.webm")
    if damage == "one-frame":
        encode(texture(1), path)
    for epoch in range(2):
        alike(*(list(loader(tmp_path, 5, pipeline=p).batches(epoch)) for p in ("dali", "cpu")))
    alike(*(list(loader(tmp_path, 5, pipeline=p, train=False).batches(0)) for p in ("dali", "cpu")))


@needs_dali
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_gives_the_same_from_both_decoders(tmp_path, videos, data):
    raw = damaged((videos / "5.webm").read_bytes(), data)
    put(tmp_path, raw, "0.webm")
    found = []
    for pipeline in ("dali", "cpu"):
        (tmp_path / NAME).unlink(missing_ok=True)
        try:
            found.append(list(loader(tmp_path, 1, pipeline=pipeline).batches(0)))
        except InputError as error:  # the only video is bad
            found.append(str(error))
    assert found[0] == found[1] if isinstance(found[0], str) else not isinstance(found[1], str)
    if not isinstance(found[0], str):
        # damage may make colours harsh
        alike(*found, levels=3 * LEVELS)


@pytest.mark.parametrize(
    ("change", "on_cpu", "on_gpu"),
    [
        ({}, None, None),
        ({"codec": "h264"}, "codec h264", None),
        ({"codec": "av1"}, "codec av1", "codec av1"),
        ({"codec": "vp8"}, None, "codec vp8"),
        ({"pixel_format": "yuv420p10le"},) + ("pixel format yuv420p10le",) * 2,
        ({"rotation": 90},) + ("rotated by the header",) * 2,
        ({"verdict": "short"},) + ("cut off",) * 2,
        ({"resized": 1},) + ("frame size changes on the way",) * 2,
        ({"hidden": 2},) + ("frames that an edit list hides",) * 2,
        ({"height": 100}, None, "sides not within 144 to 4096 pixels"),
        ({"width": 5000}, None, "sides not within 144 to 4096 pixels"),
    ],
)
def test_files_go_to_dali_that_it_is_known_to_decode_alike(change, on_cpu, on_gpu):
    held = {
        "codec": "vp9", "pixel_format": "yuv420p", "rotation": 0, "resized": 0, "hidden": 0,
        "height": 240, "width": 320, "verdict": "ok", **change,
    }  # fmt: skip
    assert why_not_dali(held, 1000, "cpu") == on_cpu
    assert why_not_dali(held, 1000, "mixed") == on_gpu
    assert why_not_dali(held, 1 << 30, "cpu") in (on_cpu or "more than 64 MiB", "more than 64 MiB")


@needs_dali
def test_what_dali_cannot_decode_goes_to_pyav_and_is_said_once_a_class(videos, tmp_path, caplog):
    copy(videos, tmp_path)
    for number in (1, 2):
        write(tmp_path / f"{number}.webm", texture(), "libvpx-vp9", "yuv444p")
    encode_as = {3: ("libx264", "yuv420p"), 4: ("libx264", "yuv420p10le"), 5: ("mpeg4", "yuv420p")}
    for number, (codec, pix_fmt) in encode_as.items():
        write(tmp_path / "other.mp4", texture(), codec, pix_fmt)
        (tmp_path / "other.mp4").rename(tmp_path / f"{number}.webm")
    half = (videos / "6.webm").read_bytes()
    put(tmp_path, half[: len(half) // 2], "6.webm")
    with caplog.at_level(logging.INFO, "timefast"):
        ours = list(loader(tmp_path, 10, pipeline="dali", train=False, batch_size=4).batches(0))
    alike(ours, list(loader(tmp_path, 10, train=False, batch_size=4).batches(0)))
    assert [n.kind for b in ours for n in b.notices] == ["short"]
    said = [r.message for r in caplog.records if "decoded by PyAV" in r.message]
    assert sorted(line.split(":")[0] for line in said) == [
        "codec h264", "codec mpeg4", "cut off", "pixel format yuv444p",
    ]  # fmt: skip


@needs_dali
def test_size_that_changes_on_the_way_never_reaches_dali(tmp_path):
    """DALI's CPU decoder returns pixels in disorder for it, without an error."""
    import av

    for name, size in (("1.mkv", (48, 64)), ("2.mkv", (24, 32))):
        write(tmp_path / name, texture(6, *size), "libvpx-vp9")
    with av.open(str(tmp_path / "0.mkv"), "w") as out:
        target = None
        for number in (1, 2):
            with av.open(str(tmp_path / f"{number}.mkv")) as source:
                stream = source.streams.video[0]
                target = target or out.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size:
                        packet.pts += 500 * number
                        packet.dts = packet.pts
                        packet.stream = target
                        out.mux(packet)
    (tmp_path / "0.mkv").rename(tmp_path / "0.webm")
    alike(*(list(loader(tmp_path, 1, pipeline=p, train=False).batches(0)) for p in ("dali", "cpu")))


@needs_dali
def test_dali_that_decodes_nothing_ends_the_run_with_what_it_says(videos, monkeypatch):
    reader = loader(videos, 10, pipeline="dali")

    def broken(_):
        raise RuntimeError("no decoder for this codec")

    monkeypatch.setattr(reader._dali, "_frames", broken)
    with pytest.raises(Exception, match="decodes none of 5.*no decoder for this codec"):
        next(reader.batches(0))


@needs_dali
def test_files_are_probed_once_and_then_known(videos, tmp_path, monkeypatch):
    from timefast.pipelines import samples

    copy(videos, tmp_path)
    list(loader(tmp_path, 10, pipeline="dali").batches(0))
    lines = read_manifest(tmp_path / NAME)
    assert len(lines) == 10 and {line["by"] for line in lines.values()} == {"training"}

    def never(*_, **__):
        raise AssertionError("probed again")

    monkeypatch.setattr(samples, "probe", never)
    monkeypatch.setattr(samples, "decode", never)
    assert len(list(loader(tmp_path, 10, pipeline="dali").batches(1))) == 2


@needs_dali
def test_next_batch_is_made_while_the_last_is_used(videos, monkeypatch):
    reader = loader(videos, 10, pipeline="dali", batch_size=5)
    original, times = reader._dali.batch, []
    monkeypatch.setattr(
        reader._dali, "batch", lambda raw: (times.append(time.monotonic()), original(raw))[1]
    )
    batches = reader.batches(0)
    next(batches)
    time.sleep(0.3)
    asked = time.monotonic()
    next(batches)
    assert len(times) == 2 and times[1] < asked


def test_dali_that_is_not_installed_is_an_error_with_the_command(videos, monkeypatch):
    monkeypatch.setattr(dali_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"pip install -e \"\.\[dali\]\".*--pipeline cpu"):
        loader(videos, 3, pipeline="dali")


def test_container_without_the_video_capability_is_told(monkeypatch):
    def absent(*_):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(dali_gpu.ctypes, "CDLL", absent)
    if not dali_gpu.why_not(CPU):
        assert any(
            "NVIDIA_DRIVER_CAPABILITIES" in r for r in dali_gpu.why_not(torch.device("cuda"))
        )
    assert not dali_gpu.has_nvcuvid()


# -- on a GPU


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize(("name", "codec"), [("0.webm", "libvpx-vp9"), ("0.mp4", "libx264")])
def test_gpu_decodes_the_frames_the_cpu_does(tmp_path, name, codec):
    write(tmp_path / name, texture(24, 240, 320), codec)
    os.rename(tmp_path / name, tmp_path / "0.webm")
    spec = replace(AUGMENTED, crop=160, short_side=(160, 200), test_short_side=160)
    for train in (True, False):
        options = {"spec": spec, "train": train}
        ours, theirs = (
            list(loader(tmp_path, 1, pipeline=p, device=d, **options).batches(0))
            for p, d in (("dali", "cuda"), ("cpu", "cpu"))
        )
        assert ours[0].video.device.type == "cuda"
        alike(ours, theirs)


@needs_dali
@pytest.mark.gpu
def test_gpu_batch_is_complete_when_it_comes_out(videos, tmp_path):
    for number in range(8):
        encode(texture(20, 160, 208, number), tmp_path / f"{number}.webm")
    reader = loader(tmp_path, 8, pipeline="dali", device="cuda", batch_size=2)
    sums = [b.video.double().sum().item() for b in reader.batches(0)]
    assert sums == [b.video.double().sum().item() for b in reader.batches(0)]
    assert len(video_set(tmp_path, 8).records) == 8


@needs_dali
@pytest.mark.gpu
def test_small_frames_are_not_given_to_the_gpu(videos, caplog):
    with caplog.at_level(logging.INFO, "timefast"):
        next(loader(videos, 10, pipeline="dali", device="cuda").batches(0))
    assert "sides not within" in caplog.text
