"""Frame sampling, boxes, lists at scale, chunked videos, repeated views, and the loader's promises."""

import contextlib
import functools
import os
import random
import signal
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import data
from common import UserError, make_key, uniform

CPU = torch.device("cpu")


def info(num_frames=300, width=320, height=240, fps=30.0):
    return data.VideoInfo(width, height, fps, num_frames, num_frames / fps, 0, "h264")


def write(path, images, fps=30, **options):
    """H.264 of uint8 [T, H, W, 3] images."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"crf": "12", **options})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def numbered(start, count, side=64):
    """Frames that tell their number: a number in base 4 by the brightness of six cells; the right half is one grey."""
    images = np.full((count, side, side, 3), 128, np.uint8)
    for t in range(count):
        for digit in range(6):
            y = digit * side // 6
            images[t, y : y + side // 6, : side // 2] = 40 + 55 * ((start + t) // 4**digit % 4)
    return images


def read_numbers(clip):
    """The numbers that the frames of a whole-frame clip [T, 3, H, W] tell."""
    side = clip.shape[-1]
    cells = [clip[:, 1, int((d + 0.5) * side / 6), side // 4].float() for d in range(6)]
    return sum(((cell - 40) / 55).round().long() * 4**d for d, cell in enumerate(cells)).tolist()


# ---- Frame sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [16, 17, 30, 63, 64, 65, 300, 1001])
def test_samples_are_in_range_in_order_and_different(num_frames):
    film = fake_video(num_frames)
    video = film.info
    rng = random.Random(num_frames)
    for _ in range(50):
        u, row = rng.random(), [rng.random() for _ in range(16)]
        samples = [
            data.fps_frames(film, 16, 5, u),
            data.stride_frames(video, 16, 4, u),
            data.segment_frames(video, 16, row),
            data.segment_frames(video, 16, u),
            data.span_frames(film, 16, row[:2]),
            data.view_frames(video, 16, 4, rng.randrange(5), 5),
        ]
        for frames in samples:
            assert len(frames) == 16 and 0 <= frames[0] and frames[-1] < num_frames
            assert all(isinstance(i, int) for i in frames) and all(np.diff(frames) > 0), frames


def test_too_short_a_video_is_refused():
    for sample in (
        lambda v: data.fps_frames(v, 16, 5, 0.5),
        lambda v: data.stride_frames(v.info, 16, 4, 0.5),
        lambda v: data.segment_frames(v.info, 16, 0.5),
        lambda v: data.span_frames(v, 16, (0.5, 0.5)),
        lambda v: data.view_frames(v.info, 16, 4, 0, 5),
    ):
        with pytest.raises(ValueError, match="15 frames"):
            sample(fake_video(15))


def test_fps_frames_by_hand():
    """5 fps of 25: every fifth frame; 16 of them end 75 frames on, which 77 frames allow from frame 0 and frame 1."""
    starts = [
        data.fps_frames(fake_video(77, 25.0), 16, 5, u)[0]
        for u in (0, 0.25, 0.499, 0.5, 0.999, 1.0)
    ]
    assert starts == [0, 0, 0, 1, 1, 1]
    assert data.fps_frames(fake_video(77, 25.0), 16, 5, 0.0) == list(range(0, 76, 5))
    assert data.fps_frames(fake_video(76, 25.0), 16, 5, 0.999) == list(range(0, 76, 5))
    assert data.fps_frames(fake_video(31, 25.0), 16, 5, 0.9) == list(
        range(0, 31, 2)
    )  # too short: spread over it
    assert data.fps_frames(fake_video(20, 4.0), 16, 5, 0.999) == list(
        range(4, 20)
    )  # slower than 5 fps


def test_fps_frames_and_spans_go_by_time():
    """A film of 10 s at 30 frames a second, then 10 s at 6: 16 frames at 5 fps are 3 s apart wherever they start."""
    times = np.concatenate([np.arange(300) / 30, 10 + np.arange(60) / 6])
    film = fake_video(360, 18.0, times)
    for u in np.arange(0, 1, 0.01):
        shown = times[data.fps_frames(film, 16, 5, u)]
        assert 3 - 1 / 6 <= shown[-1] - shown[0] <= 3 + 1 / 6
        assert np.abs(np.diff(shown) - 0.2).max() <= 1 / 6 + 1e-6
    starts = times[[data.span_frames(film, 16, (u, 0))[0] for u in (0, 0.999)]]
    ends = times[[data.span_frames(film, 16, (0, u))[-1] for u in (0, 0.999)]]
    assert starts[0] == 0 and starts[1] == pytest.approx(0.2 * times[-1], abs=1 / 30)
    assert ends[0] == times[-1] and ends[1] == pytest.approx(0.8 * times[-1], abs=1 / 6)
    assert np.diff(times[data.span_frames(film, 16, (0, 0))]) == pytest.approx(
        times[-1] / 15, abs=1 / 6
    )


def test_every_start_and_corner_is_drawn_the_first_and_the_last_too():
    """Of what a paper picks at random every value occurs, the ends as often as the rest."""
    film, draws = fake_video(40, 10.0), np.arange(0.0005, 1, 0.001)
    starts = [data.fps_frames(film, 16, 5, u)[0] for u in draws]  # 40 - 30 = 10 of them
    assert np.bincount(starts).tolist() == [100] * 10
    spans = [data.span_frames(fake_video(101), 16, (u, u)) for u in draws]
    firsts, lasts = np.bincount([s[0] for s in spans]), np.bincount([100 - s[-1] for s in spans])
    assert (
        len(firsts) == len(lasts) == 21 and min(firsts.min(), lasts.min()) >= 47
    )  # 0 ... 20 and 80 ... 100
    keys = make_key("corners", torch.arange(4000))
    boxes = [data.random_box(info(width=40, height=32), key, 0.75) for key in keys]  # sides of 24
    assert {x for x, _, _, _ in boxes} == set(range(0, 17, 2)) and {
        y for _, y, _, _ in boxes
    } == set(range(0, 9, 2))
    boxes = [
        data.random_resized_box(info(width=40, height=32), key, (0.5, 0.5), (1, 1)) for key in keys
    ]
    assert {(w, h) for _, _, w, h in boxes} == {(26, 26)}  # 26 ** 2 is about half of 40 x 32
    assert {x for x, _, _, _ in boxes} == set(range(0, 15, 2)) and {
        y for _, y, _, _ in boxes
    } == set(range(0, 7, 2))
    boxes = [
        data.multi_scale_box(info(width=40, height=40), key, (0.6,)) for key in keys
    ]  # sides of 24
    assert {(x, y) for x, y, _, _ in boxes} == {
        (4 * i, 4 * j) for i in range(5) for j in range(5) if i % 2 == j % 2
    }  # fmt: skip
    moments = [
        data.moment_frames(fake_video(40, 10.0), 0.0, 2.0, 8, 8.0, u)[0] for u in draws
    ]  # 1 s within 2 s
    assert set(moments) == set(range(11))
    pieces = [data.between_frames(fake_video(40, 10.0), 1.0, 3.0, 2, [u, u]) for u in draws[:-1]]
    assert {a for a, _ in pieces} == set(range(10, 20)) and {b for _, b in pieces} == set(
        range(20, 30)
    )


def test_stride_starts_are_videomaes():
    """16 frames of stride 4 in 70: 70 - 64 + 1 = 7 starts, each as likely."""
    starts = [data.stride_frames(info(70), 16, 4, u)[0] for u in np.arange(700) / 700]
    assert np.bincount(starts).tolist() == [100] * 7
    assert data.stride_frames(info(70), 16, 4, 0.0) == list(range(0, 64, 4))
    assert data.stride_frames(info(62), 16, 4, 0.9) == list(
        range(0, 61, 4)
    )  # fits, though VideoMAE's window doesn't
    assert data.stride_frames(info(31), 16, 4, 0.9) == list(range(0, 31, 2))  # spread evenly


def test_segments_cover_the_video_evenly():
    """Every frame is some segment's, each frame of a segment as likely; the two test clips are starts and middles."""
    counts = np.zeros(50, int)
    for u in (np.arange(600) + 0.5) / 600:
        counts[data.segment_frames(info(50), 16, u)] += 1
    assert (
        counts.min() >= 149 and counts.max() <= 201 and counts.sum() == 600 * 16
    )  # segments of 3 and 4 frames
    assert data.segment_frames(info(160), 16, 0.0) == list(range(0, 160, 10))
    assert data.segment_frames(info(160), 16, 0.5) == list(range(5, 160, 10))
    assert data.segment_frames(info(160), 3, [0.0, 0.5, 0.99]) == [0, 53 + 26, 106 + 53]


