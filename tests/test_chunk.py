"""`data.py chunk`: which frames a chunk holds and when, what they look like, kills, refusals, failures; and Eq. 3."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import command

import data
from common import UserError

N, W, H = 75, 96, 64
QUICK = {"seconds": 1, "short_side": 48, "workers": 2}


def picture(i, w=W, h=H):
    """uint8 [h, w, 3]: its number i in binary as 8 grey blocks on the left, so that a frame tells who it is; the rest
    is smooth, with another colour in each quarter."""
    y, x = np.mgrid[0:h, 0:w] / max(w, h)  # [h, w] each
    image = np.stack([60 + 120 * x, 190 - 150 * y, 90 + 60 * x + 60 * y], -1)  # [h, w, 3]
    for bit in range(8):
        image[bit * h // 8 : (bit + 1) * h // 8, : w // 3] = 200 if i >> bit & 1 else 40
    return image.astype(np.uint8)


def number(clip):
    """The number that each frame of a clip [T, 3, h, w] shows."""
    h, w = clip.shape[2:]
    blocks = torch.stack(
        [clip[:, 0, (2 * bit + 1) * h // 16, w // 6] for bit in range(8)], -1
    )  # [T, 8]
    return [sum(1 << bit for bit in range(8) if row[bit] > 120) for row in blocks.tolist()]


def make(
    path,
    n=N,
    w=W,
    h=H,
    pix="yuv420p",
    pts=None,
    turn=None,
    tags=(),
    codec="libx264",
    sound=False,
    **options,
):
    """Write a video at 25 frames a second, or at the given times in 1/1000 s."""
    with av.open("file:" + os.fspath(path), "w") as out:
        options = (
            {"preset": "veryfast", "g": "20", "crf": "12"} | options
            if codec == "libx264"
            else options
        )
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = w, h, pix
        stream.codec_context.time_base = Fraction(1, 1000 if pts else 25)
        for name, value in dict(tags).items():
            setattr(stream.codec_context, name, value)
        if turn:
            stream.set_display_rotation(turn)
        if sound:
            audio = out.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            out.mux(audio.encode(frame))
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i, w, h), "rgb24")
            tag = dict(tags)
            frame = frame.reformat(
                format=pix,
                dst_colorspace=tag.get("colorspace"),
                dst_color_range=tag.get("color_range"),
            )
            frame.pts = pts[i] if pts else i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return Path(path)


def chunks(folder):
    """{start second: Video} of a video's folder, closed later by the garbage collector."""
    return {
        int(path.stem): data.Video(path)
        for path in sorted(folder.glob("*.mp4"), key=lambda p: int(p.stem))
    }


