"""The report as a person sees it: most of these tests open the page in headless Chromium and read it there."""

import base64
import dataclasses
import io
import json
import re
import time
from html import unescape

import numpy as np
import pytest
from pages import browser, find, open_html, shown, texts, wait_until  # noqa: F401, fixtures

from sdr.report import RunInfo, explain, format_score, frame_numbers, plan_budget, render_report, short_names
from sdr.score import ClipScore, VideoScore

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
Image = pytest.importorskip("PIL.Image")

SIZE = 96  # pixels of thumbnails and frames
RUN = RunInfo(
    title="Scores of the test",
    model="SDR tiny, demonstration weights",
    demonstration=True,
    synthetic=True,
    detector="centerface",
    threshold=0.5,
    reduce="mean",
    created="2026-01-02T03:04:05+00:00",
    command="sdr score videos",
    version="0.1.0",
    metrics={"video AUC": 0.75, "video accuracy": 2 / 3, "video EER": float("nan")},
)
REAL_RUN = dataclasses.replace(RUN, demonstration=False, synthetic=False, metrics={}, model="FTCN, ftcn.safetensors")


def picture(red: int) -> np.ndarray:
    """A smooth face-like blob on a gradient, [SIZE, SIZE, 3] uint8; ``red`` tells pictures apart."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    blob = np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) * 12)
    return np.stack([np.full_like(x, red), 90 + 150 * blob, 60 + 80 * y], axis=-1).astype(np.uint8)


def make_clip(number: int, score: float, track: int = 0) -> ClipScore:
    first = 32 * number
    return ClipScore(track, first / 25, (first + 31) / 25, first, first + 31, score, picture(20 * number))


def make_video(path: str, scores: list[float], *, truth: int | None = None, track_of=lambda i: 0) -> VideoScore:
    """Scored like the scorer does it, at threshold 0.5 and with the mean."""
    clips, counts = [], {}
    for i, score in enumerate(scores):
        number = counts[track_of(i)] = counts.get(track_of(i), -1) + 1
        clips.append(make_clip(number, score, track_of(i)))
    mean = float(np.mean(scores))
    top = np.stack([picture(t) for t in range(32)])
    state = "fake" if mean >= 0.5 else "real"
    length = max(clip.end for clip in clips)
    return VideoScore(path, mean, state, "", tuple(clips), len(counts), 1.25, length, top, truth)


def no_face(path: str = "/v/dark.mp4") -> VideoScore:
    return VideoScore(path, None, "inconclusive", "no face in 120 frames", seconds=0.5, duration=4.8)


def ten_videos() -> list[VideoScore]:
    """Two faces in the first; means 0.10, 0.20 .. by hand; 5 fake, 4 real, 1 inconclusive."""
    first = make_video("/v/real/two.mp4", [0.1, 0.2, 0.3, 0.4], truth=0, track_of=lambda i: i % 2)  # mean 0.25
    second = make_video("/v/fake/high.mp4", [0.75, 0.95, 0.7], truth=1)  # mean 0.80
    others = [make_video(f"/v/real/{i}.mp4", [0.1 * i], truth=i % 2) for i in (1, 2, 3, 6, 7, 8, 9)]
    return [first, second, *others, no_face()]


# ---------------------------------------------------------------- without a browser


def test_explains_mean_by_hand():
    assert explain(make_video("v", [0.75, 0.95, 0.7]), RUN) == (
        "Mean of 3 clip scores over 1 face: 0.80, at or above the threshold 0.50. "
        "The highest clip, 1.3\u20132.5 s, scored 0.95."
    )


def test_explains_max_over_faces_and_single_clip():
    two = make_video("v", [0.1, 0.3, 0.2, 0.3], track_of=lambda i: i % 2)
    run = dataclasses.replace(RUN, reduce="max")
    assert explain(two, run).startswith("Highest of 2 faces, each the mean of its clips (4 in all): ")
    assert explain(make_video("v", [0.3]), run) == "Score of the only clip: 0.30, below the threshold 0.50."


@pytest.mark.parametrize(
    ("score", "threshold", "text"),
    [(0.81, 0.5, "0.81"), (0.4999, 0.5, "0.4999"), (0.5, 0.5, "0.50"), (0.5, 0.505, "0.50"), (0.505, 0.505, "0.505")],
)
def test_score_never_looks_to_be_on_the_wrong_side(score, threshold, text):
    assert format_score(score, threshold) == text


def test_frame_numbers_follow_mirrored_tracks():
    whole = make_clip(2, 0.5)
    assert frame_numbers(whole, 32).tolist() == list(range(64, 96))
    short = dataclasses.replace(whole, first_frame=10, last_frame=13)
    assert frame_numbers(short, 8).tolist() == [10, 11, 12, 13, 12, 11, 10, 11]
    assert frame_numbers(dataclasses.replace(whole, first_frame=7, last_frame=7), 3).tolist() == [7, 7, 7]


def test_names_keep_apart_what_differs():
    assert short_names(["/d/a/c23/000.mp4", "/d/b/c23/000.mp4"]) == ["a/c23/000.mp4", "b/c23/000.mp4"]
    assert short_names(["/d/a/000.mp4"]) == ["000.mp4"]
    assert short_names(["/d/a.mp4", "b.mp4"]) == ["/d/a.mp4", "b.mp4"]
    assert short_names(["a.mp4", "sub/b.mp4"]) == ["a.mp4", "sub/b.mp4"]
    assert short_names([]) == []


HOSTILE = "/v/<script>alert(1)</script>\n\"'&\udcff\u202e.mp4"
HOSTILE_SHOWN = "<script>alert(1)</script>\\n\"'&\\udcff\\u202e.mp4"  # one line, every sign of it visible


def test_hostile_text_is_escaped_everywhere():
    run = dataclasses.replace(RUN, title="</title><b>", command=f"sdr score '{HOSTILE}'", model="<i>m")
    bad = dataclasses.replace(no_face(HOSTILE), reason="cannot </script><script>alert(2)//")
    page = render_report([dataclasses.replace(make_video(HOSTILE, [0.9]), reason="<u>"), bad], run)
    page.encode("utf-8")  # no lone surrogate is left
    ours = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.S)  # without plotly.js
    for forbidden in ("alert(1)</script>", "<script>alert", "<u>", "<i>m", "</title><b>", "\udcff", "\u202e"):
        assert forbidden not in ours
    assert HOSTILE_SHOWN in unescape(ours)


def test_data_block_holds_what_is_drawn():
    page = render_report(ten_videos(), RUN)
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1)
    video = json.loads(block)["videos"][0]
    assert [face["score"] for face in video["faces"]] == [[0.1, 0.3], [0.2, 0.4]]
    assert [face["first"] for face in video["faces"]] == [[0, 32], [0, 32]]
    assert video["top"] == [1.28, 2.52]


def test_timeline_of_a_late_clock_starts_at_its_first_clip():
    clip = dataclasses.replace(make_clip(0, 0.9), start=3600.0, end=3601.24)
    video = dataclasses.replace(make_video("v", [0.9]), clips=(clip,), duration=5.0)
    block = re.search(r'id="data">(.*?)</script>', render_report([video], RUN), re.S).group(1)
    assert json.loads(block)["videos"][0]["axis"] == [3600.0, 3605.0]


def test_pictures_are_the_frames_they_are_said_to_be():
    page = render_report([make_video("v.mp4", [0.2, 0.9])], RUN)
    film = page[page.index('data-role="film"') :]
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="Frame (\d+) ', film)
    assert len(found) == 16
    for picture_data, number in found:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture_data))), dtype=float)
        assert abs(image[..., 0].mean() - (int(number) - 32)) < 3  # red holds the frame's place in the clip


def test_banners_only_when_true():
    page = render_report([make_video("v.mp4", [0.9])], REAL_RUN)
    assert 'id="demonstration-banner"' not in page
    assert 'id="synthetic-banner"' not in page
    assert 'id="metrics"' not in page
    assert "A synthetic AUC shows that the pipeline works and nothing about real deepfakes." in " ".join(page.split())


@pytest.mark.parametrize("results", [[], [no_face()], [no_face("a.mp4"), no_face("b.mp4")]], ids=len)
def test_run_without_any_score(results):
    page = render_report(results, REAL_RUN)
    assert 'id="strip"' not in page
    assert page.count('data-role="timeline"') == 0
    assert page.count("No score: no face in 120 frames.") == len(results)


def test_scored_without_clips_has_no_timeline():
    page = render_report([VideoScore("v.mp4", 0.7, "fake")], REAL_RUN)
    assert page.count('data-role="timeline"') == 0
    assert ">0.70<" in page


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": 1.5}, r"v\.mp4: a score .*got 1\.5"),
        ({"score": float("nan")}, "got nan"),
        ({"state": "maybe"}, "'maybe'"),
        ({"score": None}, "inconclusive means no score"),
    ],
)
def test_rejects_results_that_contradict_themselves(change, match):
    with pytest.raises(ValueError, match=match):
        render_report([dataclasses.replace(make_video("v.mp4", [0.9]), **change)], RUN)


def test_rejects_unknown_reduction():
    with pytest.raises(ValueError, match="median"):
        render_report([], dataclasses.replace(RUN, reduce="median"))


def test_stride_one_is_thinned_but_keeps_the_highest():
    scores = [0.5] * 3000
    scores[1234] = 0.99
    page = render_report([make_video("v.mp4", scores)], RUN)
    block = re.search(r'id="data">(.*?)</script>', page, re.S).group(1)
    drawn = json.loads(block)["videos"][0]["faces"][0]["score"]
    assert len(drawn) <= plan_budget(1).segments
    assert max(drawn) == 0.99
    assert f"{len(drawn)} of 3000 clips are drawn" in page


@pytest.mark.slow
def test_300_videos_stay_small_and_quick():
    """Every picture textured, as many faces and clips as are ever drawn: the largest page of 300 videos."""
    noise = np.random.default_rng(0).normal(0, 12, (SIZE, SIZE, 3))
    textured = (picture(120) + noise).clip(0, 255).astype(np.uint8)
    clips = [make_clip(i // 4, (i * 7 % 100) / 100, track=i % 4) for i in range(300)]
    clips = tuple(dataclasses.replace(clip, thumbnail=textured) for clip in clips)
    video = dataclasses.replace(
        make_video("v.mp4", [0.6]), clips=clips, faces=4, top_clip=np.stack([textured] * 32), duration=96.0
    )
    began = time.perf_counter()
    page = render_report([dataclasses.replace(video, path=f"/v/{i}.mp4") for i in range(300)], RUN)
    assert time.perf_counter() - began < 60
    assert len(page.encode()) < 25e6


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def open_page(open_html):  # noqa: F811
    return lambda results, run=RUN, fragment="": open_html(render_report(results, run), fragment)


def middle(element) -> tuple[float, float]:
    """Of the box that an element fills on the screen, pixels."""
    box = element.rect
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def open_section(page, index: int):
    section = find(page, f"#video-{index}")
    section.find_element("css selector", "summary").click()
    return section


def test_head_says_what_was_run(open_page):
    page = open_page(ten_videos())
    assert shown(page, "h1") == page.title == "Scores of the test"
    assert texts(page, "#verdicts li") == ["5 fake", "4 real", "1 inconclusive"]
    assert "they detect nothing real" in shown(page, "#demonstration-banner")
    assert "sdr convert" in shown(page, "#demonstration-banner")
    assert "A synthetic AUC shows that the pipeline works and nothing about real deepfakes." in shown(
        page, "#synthetic-banner"
    )
    assert texts(page, "#metrics dd") == ["0.750", "0.667", "undefined"]
    assert texts(page, "#metrics dt") == ["video AUC", "video accuracy", "video EER"]
    assert "9 videos with a score and a known truth" in shown(page, "#metrics-note")
    facts = {name: shown(page, f"#run [data-fact={name}]") for name in ("model", "detector", "threshold", "reduce")}
    assert facts == {
        "model": "SDR tiny, demonstration weights",
        "detector": "centerface",
        "threshold": "0.50 or more is called fake",
        "reduce": "mean over all clips",
    }
    assert shown(page, "#run [data-fact=command]") == "sdr score videos"
    assert shown(page, "#run [data-fact=version]") == "0.1.0"
    assert shown(page, "#run [data-fact=created]") == "2026-01-02T03:04:05+00:00"


def test_table_has_every_video(open_page):
    page = open_page(ten_videos())
    rows = [texts(row, "td") for row in page.find_elements("css selector", "#videos-table tbody tr")]
    assert len(rows) == 10
    assert rows[0] == ["real/two.mp4", "0.25", "real", "real ✓ as called", *rows[0][4:]]
    assert rows[0][4:] == ["highest clip 0.40, 1.3\u20132.5 s", "4", "2", "1.2 s"]
    assert rows[1][:4] == ["fake/high.mp4", "0.80", "fake", "fake ✓ as called"]
    assert rows[2][:4] == ["real/1.mp4", "0.10", "real", "fake ✗ called wrongly"]
    assert rows[9] == ["dark.mp4", "\u2013", "inconclusive", "\u2013", "no face in 120 frames", "0", "0", "0.5 s"]


def test_strip_has_one_mark_per_scored_video_and_a_click_opens_it(open_page):
    page = open_page(ten_videos())
    wait_until(lambda: find(page, "#strip").get_attribute("data-drawn") == "true")
    assert len(page.find_elements("css selector", "#strip .scatterlayer .point")) == 9
    assert texts(page, "#strip .ytick") == ["truly real", "truly fake"]
    find(page, "#videos-table a[href='#video-1']").click()
    wait_until(lambda: find(page, "#video-1").get_attribute("open") is not None)


@pytest.mark.parametrize(
    ("index", "scores", "faces"), [(0, [0.1, 0.3, 0.2, 0.4], 2), (1, [0.75, 0.95, 0.7], 1), (2, [0.1], 1)]
)
def test_opening_a_section_draws_its_timeline(open_page, index, scores, faces):
    page = open_page(ten_videos())
    assert page.find_elements("css selector", ".timeline svg") == []  # nothing is drawn before it is asked for
    section = open_section(page, index)
    wait_until(lambda: section.find_element("css selector", ".timeline").get_attribute("data-drawn") == "true")
    assert len(section.find_elements("css selector", ".timeline .scatterlayer .trace")) == faces
    grid = [middle(line)[1] for line in section.find_elements("css selector", ".timeline .ygrid")]  # at 0, 0.25 .. 1
    lines = section.find_elements("css selector", ".timeline .scatterlayer path.js-line")  # face by face
    heights = [(grid[0] - middle(line)[1]) / (grid[0] - grid[-1]) for line in lines]
    assert heights == pytest.approx(scores, abs=0.01)
    assert "threshold 0.50" in texts(section, ".timeline .annotation")


def test_section_says_why(open_page):
    page = open_page([*ten_videos(), dataclasses.replace(make_video("/v/x.mp4", [0.6]), reason="damaged: 2 frames")])
    section = open_section(page, 1)
    assert shown(section, "[data-role=score]") == "0.80"
    assert shown(section, ".verdict [data-role=state]") == "fake"
    assert shown(section, "[data-role=explanation]").startswith("Mean of 3 clip scores over 1 face: 0.80, at or above")
    assert shown(section, "[data-role=path]") == "/v/fake/high.mp4"
    assert shown(section, "[data-role=clips]") == "3"
    assert shown(section, "[data-role=truth]") == "fake, as called"
    assert shown(open_section(page, 10), "[data-role=warning]") == "Note: damaged: 2 frames"


def test_inconclusive_section_has_its_reason_and_no_plot(open_page):
    page = open_page(ten_videos(), fragment="#video-9")  # the address opens the section by itself
    section = find(page, "#video-9")
    assert section.get_attribute("open") is not None
    assert shown(section, "[data-role=explanation]") == "No score: no face in 120 frames."
    assert shown(section, ".verdict .chip") == "inconclusive"
    for selector in (".timeline", "img", "[data-role=score]"):
        assert section.find_elements("css selector", selector) == []


def test_pictures_load_and_follow_time(open_page):
    page = open_page(ten_videos())
    section = open_section(page, 0)
    widths = "return [...arguments[0].querySelectorAll('img')].map(image => image.naturalWidth)"
    wait_until(lambda: min(page.execute_script(widths, section)) > 0)
    assert len(page.execute_script(widths, section)) == 4 + 16  # a thumbnail per clip, half of the 32 frames
    for row in section.find_elements("css selector", ".faces"):
        assert len(row.find_elements("css selector", "img")) == 2
    wait_until(lambda: section.find_element("css selector", ".timeline").get_attribute("data-drawn") == "true")
    thumbnail = section.find_elements("css selector", ".faces img")[1]
    segment = section.find_elements("css selector", ".timeline path.js-line")[1]
    assert middle(thumbnail)[0] == pytest.approx(middle(segment)[0], abs=3)
    assert texts(section, "[data-role=film] figcaption")[:2] == ["32", "34"]


def test_sorts_by_a_click_on_a_header(open_page):
    page = open_page(ten_videos())
    button = find(page, "#videos-table th[data-key=score] button")
    button.click()
    scores = texts(page, "#videos-table tbody .score-cell")
    assert scores == ["0.90", "0.80", "0.80", "0.70", "0.60", "0.30", "0.25", "0.20", "0.10", "\u2013"]
    assert find(page, "#videos-table th[data-key=score]").get_attribute("aria-sort") == "descending"
    button.click()
    assert texts(page, "#videos-table tbody .score-cell") == [*reversed(scores[:-1]), "\u2013"]
    find(page, "#videos-table th[data-key=name] button").click()
    assert texts(page, "#videos-table td.name")[:3] == ["dark.mp4", "fake/high.mp4", "real/1.mp4"]


def test_filter_hides_rows_and_sections(open_page):
    page = open_page(ten_videos())

    def visible(selector: str) -> int:
        return sum(element.is_displayed() for element in page.find_elements("css selector", selector))

    find(page, "#filter-text").send_keys("NO FACE")
    assert shown(page, "#filter-count") == "1 of 10 videos"
    assert (visible("#videos-table tbody tr"), visible("details.video")) == (1, 1)
    find(page, "#filter-text").clear()
    find(page, "#filter-text").send_keys("mp4")
    assert shown(page, "#filter-count") == "10 of 10 videos"
    find(page, "#filter-state option:nth-child(2)").click()  # fake
    assert shown(page, "#filter-count") == "5 of 10 videos"
    assert visible("details.video[data-state=fake]") == visible("details.video") == 5


def test_open_all_draws_all(open_page):
    page = open_page(ten_videos())
    find(page, "#open-all").click()
    wait_until(lambda: len(page.find_elements("css selector", ".timeline[data-drawn=true]")) == 9)
    find(page, "#close-all").click()
    assert page.find_elements("css selector", "details.video[open]") == []


def test_one_video_is_open_at_once_without_tools(open_page):
    page = open_page([make_video("/v/one.mp4", [0.2, 0.6])], REAL_RUN)
    wait_until(lambda: page.find_elements("css selector", ".timeline[data-drawn=true]") != [])
    assert shown(page, "[data-role=explanation]").startswith("Mean of 2 clip scores over 1 face: 0.40, below")
    for absent in ("#filter-tools", "#open-all", "th[data-key=truth]", "#metrics", "#demonstration-banner"):
        assert page.find_elements("css selector", absent) == []


def test_hostile_names_are_shown_not_run(open_page):
    page = open_page([make_video(HOSTILE, [0.9]), no_face("/v/plain.mp4")])
    assert find(page, "td.name").get_attribute("data-value") == HOSTILE_SHOWN
    section = open_section(page, 0)
    wait_until(lambda: section.find_element("css selector", ".timeline").get_attribute("data-drawn") == "true")
    assert shown(section, "[data-role=path]").endswith(HOSTILE_SHOWN)


def test_what_the_score_means_is_said(open_page):
    page = open_page([no_face()], REAL_RUN)
    text = shown(page, "section.meaning")
    for phrase in ("not a probability", "FTCN, ftcn.safetensors", "neither real nor fake", "A person decides"):
        assert phrase in text


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_sideways(open_page, browser, width):  # noqa: F811
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = open_page([*ten_videos(), no_face("/v/" + "long" * 60 + ".mp4")])
        open_section(page, 0)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_scheme_repaints_the_plots(open_page, browser):  # noqa: F811
    page = open_page([make_video("/v/one.mp4", [0.2])])
    stroke = "return getComputedStyle(document.querySelector('.timeline path.js-line')).stroke"
    wait_until(lambda: page.find_elements("css selector", ".timeline[data-drawn=true]") != [])
    light = page.execute_script(stroke)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        wait_until(lambda: page.execute_script(stroke) != light)
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