def test_test_clips_are_evenly_placed():
    starts = [data.view_frames(info(264), 16, 4, k, 5)[0] for k in range(5)]
    assert starts == [0, 50, 100, 150, 200]
    assert data.view_frames(info(264), 16, 4, 0, 1)[0] == 100
    assert [data.view_frames(info(40), 16, 4, k, 5) for k in range(5)] == [
        data.view_frames(info(40), 16, 4, 0, 5)
    ] * 5


def test_span_starts_and_ends_in_the_outer_fifths():
    frames = [
        data.span_frames(fake_video(1001), 32, (a, b)) for a in (0, 0.999) for b in (0, 0.999)
    ]
    assert [(f[0], f[-1]) for f in frames] == [(0, 1000), (0, 800), (200, 1000), (200, 800)]


def fake_video(num_frames=300, fps=30.0, times=None):
    """The part of a Video that samplers use, over exact times."""
    times = np.arange(num_frames) / fps if times is None else times
    video = SimpleNamespace(path="v", info=info(num_frames, fps=fps), times=times)
    video.at, video.clamp = (
        functools.partial(data.Video.at, video),
        functools.partial(data.Video.clamp, video),
    )
    return video


def test_between_frames_are_avions():
    """Midpoints of n equal segments of [start, end]; jitter moves each within its segment; the end is clamped."""
    video = fake_video()
    assert data.between_frames(video, 2.0, 4.0, 4, 0.5) == [
        67,
        82,
        97,
        112,
    ]  # 2.25, 2.75, 3.25, 3.75 s
    low, high = (
        data.between_frames(video, 2.0, 4.0, 4, np.zeros(4)),
        data.between_frames(video, 2, 4, 4, [0.99] * 4),
    )
    assert low == [60, 75, 90, 105] and high == [74, 89, 104, 119]
    assert data.between_frames(video, 9.0, 12.0, 2, 0.5) == data.between_frames(
        video, 9.0, 10.0, 2, 0.5
    )
    assert data.between_frames(video, 1.0, 1.01, 4, 0.5) == [30, 30, 30, 30]
    for start, end in ((5, 5), (6, 5), (10, 12), (-1, 2), (float("nan"), 2)):
        with pytest.raises(ValueError, match="nothing from second"):
            data.between_frames(video, start, end, 4)