def assert_cut(source, folder, seconds, short_side):
    """Chunks hold the source's frames: which, when, upright, of the right size and the right colours."""
    with data.Video(source) as whole:
        info, times, tick = whole.info, whole.times, float(whole._stream.time_base)
        frames = whole.read(range(info.num_frames), (H, W))
    made = chunks(folder)
    starts = np.floor((times + tick / 4) / seconds).astype(int) * seconds
    assert list(made) == sorted(set(starts.tolist()))
    for start, video in made.items():
        mine = np.flatnonzero(starts == start)
        assert video.info.num_frames == len(mine)
        assert np.allclose(video.times, times[mine] - times[mine[0]], atol=tick)
        assert video._fast
        width, height = video.info[:2]
        assert min(width, height) == min(short_side, min(info[:2]) // 2 * 2)
        assert abs(width / height - info.width / info.height) < 2 / min(width, height)
        clip = video.read(range(len(mine)), (H, W))
        apart = (
            (clip.float()[:, None] - frames.float()).abs().mean((2, 3, 4))
        )  # [T of the chunk, T of the source]
        assert apart.argmin(1).tolist() == mine.tolist()
        assert apart.amin(1).max() < 6, "other colours"
        with av.open(str(folder / f"{start}.mp4")) as file:
            assert [stream.type for stream in file.streams] == ["video"]
            assert (file.streams[0].width, file.streams[0].height) == (width, height), (
                "rotation is applied"
            )
            assert file.streams[0].codec_context.pix_fmt in ("yuv420p", "yuvj420p")
    return made


NTSC = [round(i * 1001 / 30) for i in range(N)]
PAUSES = [
    500 + 40 * i + 5300 * (i > 20) + 2100 * (i > 50) for i in range(N)
]  # starts late, stands still twice
VFR = np.cumsum(np.random.default_rng(0).choice([20, 40, 90, 180], N)).tolist()
SOURCES = {  # name: what make() is told
    "p/P01.MP4": {"sound": True},
    "odd.mp4": {"w": 97, "h": 65, "pix": "yuv444p"},
    "b frames.mkv": {"bf": "3"},
    "vfr.mp4": {"pts": VFR},
    "ntsc.mkv": {"pts": NTSC},
    "pauses.mp4": {"pts": PAUSES},
    "stream.ts": {"pts": PAUSES},
    "rotated.mp4": {"turn": 90},
    "upside.mp4": {"turn": 180},
    "deep.mp4": {"pix": "yuv420p10le", "tags": {"colorspace": 9, "color_primaries": 9}},
    "full.mp4": {"pix": "yuvj420p", "tags": {"colorspace": 1, "color_range": 2}},
    "grey.mp4": {"pix": "gray"},
    "rgb.mp4": {"codec": "libx264rgb", "pix": "rgb24", "crf": "0"},
    "old.avi": {"codec": "mpeg4", "qmin": "2", "qmax": "4"},
    "one.mp4": {"n": 1},
    "open gop.mp4": {
        "codec": "libx265",
        "x265-params": "log-level=none:keyint=20:bframes=3:crf=12:pools=none",
    },
    "odd and small.mp4": {"w": 43, "h": 35, "pix": "yuv444p"},
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A tree of all kinds of sources, cut once."""
    root = tmp_path_factory.mktemp("chunk")
    for name, options in SOURCES.items():
        (root / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        make(root / "src" / name, **options)
    assert data.chunk_videos(root / "src", root / "dst", **QUICK) == (len(SOURCES), [])
    return root


@pytest.mark.parametrize("name", SOURCES)
def test_frames_times_colours(cut, name):
    made = assert_cut(cut / "src" / name, (cut / "dst" / name).with_suffix(".mp4"), 1, 48)
    assert len(made) == {"vfr.mp4": len(made), "one.mp4": 1, "pauses.mp4": 5, "stream.ts": 5}.get(
        name, 3
    )


@pytest.mark.parametrize("name", ["p/P01.MP4", "old.avi", "b frames.mkv", "vfr.mp4"])
def test_a_list_of_the_videos_finds_their_chunks(cut, name):
    """Lists as published name files, such as EK-100's P01/P01_01.MP4; the folder of chunks ends in .mp4."""
    rows = data.Captions([(name, 0.0, 0.5, "a text")], cut / "dst", ["list"])
    data.need_videos(rows, max_bad=0.0)
    with data.open_video(rows.video(0)) as parts:
        assert isinstance(parts, data.Chunks) and parts.path.endswith(".mp4")
    gone = data.Captions([("gone.MP4", 0.0, 0.5, "a text")], cut / "dst", ["list"])
    with pytest.raises(UserError, match="gone.MP4"):
        data.need_videos(gone, max_bad=0.0)


def shown(video, second):
    """The number that the frame at a second shows; None where there is none."""
    try:
        return number(video.read_views([(video.at([second]), (H, W), None)])[0])[0]
    except data.VideoError:
        return None


@pytest.mark.parametrize(
    "name", ["p/P01.MP4", "vfr.mp4", "ntsc.mkv", "pauses.mp4", "stream.ts", "old.avi", "one.mp4"]
)
def test_a_second_of_the_chunks_is_that_of_the_whole(cut, name):
    """Any time shows the frame that the whole video shows at it, or is an error in both."""
    n = SOURCES[name].get("n", N)
    stamps = np.array(SOURCES[name].get("pts") or range(0, 40 * n, 40)) / 1000  # [n]
    stamps -= stamps[0]
    r = np.random.default_rng(0)
    seconds = [
        -0.1,
        *r.uniform(0, stamps[-1] + 0.6, 60),
        *stamps[::5],
        *(stamps[::5] - 0.002),
        *(np.arange(5) + 1e-5),
    ]
    with (
        data.Video(cut / "src" / name) as whole,
        data.Chunks((cut / "dst" / name).with_suffix(".mp4")) as parts,
    ):
        for second in seconds:
            want = (
                max(0, sum(stamps <= second + 1e-3) - 1)
                if second < whole.info.duration + 0.25
                else None
            )
            assert shown(parts, second) == want, second
        first = np.cumsum(
            [0, *(parts._chunk(k)[0].info.num_frames for k in range(len(parts.names)))]
        )
        ticks = np.arange(-100, 1000 * whole.info.duration + 300) / 1000
        for second in [*r.uniform(-1, whole.info.duration + 1, 2000), *ticks, *whole.times]:
            assert parts.clamp(second) == whole.clamp(second)
            try:
                (want,) = whole.at([second])
            except data.VideoError:
                with pytest.raises(data.VideoError):
                    parts.at([second])
                continue
            ((k, i),) = parts.at([second])
            assert first[k] + i == want, second


def test_chunk_that_is_missing_or_changed(cut, tmp_path):
    """A frame that isn't there is an error, never the last one before it; a pause is none."""
    shutil.copytree(cut / "dst" / "pauses.mp4", tmp_path / "v")
    starts = sorted(int(path.stem) for path in (tmp_path / "v").iterdir())
    assert starts == [0, 6, 7, 9, 10]
    (tmp_path / "v" / "7.mp4").unlink()
    stamps = (np.array(PAUSES) - PAUSES[0]) / 1000
    with data.Chunks(tmp_path / "v") as parts:
        for second in (*stamps[(stamps >= 7) & (stamps < 9)], 8.5):
            with pytest.raises(data.VideoError, match="no chunk holds second"):
                parts.at([second])
        assert [shown(parts, second) for second in (0.9, 4, 6.1)] == [20, 20, 20]
    with av.open(str(tmp_path / "v" / "9.mp4")) as file:
        tags = dict(file.metadata)
    make(tmp_path / "new.mp4", n=3)
    with av.open(str(tmp_path / "new.mp4")) as a:
        path = tmp_path / "v" / "9.mp4"
        with av.open(str(path), "w", options={"movflags": "use_metadata_tags"}) as b:
            b.metadata.update(tags)
            copy = b.add_stream_from_template(a.streams.video[0], opaque=True)
            for packet in a.demux(video=0):
                if packet.size:
                    packet.stream = copy
                    b.mux(packet)
    with (
        data.Chunks(tmp_path / "v") as parts,
        pytest.raises(data.VideoError, match="9.mp4: .*cut it again"),
    ):
        parts.at([9.5])


def test_chunks_of_others(tmp_path):
    """They tell nothing of the whole video: the first frame is at the start that the name says."""
    folder = tmp_path / "v"
    folder.mkdir()
    for start in (0, 3):
        make(folder / f"{start}.mp4", pts=[40 * i + 500 for i in range(N)])
    with data.Chunks(folder) as parts:
        seconds = [0, 0.05, 2.99, 3.1, 3, 3.05, 5.9]
        want = [(0, 0), (0, 1), (0, 74), (1, 2), (1, 0), (1, 1), (1, 72)]
        assert parts.at(seconds) == want
        assert parts.clamp(7) == 6
        for second in (6.3, 100):
            with pytest.raises(data.VideoError, match="no chunk holds second"):
                parts.at([second])
    (folder / "0.mp4").rename(folder / "10.mp4")
    with data.Chunks(folder) as parts:
        for second in (0, 2.9, 6.3):
            with pytest.raises(data.VideoError, match="no chunk holds second"):
                parts.at([second])


def test_tags(cut):
    for name, want in (("deep", (9, 1)), ("full", (1, 2)), ("p/P01", (2, 1)), ("rgb", (6, 2))):
        with av.open(str(cut / "dst" / f"{name}.mp4" / "0.mp4")) as file:
            frame = next(file.decode(video=0))
        assert frame.colorspace == want[0]
        assert (frame.color_range == 2) == (want[1] == 2)


def test_layout(cut):
    assert {path.relative_to(cut / "dst").as_posix() for path in (cut / "dst" / "p").rglob("*")} == {
        "p/P01.mp4", "p/P01.mp4/0.mp4", "p/P01.mp4/1.mp4", "p/P01.mp4/2.mp4"
    }  # fmt: skip
    assert [p.name for p in (cut / "dst").rglob(".*")] == [".lock"]


def test_settings_and_targets(cut, tmp_path):
    for change in ({"seconds": 2}, {"short_side": 32}, {"encoding": "x264"}, {"crf": 30}):
        with pytest.raises(UserError, match="--seconds 1 --short-side 48 --encoding fast"):
            data.chunk_videos(cut / "src", cut / "dst", **(QUICK | change))
    with pytest.raises(UserError, match="outside"):
        data.chunk_videos(cut / "src", cut / "src" / "chunks", **QUICK)
    with pytest.raises(UserError, match="no video"):
        data.chunk_videos(tmp_path, cut / "dst", **QUICK)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").touch()
    with pytest.raises(UserError, match="another folder"):
        data.chunk_videos(cut / "src", tmp_path / "d", **QUICK)


def test_which_files_are_cut(tmp_path, cli):
    """Other containers of video, once each in spite of a link in a ring; what is left out is counted and named."""
    src = tmp_path / "src"
    src.mkdir()
    for name in ("a.mts", "b.gif", "c.vob"):
        codec = {"b.gif": ("gif", "rgb8"), "c.vob": ("mpeg2video", "yuv420p")}.get(
            name, ("libx264", "yuv420p")
        )
        make(src / name, n=10, codec=codec[0], pix=codec[1])
    (src / "notes.txt").touch()
    (src / "up").symlink_to(src)
    code, out, err = cli("data.py", "chunk", src, tmp_path / "dst")
    assert (code, out.splitlines()) == (0, [f"3 of 3 videos are in {tmp_path / 'dst'}"])
    assert sorted(path.name for path in (tmp_path / "dst").glob("*.mp4")) == [
        "a.mp4",
        "b.mp4",
        "c.mp4",
    ]
    for note in ("1 .txt (notes.txt)", "1 folder visited by another name (up)"):
        assert note in err


def test_a_target_that_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    make(tmp_path / "src.mp4", n=3)
    (tmp_path / "src").mkdir()
    (tmp_path / "src.mp4").rename(tmp_path / "src" / "a.mp4")
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "_chunk_video", lambda *_: pytest.fail("it began to cut"))
    for target in ("file", "file/dst"):
        monkeypatch.setattr(
            sys, "argv", ["data.py", "chunk", str(tmp_path / "src"), str(tmp_path / target)]
        )
        with pytest.raises(UserError, match="file"):
            data.main()


def test_same_stem(tmp_path):
    for name in ("a.mp4", "a.avi"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).touch()
    with pytest.raises(UserError, match=r"a\.avi and .*a\.mp4 would have the same chunks"):
        data.chunk_videos(tmp_path / "src", tmp_path / "dst")


def test_raw_names(tmp_path):
    folder = tmp_path / os.fsdecode(b"a folder, caf\xe9")
    folder.mkdir()
    make(folder / "50%d: x.mp4", n=5)
    assert data.chunk_videos(tmp_path, tmp_path.with_name(tmp_path.name + "-out"), **QUICK) == (
        1,
        [],
    )
    out = tmp_path.with_name(tmp_path.name + "-out") / folder.name
    assert [path.name for path in out.iterdir()] == ["50%d: x.mp4"]
    assert chunks(out / "50%d: x.mp4")[0].info.num_frames == 5


def test_failures_at_the_end(tmp_path, cli):
    """Damaged videos are named, leave nothing behind, and the others are cut; mended, they are cut the next time."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    good = make(src / "b.mp4").read_bytes()
    (src / "a.mp4").write_bytes(good[: len(good) // 2])
    middle = len(good) // 2
    (src / "c.mp4").write_bytes(good[:middle] + bytes(400) + good[middle + 400 :])
    (src / "gone.mp4").symlink_to("nowhere")
    command = ["data.py", "chunk", src, dst, "--seconds", "1"]
    code, out, err = cli(*command)
    assert (code, "Traceback" in err) == (1, False)
    assert "1 of 4 videos are in" in out
    assert [line.split(":")[0] for line in out.splitlines()[:3]] == [
        str(src / f"{n}.mp4") for n in ("a", "c", "gone")
    ]
    assert sorted(p.name for p in dst.iterdir()) == [".lock", "b.mp4", "chunks.json"]
    for name in ("a", "c"):
        (src / f"{name}.mp4").write_bytes(good)
    (src / "gone.mp4").unlink()
    assert data.chunk_videos(src, dst, seconds=1) == (3, [])
    assert sorted(p.name for p in dst.iterdir()) == [
        ".lock",
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "chunks.json",
    ]


def test_encoder_refuses(tmp_path, monkeypatch):
    """A video that x264 can't encode is one that fails, and the others go on."""
    for name in "ab":
        (tmp_path / "src").mkdir(exist_ok=True)
        make(tmp_path / "src" / f"{name}.mp4", n=5)
    monkeypatch.setitem(data.ENCODINGS, "fast", {"crf": "20", "profile": "none such"})
    n, failures = data.chunk_videos(tmp_path / "src", tmp_path / "dst")
    assert (n, ["can't be encoded" in str(error) for error in failures]) == (2, [True, True])
    assert not list((tmp_path / "dst").glob("*.mp4"))


def start(src, dst, until):
    """Start the real command, and wait until a chunk is there."""
    flags = ["--seconds", 1, "--workers", 1, "--crf", 10]
    process = command("data.py", "chunk", src, dst, *flags)
    deadline = time.monotonic() + 60
    while not list(dst.rglob(until)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resume(tmp_path, number):
    """Killed in a video, then again started: chunks that were whole are kept, half ones replaced, all in order."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    source = make(src / "v.mp4", n=250, w=640, h=360, preset="ultrafast")
    process = start(src, dst, "2.mp4")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in err
    part = dst / ".v.mp4.part"
    assert not (dst / "v.mp4").exists(), "a video is there before its chunks are"
    kept = {path: path.stat().st_mtime_ns for path in part.glob("[0-9]*.mp4")}
    assert 3 <= len(kept) < 10
    half = max(kept, key=lambda path: int(path.stem))
    half.write_bytes(half.read_bytes()[:-500])  # as a power cut may leave it
    again = lambda: data.chunk_videos(src, dst, seconds=1, crf=10)
    assert again() == (1, [])
    made = {int(path.stem): path for path in (dst / "v.mp4").iterdir()}
    assert sorted(made) == list(range(10))
    for path, then in kept.items():
        assert (made[int(path.stem)].stat().st_mtime_ns == then) == (path != half)
    for second, path in made.items():
        with data.Video(path) as video, data.Video(source) as whole:
            assert number_of(video) == number_of(whole, range(25 * second, 25 * second + 25))
    assert not part.exists()
    before = {path: path.stat().st_mtime_ns for path in made.values()}
    assert again() == (1, [])
    assert before == {path: path.stat().st_mtime_ns for path in made.values()}


def number_of(video, frames=range(25)):
    return number(video.read(frames, (H, W)))


def test_full_disk_stops_the_run(tmp_path, monkeypatch):
    """What isn't the fault of one video ends the run with one line, and the next run goes on."""
    for name in "abc":
        (tmp_path / "src").mkdir(exist_ok=True)
        make(tmp_path / "src" / f"{name}.mp4")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(
        sys, "argv", ["data.py", "chunk", f"{tmp_path}/src", f"{tmp_path}/dst", "--workers=2"]
    )
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (2000, limit[1])
        )  # bytes a file: stands for a full disk
        with pytest.raises(UserError, match="File too large"):
            data.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "dst").glob("*.mp4"))
    assert data.chunk_videos(tmp_path / "src", tmp_path / "dst") == (3, [])


