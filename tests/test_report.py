"""The HTML report: complete, self-contained, safe, and written whatever state a run is in."""

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fake_run import (
    CLASSES,
    fake_config,
    fake_evals,
    fake_strips,
    fake_train,
    write_fake_run,
)
from timefast import report
from timefast.errors import InputError
from timefast.report_clips import Arrows, ClipStrip, arrows, clip_strips, pictures

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, references and text of a page; raises when tags do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
                if tag == "section":
                    self.sections.append(value)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data


def page_of(config=None, metrics=None, failures=(), strips=(), excuse=None) -> tuple[Page, str]:
    metrics = fake_train() + fake_evals() if metrics is None else metrics
    html = report.render(
        config or fake_config(), metrics, failures, strips, excuse, name="demo-run"
    )
    return Page(html), html


def write_analysis(run):
    """What the three commands leave; two models in each."""
    folder = run / "analysis"
    folder.mkdir()
    edges = [round(i / 10 - 1, 1) for i in range(21)]
    mass = [0.0] * 9 + [0.25, 0.5, 0.25] + [0.0] * 8
    about = {"protocol": "one clip", "videos_expected": 240, "videos_evaluated": 240}
    probe = {"accuracy": [100.0, 99.5, 45.6], "chance": 12.5, "subset": None, **about}
    gaps = {"edges": edges, "mass": mass, "gap": -0.07, "subset": "temporal", **about}
    cam = {"label": 2, "probability": 0.873, "class": "Lifting <something> up"}

    def record(values):
        return json.dumps(
            {"id": "480", "models": [{"source": f"runs/{x}", **values} for x in "ab"]}
        )

    (folder / "probe.json").write_text(record(probe))
    (folder / "confidence.json").write_text(record(gaps))
    (folder / "gradcam-480.json").write_text(record(cam))
    Image.new("RGB", (8, 4)).save(folder / "gradcam-480.png")
    return folder


def test_analyses_are_part_of_the_page_when_they_exist(tmp_path):
    run = write_fake_run(tmp_path / "run")
    page = Page(report.write_report(run).read_text())
    assert "analysis" not in page.sections
    folder = write_analysis(run)
    html = report.write_report(run).read_text()
    page = Page(html)
    assert page.sections[:5] == ["accuracy", "curves", "clips", "analysis", "failures"]
    for text in ("Frames put in their place", "45.6", "−0.07", "87.3 %", "of temporal classes"):
        assert text in page.text
    assert "Lifting &lt;something&gt; up" in html  # names are text, never markup
    assert any(r.startswith("data:image/png;base64,") for r in page.references)
    assert not [r for r in page.references if not r.startswith(("data:", "#"))]
    (folder / "probe.json").write_text('{"models": [{"source": "a"}]}')  # of another version
    (folder / "confidence.json").write_text("{")
    (folder / "gradcam-480.png").unlink()
    assert "analysis" not in Page(report.write_report(run).read_text()).sections


def test_confidence_chart_begins_and_ends_where_videos_are(tmp_path):
    record = json.loads((write_analysis(tmp_path) / "confidence.json").read_text())
    chart = report.confidence_chart(record)
    points = chart.lines[0].points
    assert points[0] == (-0.1, 0.0) and points[-1] == (0.2, 0.0)
    assert points[1:3] == [(-0.1, 25.0), (0.0, 25.0)] and not any(chart.dots)
    assert report.confidence_chart(None) is None and report.probe_chart(None) is None


def test_report_has_every_section_and_final_numbers():
    page, _ = page_of(strips=fake_strips())
    assert page.sections[:5] == ["accuracy", "curves", "clips", "failures", "configuration"]
    last = {e["subset"]: e for e in fake_evals()[-3:]}
    for value in (last["all"]["top1"], last["temporal"]["shuffled_top1"], last["static"]["top5"]):
        assert f"{value:.1f}" in page.text
    assert "240 of 240 validation videos evaluated" in page.text
    assert "TimeSformer with order, debias and flow loss" in page.text
    assert "480 of 480 steps" in page.text
    assert "finished" in page.text
    for setting in ("smoothing_class", "time_attention", "2.13.0", "max_bad_fraction"):
        assert setting in page.text