def test_second_frames_and_times():
    """16 frames of each second, at any frame rate; a frame's own time shows it, a moment before the one before."""
    assert data.second_frames(fake_video(48, 16.0), 2, 16) == list(range(32, 48))
    assert data.second_frames(fake_video(90, 30.0), 1, 3) == [35, 45, 55]
    video = fake_video()
    for i in range(300):
        assert video.at([i / 30]) == [i] and video.at([i / 30 + 0.03]) == [i]
        assert video.at([i / 30 - 0.003]) == [max(i - 1, 0)]
    assert video.at([10.0, 10.2]) == [299, 299]
    with pytest.raises(data.VideoError, match="11.0 s"):
        video.at([0.0, 11.0])


def test_moment_frames():
    """A clip of n / fps seconds anywhere in the segment, around a shorter one, inside the video."""
    video = fake_video()  # 10 s at 30 frames a second
    starts = [data.moment_frames(video, 2.0, 6.0, 16, 5.0, u)[0] for u in (0.0, 0.5, 0.99)]
    assert starts == [63, 75, 86]  # the first of 16 fifths of a second, from 2.0, 2.4, 2.8
    assert np.diff(data.moment_frames(video, 2.0, 6.0, 16, 5.0, 0.0)).tolist() == [6] * 15
    assert data.moment_frames(video, 4.0, 5.0, 16, 5.0, 0.9) == data.moment_frames(
        video, 4.0, 5.0, 16, 5.0, 0.1
    )
    assert data.moment_frames(video, 4.0, 5.0, 15, 5.0)[7] == 135  # its middle
    assert data.moment_frames(video, 0.0, 1.0, 15, 5.0) == list(range(3, 93, 6))
    assert data.moment_frames(video, 9.5, 12.0, 15, 5.0) == list(range(213, 300, 6))
    assert data.moment_frames(video, 3.0, 4.0, 150, 5.0)[::149] == [1, 299]  # spread over all of it
    for start, end in ((5, 5), (6, 5), (10, 12), (-1, 2), (float("nan"), 2)):
        with pytest.raises(ValueError, match="nothing from second"):
            data.moment_frames(video, start, end, 16, 5.0)


# ---- Boxes -----------------------------------------------------------------------------------------------------------