def test_encodings_decode_less(tmp_path):
    """All B-frames of the training encodings are such that nothing refers to them, and keyframes are near."""
    make(tmp_path / "v.mp4", n=150)
    for name in ("fast", "fastest"):
        data.chunk_videos(tmp_path, tmp_path.with_name(tmp_path.name + name), encoding=name)
        with data.Video(tmp_path.with_name(tmp_path.name + name) / "v.mp4" / "0.mp4") as video:
            assert len(video._starts) >= 150 // 60
            droppable = [data._droppable(packet, "h264", 4) for packet in video._packets]
        assert np.mean(droppable) > 0.8


def test_plan(monkeypatch, capsys):
    """AVION's own values (Sec. 4.3) give the 16 s that it rounds to; and a hand-worked one."""
    assert data.largest_chunk(1024, 1, 500, 4) == 15.625
    assert data.largest_chunk(256, 2, 80, 1.5) == 80e6 * 8 * 1.5 / (256 * 2e6)
    for flags, seconds in (
        ((), "15.6"),
        (("--batch-size=256", "--mbps=2", "--disk=80", "--step-seconds=1.5"), "1.9"),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", "chunk", "--plan", *flags])
        data.main()
        assert f"up to {seconds} s" in capsys.readouterr().out


def test_record(cut):
    record = json.loads((cut / "dst" / "chunks.json").read_text())
    assert record["seconds"] == 1
    assert record["crf"] == data.ENCODINGS["fast"]["crf"]


def test_large_videos_are_read_again(cut, tmp_path, monkeypatch):
    """Packets of a video above KEEP_BYTES aren't kept in memory."""
    (tmp_path / "src").mkdir()
    for name in ("b frames.mkv", "p/P01.MP4", "old.avi", "open gop.mp4"):
        (tmp_path / "src" / Path(name).name).symlink_to(cut / "src" / name)
    monkeypatch.setattr(data, "KEEP_BYTES", 4000)
    assert data.chunk_videos(tmp_path / "src", tmp_path / "dst", **QUICK) == (4, [])
    for source in (tmp_path / "src").iterdir():
        assert_cut(source, (tmp_path / "dst" / source.name).with_suffix(".mp4"), 1, 48)


def test_each_frame_once():
    """A video whose packets lied is decoded from its beginning again: what came out before doesn't come twice."""

    class Again:
        path, info = "v.mp4", data.VideoInfo(8, 8, 25.0, 4, 0.16, 0, "h264")

        def __init__(self, indices):
            self._frames = lambda wanted: ((i, f"frame {i}") for i in indices)

    assert [i for i, _ in data._in_order(Again([0, 1, 0, 1, 2, 3]))] == [0, 1, 2, 3]
    with pytest.raises(data.VideoError, match="3 of its 4 frames"):
        list(data._in_order(Again([0, 1, 3, 2])))