def test_report_refers_to_nothing_outside_itself():
    page, html = page_of(strips=fake_strips())
    assert page.references
    assert all(r.startswith(("#", "data:image/")) for r in page.references)
    assert {r.removeprefix("#") for r in page.references if r[0] == "#"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_text_from_a_run_is_escaped():
    evil = "<script>alert('x')</script> & \"friends\""
    config = fake_config()
    config["config"]["data"]["root"] = evil
    config["config"]["optim"][evil] = evil
    config["versions"][evil] = evil
    metrics = fake_train() + [e | {"subset": evil, "protocol": evil} for e in fake_evals()]
    failures = [{"path": evil, "class": evil, "reason": evil, "count": 1}]
    strips = [
        ClipStrip(
            id=evil,
            true_class=evil,
            original=s.original,
            shuffled=s.shuffled,
            size=s.size,
            columns=s.columns,
            frames=s.frames,
        )
        for s in fake_strips()
    ]
    page, html = page_of(config, metrics, failures, strips, evil)
    assert "script" not in page.tags
    assert "<script>" not in html
    assert page.text.count(evil) >= 8


def test_clip_shows_frames_directions_and_order():
    strip = fake_strips()[0]
    page, html = page_of(strips=[strip])
    assert sum(r.startswith("data:image/jpeg") for r in page.references) == 8
    assert strip.flow[2].wrong in html
    assert strip.true_flow[0].right in html
    assert "97.3 % of patches right" in page.text
    assert "is 5" in page.text  # frame 5 was taken for frame 6


def test_arrow_points_to_the_middle_of_its_sector():
    # label 2: 45 to 90 degrees with y down, from left to right and down
    drawn = arrows([2], [2], columns=1, patch=16).right
    x0, y0, x1, y1 = (float(v) for v in drawn[1:].split("M")[0].replace("L", " ").split())
    assert math.degrees(math.atan2(y1 - y0, x1 - x0)) == pytest.approx(67.5, abs=1)
    assert (x0 + x1) / 2 == pytest.approx(8, abs=0.1)


def test_arrows_separate_right_from_wrong_and_mark_missed_motion():
    drawn = arrows([0, 3, 0, 5], [0, 3, 1, 1], columns=2, patch=10)
    assert drawn.right == arrows([0, 3], [0, 3], columns=2, patch=10).right
    assert drawn.wrong.startswith("M4.0 14.0l2.0 2.0")
    assert arrows([0], [0], columns=1, patch=10) == Arrows("")


def test_pictures_undo_the_normalisation():
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    video = torch.full((3, 2, 16, 16), 0.5)
    uris = pictures(video, (0.5, 0.25, 0.5), (0.5, 0.5, 0.25))
    assert len(uris) == 2
    with Image.open(BytesIO(b64decode(uris[0].split(",")[1]))) as image:
        pixel = np.asarray(image)[8, 8]
    assert np.abs(pixel.astype(int) - [191, 128, 159]).max() <= 3


def test_report_of_a_killed_run_is_written(tmp_path):
    run = write_fake_run(tmp_path / "run", metrics=fake_train(steps=200))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 210, "lo')
    path = report.write_report(run)
    page = Page(path.read_text(encoding="utf-8"))
    assert "200 of 480 steps" in page.text
    assert "stopped early" in page.text
    assert "has not been evaluated yet" in page.text
    assert [p.name for p in run.iterdir() if "part" in p.name] == []


def test_report_of_a_run_that_never_stepped_is_written(tmp_path):
    run = write_fake_run(tmp_path / "run", metrics=[])
    (run / "metrics.jsonl").unlink()
    (run / "failures.jsonl").unlink()
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert "No training steps were logged" in page.text


def test_minimal_config_is_enough(tmp_path):
    run = write_fake_run(tmp_path / "run", metrics=fake_train())
    (run / "config.json").write_text("{}")
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert "480 steps" in page.text


@pytest.mark.parametrize("text", [None, "", '{"recipe": "de', "[1, 2]"])
def test_folder_without_readable_config_is_refused(tmp_path, text, capsys):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        report.write_report(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")


def test_missing_and_non_finite_numbers_do_not_break_a_page():
    lines = fake_train()
    lines[3] |= {"loss": None, "grad_norm": None}
    lines[4] |= {"loss": math.nan, "loss_ce": math.inf, "step_s": 0}
    lines[5] = {"kind": "train", "step": None}
    lines[6] = {"kind": "train", "step": 70}
    evals = [e | {"top1": None, "shuffled_top1": None, "gap": None} for e in fake_evals()]
    page, html = page_of(metrics=[*lines, *evals, ["no", "record"], {"kind": "other"}])
    assert "nan" not in html.split("</style>")[1].lower()
    assert "–" in page.text


def test_zero_loss_parts_have_no_curve():
    chart = report.loss_chart(fake_train(losses=("order",)))
    assert [line.name for line in chart.lines] == ["total", "class", "order"]


def test_long_runs_are_drawn_as_means():
    chart = report.loss_chart([{"step": s, "loss": float(s % 2)} for s in range(1, 10_001)])
    assert len(chart.lines[0].points) == 100
    assert {y for _, y in chart.lines[0].points} == {0.5}
    assert "mean of 100" in chart.note


def test_repeated_steps_of_a_resumed_run_count_once():
    lines = fake_train(steps=200) + fake_train(steps=480)[15:]
    again = report._last_per(("step",), lines)
    assert [r["step"] for r in again] == list(range(10, 481, 10))


def test_headline_takes_the_last_evaluation_only():
    evals = fake_evals()
    rows = report.final_rows(evals)
    assert [r["subset"] for r in rows] == ["all", "temporal", "static"]
    assert {r["step"] for r in rows} == {480}
    other = [e | {"protocol": "paper: 3 crops", "top1": 12.5} for e in evals[-3:]]
    assert {r["top1"] for r in report.final_rows(evals + other)} == {12.5}


def test_headline_says_what_shuffling_costs():
    rows = report.final_rows(fake_evals())
    assert report._finding(rows).startswith("Shuffling the frames costs 53.3 points on temporal")
    for row, gap in zip(rows, (1.0, 0.0, -2.4), strict=True):
        row["gap"] = gap
    assert report._finding(rows) == (
        "Shuffling the frames costs nothing on temporal classes and "
        "nothing on static classes (+2.4)."
    )
    assert report._finding([]) is None


def test_incomplete_evaluation_is_marked():
    evals = fake_evals()
    evals[-1] |= {"videos_evaluated": 238, "videos_failed": 2}
    page, _ = page_of(metrics=evals)
    assert "Not every video was evaluated: all classes 238 of 240" in page.text
    assert "Not every video" not in page_of()[0].text


def test_baseline_says_so_in_its_title():
    page, _ = page_of(fake_config(losses=()))
    assert "TimeSformer" in page.text
    assert "debias loss" not in page.text


def test_failures_of_one_video_are_one_row():
    failures = [{"path": "a.webm", "class": "corrupt", "reason": "bad", "count": 2}] * 2
    page, _ = page_of(failures=failures)
    assert page.text.count("a.webm") == 1
    assert "None." in page_of()[0].text


def test_missing_checkpoint_or_videos_are_said_in_the_page(tmp_path):
    run = write_fake_run(tmp_path / "run")
    assert "no complete checkpoint" in clip_strips(run, fake_config())[1]
    checkpoint = run / "checkpoints" / "step-480"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index.json").write_text("{}")
    config = fake_config()
    config["config"]["data"]["root"] = str(tmp_path / "gone")
    assert "does not exist on this machine" in clip_strips(run, config)[1]
    config["config"]["data"]["root"] = str(tmp_path)
    strips, excuse = clip_strips(run, config)
    assert strips == []
    assert "could not be used" in excuse
    (run / "config.json").write_text(json.dumps(config))
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert "could not be used" in page.text
    assert "finished" in page.text


def test_command_writes_the_report_and_prints_its_path(tmp_path, capsys):
    run = write_fake_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_browser_shows_the_page(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    file = tmp_path / "report.html"
    file.write_text(page_of(strips=fake_strips())[1], encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1280,2600", f"--screenshot={tmp_path / 'page.png'}", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(tmp_path / "page.png") as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 1000  # text, charts and video frames, not an error page
    assert CLASSES[0] in file.read_text(encoding="utf-8")