BOXES = {
    "random": data.random_box,
    "share": lambda v, key: data.random_box(v, key, 224 / 256),
    "resized": data.random_resized_box,
    "multi-scale": data.multi_scale_box,
    "left": lambda v, key: data.crop_box(v, 0),
    "centre": lambda v, key: data.centre_box(v),
    "right": lambda v, key: data.crop_box(v, 2),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes_are_even_and_inside(name):
    for width, height in (
        (320, 240),
        (240, 320),
        (341, 255),
        (64, 64),
        (1280, 720),
        (500, 20),
        (7, 9),
    ):
        for n in range(60):
            x, y, w, h = BOXES[name](info(1, width, height), make_key(n))
            assert min(x, y) >= 0 and min(w, h) > 0 and x + w <= width and y + h <= height
            assert x % 2 == y % 2 == 0 and (w % 2 == h % 2 == 0 or min(width, height) % 2)


def test_random_square_reaches_every_place():
    boxes = {data.random_box(info(1, 320, 240), make_key(n)) for n in range(2000)}
    assert {x for x, *_ in boxes} == set(range(0, 82, 2)) and {box[1:] for box in boxes} == {
        (0, 240, 240)
    }
    boxes = [data.random_box(info(1, 256, 256), make_key(n), 224 / 256) for n in range(500)]
    assert {box[2:] for box in boxes} == {(224, 224)} and {box[0] for box in boxes} == set(
        range(0, 34, 2)
    )


def test_multi_scale_is_tsns():
    """Ten pairs of sides: 1, 7/8, 3/4 and .66 of 240, one step apart at most; 13 places in quarters of the room."""
    boxes = [data.multi_scale_box(info(1, 320, 240), make_key(n)) for n in range(6000)]
    sides = {box[2:] for box in boxes}
    assert (
        {w for w, _ in sides} == {240, 210, 180, 158}
        and len(sides) == 10
        and (240, 180) not in sides
    )
    places = [
        (4 * x / (320 - w), 4 * y / (240 - h)) for x, y, w, h in boxes if (w, h) == (180, 158)
    ]
    assert len({(round(a), round(b)) for a, b in places}) == 13
    assert all(round(a) % 2 == round(b) % 2 for a, b in places)


def test_three_crops():
    wide, tall = info(1, 340, 256), info(1, 256, 340)
    assert [data.crop_box(wide, k) for k in range(3)] == [
        (0, 0, 256, 256),
        (42, 0, 256, 256),
        (84, 0, 256, 256),
    ]
    assert [data.crop_box(tall, k) for k in range(3)] == [
        (0, 0, 256, 256),
        (0, 42, 256, 256),
        (0, 84, 256, 256),
    ]
    assert data.crop_box(wide, 0, 1) == data.centre_box(wide) == (42, 0, 256, 256)


# ---- Chunked long videos ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """25 s at 30 fps in chunks of 10 s, frame n telling n; `short` lacks a frame of chunk 0; `hole` lacks chunk 10."""
    root = tmp_path_factory.mktemp("chunks")
    for name, lost, parts in (
        ("whole", 0, (0, 10, 20)),
        ("short", 1, (0, 10, 20)),
        ("hole", 0, (0, 20)),
    ):
        (root / f"{name}.mp4").mkdir()
        for start in parts:
            frames = numbered(
                30 * start, (150 if start == 20 else 300) - (lost if start == 0 else 0)
            )
            write(root / f"{name}.mp4" / f"{start}.mp4", frames)
    write(root / "one.mp4", numbered(0, 750))
    (root / "empty.mp4").mkdir()
    (root / "odd.mp4").mkdir()
    (root / "odd.mp4/7zip.txt").write_text("no chunk")
    return root


def test_a_clip_across_a_boundary_is_one_clip(chunks):
    """The frames of the whole video at the same times, from both sides of a boundary; one box for all, both ways."""
    with data.open_video(chunks / "whole.mp4") as parts, data.open_video(chunks / "one.mp4") as one:
        assert isinstance(parts, data.Chunks) and isinstance(one, data.Video)
        for start, end in ((9.0, 11.0), (0.0, 25.0), (19.9, 20.1), (24.0, 99.0), (3.0, 4.0)):
            places, frames = (data.between_frames(v, start, end, 8, 0.3) for v in (parts, one))
            assert [300 * k + i for k, i in places] == frames
            views = [(places, 64, None), (places[::-1], 32, (32, 16, 32, 32))]
            whole, right = parts.read_views(views)
            assert read_numbers(whole) == frames
            assert (
                right.float() - 128
            ).abs().max() < 6  # the grey half: the box is the same in every chunk
            assert (whole.float() - one.read(frames, 64)).abs().mean() < 2


def test_only_what_a_clip_touches_is_opened(chunks):
    with data.Chunks(chunks / "whole.mp4") as video:
        video.read_views([(data.between_frames(video, 3, 5, 4), 64, None)])
        assert set(video._chunks) == {0}
        video.read_views([(data.between_frames(video, 9, 11, 4), 64, None)])
        assert set(video._chunks) == {0, 1}


def test_short_and_missing_chunks(chunks):
    """A chunk that ends a frame early holds its last frame; numbers of frames, a hole, a time before the first chunk,
    an empty folder and other files are errors that name the place, and come at once."""
    with data.Chunks(chunks / "short.mp4") as video:
        places = video.at([9.9334, 9.9667, 9.99, 10.0])
        assert read_numbers(video.read_views([(places, 64, None)])[0]) == [298, 298, 298, 300]
        with pytest.raises(data.VideoError, match="short.mp4: is a folder of chunks"):
            video.read_views([([0, 1], 64, None)])
    began = time.monotonic()
    with data.Chunks(chunks / "hole.mp4") as video:
        assert video.at([5.0, 21.0]) == [(0, 150), (1, 30)]
        with pytest.raises(
            data.VideoError, match=r"hole.mp4: no chunk holds second 10.50.*0.mp4 is too short"
        ):
            data.between_frames(video, 9, 21, 4, 0.5)
        with pytest.raises(data.VideoError, match="no chunk holds second 30"):
            video.at([30.0])
        with pytest.raises(ValueError, match="nothing from second 26"):
            data.between_frames(video, 26, 40, 4)
    for name, words in (
        ("empty", "no chunk in it.*give the files, .*empty.mp4/\\*.mp4"),
        ("odd", "not a folder of chunks.*it holds 7zip.txt"),
        ("gone", "No such file"),
    ):
        with pytest.raises(data.VideoError, match=words) as error:
            data.Chunks(chunks / f"{name}.mp4")
        assert f"{name}.mp4" in str(error.value)
    assert time.monotonic() - began < 5


# ---- Lists -----------------------------------------------------------------------------------------------------------


def read_list(path, lines, encoding="utf-8"):
    """What VideoList reads in these lines: [(path, class)]."""
    path.write_bytes("\n".join(lines).encode(encoding, "surrogateescape"))
    videos = data.VideoList(path)
    return [(videos.video(i), videos.classes[label]) for i, label in enumerate(videos.labels)]


COMMA = {
    "a.mp4,x": ("a.mp4", "x"),
    "b b.mp4, y z": ("b b.mp4", "y z"),
    '"d,d.mp4",x': ("d,d.mp4", "x"),
    "  f.mp4  ,\tz  ": ("f.mp4", "z"),
    ' g.mp4 ,"x"': ("g.mp4", "x"),
    '"q ""q"".mp4" , "w,w"': ('q "q".mp4', "w,w"),
    "h,w\r": ("h", "w"),
    "\udcff\udcfe.mp4,x": ("\udcff\udcfe.mp4", "x"),
}
SPACE = {
    "a.mp4 x": ("a.mp4", "x"),
    "c,c.mp4   x": ("c,c.mp4", "x"),
    '"e e.mp4"  y': ("e e.mp4", "y"),
    "  f.mp4   z  ": ("f.mp4", "z"),
    'g,.mp4 "y z"': ("g,.mp4", "y z"),
    "h w\r": ("h", "w"),
}
TAB = {
    "a b.mp4\tx": ("a b.mp4", "x"),
    "c,c.mp4\ty z": ("c,c.mp4", "y z"),
    " f.mp4 \t z ": ("f.mp4", "z"),
    '"t\tt.mp4"\tw,w': ("t\tt.mp4", "w,w"),
    "h\tw\r": ("h", "w"),
    "a.mp4\t\tz": ("a.mp4", "z"),
}


@pytest.mark.parametrize("lines", [COMMA, SPACE, TAB], ids=["comma", "space", "tab"])
def test_list_forms(tmp_path, lines):
    """One separator a file; quotes, blank lines, a byte-order mark, CRLF, bytes that are no UTF-8."""
    assert read_list(tmp_path / "l.csv", lines) == [*lines.values()]
    assert read_list(tmp_path / "l.csv", ["\ufeff", *lines, " \t", ""]) == [*lines.values()]
    assert (
        read_list(tmp_path / "l.csv", ["\ufeff" + line + "\r\n" for line in lines][:1])
        == [*lines.values()][:1]
    )


def test_a_list_of_an_old_mac(tmp_path):
    """Its lines end with CR alone."""
    assert read_list(tmp_path / "l.csv", ["a.mp4,x\rb.mp4,y\r"]) == [("a.mp4", "x"), ("b.mp4", "y")]


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        # Split in two at comma and at space; but one would cut a video's name
        (["a,b.mp4 3"], [("a,b.mp4", "3")]),
        (["a b.mp4,3"], [("a b.mp4", "3")]),
        (["a b.mp4, x"], [("a b.mp4", "x")]),
        (["my clip.mp4/0.mp4,x"], [("my clip.mp4/0.mp4", "x")]),
        (["a.mp4,two words"], [("a.mp4", "two words")]),
        # What is quoted is one field, so there is one way
        (['"a",two words'], [("a", "two words")]),
        (['"a.avi b.mp4",3'], [("a.avi b.mp4", "3")]),
        # A later line tells
        (["a,two words", "b,one"], [("a", "two words"), ("b", "one")]),
        (["", "a,b 3", "c 4"], [("a,b", "3"), ("c", "4")]),
        (["a.avi b.mp4,x", "c.mp4,y"], [("a.avi b.mp4", "x"), ("c.mp4", "y")]),
        # And it holds for the rest
        (["c.mp4,x", "a b,two words"], [("c.mp4", "x"), ("a b", "two words")]),
    ],
)
def test_the_separator_is_decided_once_a_file(tmp_path, lines, rows):
    assert read_list(tmp_path / "list.csv", lines) == rows


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["", "a,two words", "b,more words"],
            ["list.csv:2: 'a,two words'", "comma", "space", "quote"],
        ),
        (["a.avi b.mp4,x"], ["list.csv:1", "comma", "space", "quote"]),
        (["a,b 3"], ["list.csv:1: 'a,b 3'", "quote"]),
        (["a.mp4,x", "b.mp4 y"], ["list.csv:2", "comma"]),
        (["a.mp4,x", "b.mp4\ty"], ["list.csv:2", "comma"]),
        (["a.mp4 x", "b.mp4,y"], ["list.csv:2", "space"]),
        (["a.mp4 x", "my b.mp4 y"], ["list.csv:2", "space"]),
        (["a.mp4\tx", "b.mp4 y"], ["list.csv:2", "tab"]),
        (["a,b.mp4 3", "c\t4"], ["list.csv:2"]),
        (["a.mp4,1", "a,b.mp4 3"], ["list.csv:2", "'b.mp4 3'"]),
        (["my a.mp4", "my b.mp4"], ["list.csv:1", "'a.mp4'"]),  # no label
        (["my a.mp4;3", "my b.mp4;3"], ["list.csv:1", "'a.mp4;3'"]),
        (["3,a.mp4", "4,b.mp4"], ["list.csv:1", "'a.mp4'"]),
        (["path,label", "a.mp4,x"], ["list.csv:1", "header", "'path'"]),
        (["video,Class", "a,x"], ["list.csv:1", "header"]),
        (["", "file_name activity", "a.mp4 3"], ["list.csv:2", "header", "'activity'"]),
        (["youtube_id\ttarget", "a b.avi\tx"], ["list.csv:1", "header"]),
        (["folder,class_id", "abc,0", "def,1"], ["list.csv:1", "header", "'class_id'"]),
        (["video label_id", "abc 0"], ["list.csv:1", "header", "'label_id'"]),
        (["label,youtube_id,time_start,time_end,split", "x,y,1,2,train"], ["list.csv:1"]),
        (["a.mp4 30 4", "b.mp4 30 5"], ["list.csv:1"]),
    ],
)
def test_what_is_ambiguous_or_another_table_is_refused(tmp_path, lines, words):
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "list.csv", lines)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), (
        error.value
    )


@pytest.mark.parametrize(
    "lines", [["P01 0", "x.mp4 1"], ["v.none 0", "w.mp4 1"], ["P01 cut", "P02 cut", "P03 7"]]
)
def test_folders_of_chunks_are_no_header(tmp_path, lines):
    assert read_list(tmp_path / "list.csv", lines) == [tuple(line.split()) for line in lines]


def test_frames_of_a_whole_video_cannot_be_sampled_from_chunks(chunks):
    """A list of labels, whose clips have no times, that names a folder of chunks: one line that says what to do."""
    with data.open_video(chunks / "whole.mp4") as video:
        for sample in (data.fps_frames, data.span_frames):
            with pytest.raises(data.VideoError, match="a folder of chunks.*list its files"):
                sample(video, 2, 5, 0.5) if sample is data.fps_frames else sample(
                    video, 2, (0.5, 0.5)
                )


def test_no_loader_process_needs_no_temporary_folder(toy, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plain_plan, 32, seed=0, replace=True
    )
    assert next(data.make_loader(dataset, [[(0, 3)]], 0, CPU)).index.tolist() == [3]


def test_a_class_may_be_called_label(tmp_path):
    assert read_list(tmp_path / "l.csv", ["a.mp4,label", "b.mp4,class"]) == [
        ("a.mp4", "label"),
        ("b.mp4", "class"),
    ]


@pytest.mark.parametrize(
    "line", ["a.mp4", "a b c", "a.mp4,", ",x", '"a.mp4,x', "a, b, c", '"" x', '"a.mp4"b x']
)
def test_bad_lines_are_named(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"a.mp4 x\n\n{line}\n")
    with pytest.raises(UserError, match=r"list.csv:3: .*path,label"):
        data.VideoList(tmp_path / "list.csv")


def test_a_wrong_label_is_named_with_its_first_line(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4 x\nb.mp4 q\nc.mp4 q\nd.mp4 r\n")
    with pytest.raises(
        UserError, match=r"list.csv:2: label 'q' is not one of the 2 classes \(x, y\)"
    ):
        data.VideoList(tmp_path / "list.csv", classes=["x", "y"])


def rss():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_of_large_lists(tmp_path):
    """Under 200 bytes an entry, of which a path or a caption of 40 to 60 are its own; what goes in comes out."""
    n = 500_000
    with open(tmp_path / "list.csv", "w") as file:
        file.writelines(
            f"folder_{i % 400:03d}/video_{i:08d}_000123.mp4,{i % 400}\n" for i in range(n)
        )
    rows = (
        (
            f"{i // 100:032x}.mp4",
            i * 0.5,
            i * 0.5 + 3,
            f"#C C picks up the {i}th thing from the table",
        )
        for i in range(n)
    )
    before = rss()
    videos = data.VideoList(tmp_path / "list.csv")
    middle = rss()
    captions = data.Captions(rows, "ego4d")
    assert middle - before < 100 * n and rss() - middle < 150 * n
    for i in (0, 1, 123_456, n - 1):
        assert (
            videos.video(i) == f"folder_{i % 400:03d}/video_{i:08d}_000123.mp4"
            and videos.labels[i] == i % 400
        )
        assert (
            captions.video(i) == f"ego4d/{i // 100:032x}.mp4"
            and captions.text(i).split()[5] == f"{i}th"
        )
        assert (captions.start[i], captions.end[i]) == (i * 0.5, i * 0.5 + 3)


def test_rephrasings():
    captions = data.Captions(
        [("v", 0, 1, ["a", "b", "c"]), ("w", 2, 3, "d"), ("v", 4, 5, ["ü", ""])]
    )
    assert [captions.text(0, u) for u in (0, 0.34, 0.99)] == ["a", "b", "c"]
    assert (captions.text(1, 0.9), captions.text(2), captions.text(2, 0.5)) == ("d", "ü", "")
    assert [captions.video(i) for i in range(3)] == ["v", "w", "v"] and len(captions) == 3


# ---- The loader ------------------------------------------------------------------------------------------------------


def plain_plan(video, index, view, key):
    return data.stride_frames(video.info, 2, 2, uniform(key, "start").item()), data.random_box(
        video.info, key, 0.5
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_views(toy, workers):
    """Every video of a batch gives `views` different clips, each of its own key, those that `mix` pairs of different
    videos, whatever the micro-batch; each clip is what its key asks for."""
    videos = data.VideoList(toy / "train.csv", toy)
    dataset = data.ClipDataset(videos, plain_plan, 32, seed=3, replace=True, views=3)
    whole, halves = (
        list(data.make_loader(dataset, data.global_batches(16, 8, micro, 3, 0, 2), workers, CPU))
        for micro in (8, 4)
    )
    for batch in whole:
        assert (
            batch.clips.shape == (24, 2, 3, 32, 32) and len(batch.labels) == len(batch.index) == 24
        )
        assert len(set(batch.keys.tolist())) == 24 and sorted(batch.index.tolist()) == sorted(
            [*{*batch.index.tolist()}] * 3
        )
        assert (batch.index[::2] != batch.index[1::2]).all()
        for clip, label, key, i in zip(*batch[:4], strict=True):
            with data.Video(videos.video(i)) as video:
                frames, box = plain_plan(video, i, 0, key)
                assert torch.equal(clip, video.read(frames, 32, box)) and label == videos.labels[i]
    pairs = lambda batches: {
        tuple(pair) for b in batches for pair in b.keys.reshape(-1, 2).tolist()
    }
    assert pairs(whole) == pairs(halves) and len(halves) == 4


def test_captions_load_from_chunks(chunks):
    """Captioned segments of a chunked video, with a jitter and a box of their own, through the loader."""
    captions = data.Captions([("whole.mp4", s, s + 2.0, str(s)) for s in range(0, 24, 3)], chunks)

    def plan(video, index, view, key):
        jitter = uniform(key, "jitter", 4)
        return data.between_frames(
            video, captions.start[index], captions.end[index], 4, jitter
        ), None

    dataset = data.ClipDataset(captions, plan, 64, seed=0, replace=False)
    batches = list(data.make_loader(dataset, data.every_sample(8, 4), 1, CPU))
    for batch in batches:
        for clip, i in zip(batch.clips, batch.index.tolist(), strict=True):
            numbers = read_numbers(clip)
            assert all(15 * t <= n - 90 * i < 15 * (t + 1) for t, n in enumerate(numbers)), (
                i,
                numbers,
            )
    assert [i for b in batches for i in b.index.tolist()] == [*range(8)] and not any(
        b.failures for b in batches
    )


def endless(dataset, workers):
    return data.make_loader(dataset, [[(0, i % 16)] for i in range(1000)], workers, CPU)


def at_video_5(act):
    def plan(video, index, view, key):
        if index == 5:
            act()
        return [0], None

    return plan


@pytest.mark.parametrize("name", ["killed", "hangs"])
def test_a_worker_that_dies_or_hangs_is_named(toy, name, monkeypatch):
    """In bounded time, with the video it was at; not even one that takes no signal is left behind."""
    monkeypatch.setattr(data, "LOADER_PATIENCE", 1.5)

    def hang():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        time.sleep(600)

    act = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": hang}[name]
    videos = data.VideoList(toy / "train.csv", toy)
    dataset = data.ClipDataset(videos, at_video_5(act), 32, seed=0, replace=True)
    began, seen = time.monotonic(), 0
    with pytest.raises(
        UserError,
        match=f"loader process (died; it was at|has been busy.* with) {videos.video(5)}.*last checkpoint",
    ):
        for _ in endless(dataset, 2):
            seen += 1
    assert seen <= 5 and time.monotonic() - began < 15
    pids = [int(pid) for pid in dataset.watch[:, 0].tolist()]
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_workers_live_across_epochs(toy):
    """The same two processes from the first batch to the last of three epochs, and none left afterwards."""
    videos = data.VideoList(toy / "train.csv", toy)
    dataset, pids = data.ClipDataset(videos, plain_plan, 32, seed=0, replace=True), set()
    for _ in data.make_loader(dataset, data.global_batches(16, 8, 8, 0, 0, 6), 2, CPU):
        pids.add(tuple(dataset.watch[:, 0].tolist()))
    both = {pid for row in pids for pid in row if pid}
    assert len(both) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid:.0f}") for pid in both) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid:.0f}") for pid in both)


def test_pieces_of_a_micro_batch():
    """At most 16 clips and 40 MB each, of about equal length, in order; a video's views stay together."""

    def lengths(n, size=224, **options):
        batch = [(0, i) for i in range(n)]
        pieces = data.ClipDataset((), None, size, 0, replace=True, **options).pieces(batch)
        assert [item for piece in pieces for item in piece] == batch
        return [len(piece) for piece in pieces]

    assert lengths(16) == [16] and lengths(1) == [1]
    assert sorted(lengths(40)) == [13, 13, 14] and lengths(64) == [16] * 4
    assert lengths(6, views=4) == [3, 3] and lengths(2, views=15) == [1, 1]
    assert lengths(2, views=100) == [1, 1]
    assert lengths(8, frames=128) == [2] * 4  # of 19 MB
    assert lengths(3, size=(720, 1280), frames=64) == [1] * 3  # of 177 MB


@pytest.mark.parametrize("replace", [True, False])
def test_a_batch_is_the_same_in_pieces(toy, replace, tmp_path, monkeypatch):
    """Clips, labels, keys, places and failures, in their order, where several videos, and all of a piece, can't be
    read."""
    lines = (toy / "train.csv").read_text().splitlines()
    for i in (1, 6, 7, 8, 9):
        lines[i] = f"gone_{i}.mp4,left"
    (tmp_path / "list.csv").write_text("\n".join(lines))
    videos = data.VideoList(tmp_path / "list.csv", toy)
    dataset = data.ClipDataset(videos, plain_plan, 32, seed=3, replace=replace, views=2)
    order = [(2, i) for i in range(16)]
    lists = [order[:14], order[14:], order[6:10], order[3:6]]
    whole = list(data.make_loader(dataset, lists, 0, CPU))
    monkeypatch.setattr(data, "PIECE_CLIPS", 4)
    assert [len(piece) for piece in dataset.pieces(lists[0])] == [2] * 7
    parts = list(data.make_loader(dataset, iter(lists), 2, CPU))
    assert len(parts) == len(whole) == 4
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a.failures == b.failures
    assert len(whole[0].labels) == (28 if replace else 18) and len(whole[0].failures) >= 5


def test_what_waits_is_bounded_by_the_processes(toy):
    """However large the micro-batch: 4 pieces of 16 clips a process beyond what was handed over."""
    videos = data.VideoList(toy / "train.csv", toy)
    count = torch.zeros(2, dtype=torch.int64).share_memory_()

    def plan(video, index, view, key):
        count[torch.utils.data.get_worker_info().id] += 1
        return [0], None

    dataset = data.ClipDataset(videos, plan, 32, seed=0, replace=True)
    batches = data.make_loader(dataset, [[(0, i % 16) for i in range(96)]] * 20, 2, CPU)
    next(batches)
    wanted = 96 + 2 * 4 * 16
    deadline = time.monotonic() + 30
    while count.sum() < wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)  # for more than that to come
    assert count.sum() == wanted


def test_only_the_loader_counts_as_waiting(toy):
    """Not the augmentation, which sees every batch on its device, once and in order."""
    seen = []

    def plan(video, index, view, key):
        time.sleep(0.05)
        return [0], None

    def augment(clips, keys):
        time.sleep(0.2)
        seen.append(keys.tolist())
        return clips + 1

    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plan, 32, seed=0, replace=True
    )
    lists = [[(0, i), (0, i + 1)] for i in range(0, 16, 2)]
    plain = list(data.make_loader(dataset, lists, 0, CPU))
    changed = list(data.make_loader(dataset, lists, 0, CPU, augment))
    assert seen == [batch.keys.tolist() for batch in plain]
    assert all(torch.equal(a.clips + 1, b.clips) for a, b in zip(plain, changed, strict=True))
    assert all(batch.waited >= 0.1 for batch in changed)
    assert (
        sorted(batch.waited for batch in changed)[4] < 0.2
    )  # a busy machine may be late now and then


def test_copies_run_one_batch_ahead(monkeypatch):
    """On a fake device: every batch comes once, in order, its copy waited for, and the next copy already begun."""
    events = []

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def record_event(self):
            number = sum(kind == "copy" for kind, _ in events)
            return SimpleNamespace(wait=lambda stream: events.append(("wait", number)))

    def copies():
        for number in (1, 2, 3):
            events.append(("copy", number))
            yield data.Batch(
                torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.tensor(number), []
            )

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for batch in data._ahead(copies(), CPU):
        events.append(("step", int(batch.index)))
    order = "copy 1, copy 2, wait 1, step 1, copy 3, wait 2, step 2, wait 3, step 3"
    assert ", ".join(f"{kind} {n}" for kind, n in events) == order


def test_a_slow_step_or_idle_workers_are_no_hang(toy, monkeypatch):
    monkeypatch.setattr(data, "LOADER_PATIENCE", 0.5)
    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plain_plan, 32, seed=0, replace=True
    )
    batches = endless(dataset, 1)
    for _ in range(3):
        next(batches)
        time.sleep(1.2)


def test_an_error_in_a_plan_is_not_hidden(toy):
    def plan(video, index, view, key):
        raise RuntimeError("a mistake in the plan")

    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plan, 32, seed=0, replace=True
    )
    with pytest.raises(RuntimeError, match="a mistake in the plan"):
        next(endless(dataset, 1))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_does_not_grow_over_10_000_clips(toy):
    """After a warm-up of 1,000 clips, 9,000 more take no more than 8 MiB, in the worker and in the trainer."""
    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plain_plan, 32, seed=0, replace=True, views=8
    )
    batches = data.make_loader(
        dataset, [[(epoch, i) for i in range(10)] for epoch in range(200)], 1, CPU
    )
    sizes = []
    for n in range(125):  # of 80 clips
        next(batches)
        if n in (12, 124):
            worker = int(dataset.watch[0, 0])
            with open(f"/proc/{worker}/statm") as file:
                sizes.append((rss(), int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
    assert all(after - before < 8 << 20 for before, after in zip(*sizes, strict=True)), sizes


def test_a_list_of_which_2_percent_are_bad_stops(toy, cli, tmp_path):
    """The count, the first names and the flag to raise; with the flag it goes on, counting them."""
    lines = (toy / "train.csv").read_text().splitlines() * 13
    for n in range(0, 200, 50):
        lines[n] = f"gone_{n}.mp4,left"
    (tmp_path / "list.csv").write_text("\n".join(lines[:200]))
    args = [
        "turbo.py",
        "--train-list",
        tmp_path / "list.csv",
        "--val-list",
        toy / "val.csv",
        "--data-root",
        toy,
    ]
    args += ["--batch-size", 8, "--epochs", 1, "--workers", 2, "--size", 32, "--frames", 4]
    code, _, err = cli(*args, "--out", tmp_path / "a")
    assert code == 1 and "--max-bad" in err and "Traceback" not in err
    assert "4 videos could not be read" in err and all(
        f"gone_{n}.mp4" in err for n in range(0, 200, 50)
    )
    code, out, err = cli(*args, "--out", tmp_path / "b", "--max-bad", 0.03)
    assert code == 0 and (out + err).count("unreadable, replaced by another") == 4, out + err


def test_cores_for_a_gpu(capsys, monkeypatch):
    """1,000 clips a second at 20 ms each are 20 cores; two clips of a decode share its 20 ms; between lengths it is
    linear; a toy has no line."""
    monkeypatch.setattr(data, "READING_MS", {2: (10, 5, 100), 16: (20, 10, 200)})
    gmacs = 0.35 * 989e12 / 2e9 / 1000
    data.print_cores([(16, gmacs, 1), (9, gmacs, 1), (16, gmacs, 2), (16, 0.5, 1)])
    line, advice = capsys.readouterr().out.splitlines()
    cells = [
        f"{cores} for 1000 clips/s of {n} frames"
        for cores, n in (("20 (200)", 16), ("15 (150)", 9), ("15 (105)", 16))
    ]
    assert line.endswith("; ".join(cells).replace("20 (200)", "estimates: 20 (200)", 1))
    assert "--repeated" in advice and "data.py chunk" in advice and "--stages" in advice
    data.print_cores([(16, 0.5, 1)])
    assert capsys.readouterr().out == ""
