"""`data.py list` on a small source in each published form, read back with VideoList; and `data.py check`.

The sources follow the published files in every detail that a parser can stumble over: endings, headers, quotes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from common import UserError


def make(path, n=30, audio=False):
    """A small video, or a file of sound alone."""
    with av.open(os.fspath(path), "w") as out:
        if audio:
            stream = out.add_stream("aac", rate=16000)
            frames = [av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")]
            frames[0].sample_rate = 16000
        else:
            stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast", "g": "10"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            frames = [
                av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i % 256, np.uint8), "rgb24")
                for i in range(n)
            ]
        for frame in frames:
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def read(tmp_path, out, classes=None):
    """The printed list, as a trainer reads it: VideoList, and [(path, class)]."""
    (tmp_path / "list.csv").write_bytes(
        out if isinstance(out, bytes) else out.encode("utf-8", "surrogateescape")
    )
    videos = data.VideoList(tmp_path / "list.csv", classes=classes)
    return videos, [(videos.video(i), videos.classes[videos.labels[i]]) for i in range(len(videos))]


def listed(tmp_path, capsys, monkeypatch, *args, classes=None):
    """What `data.py list *args` prints, read back."""
    monkeypatch.setattr(sys, "argv", ["data.py", "list", *map(str, args)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    data.main()
    return read(tmp_path, capsys.readouterr().out, classes)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    return lambda *args, **options: listed(tmp_path, capsys, monkeypatch, *args, **options)


def test_ucf101(tmp_path, run):
    (tmp_path / "classInd.txt").write_text(
        "1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n3 Archery\r\n\r\n", newline=""
    )
    train = tmp_path / "trainlist01.txt"
    train.write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nArchery/v_Archery_g08_c01.avi 3\r\n",
        newline="",
    )
    (tmp_path / "testlist01.txt").write_text("ApplyLipstick/v_ApplyLipstick_g01_c01.avi\n")
    videos, rows = run("ucf101", train)
    assert rows == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "0"),
        ("Archery/v_Archery_g08_c01.avi", "2"),
    ]
    _, rows = run("ucf101", tmp_path / "testlist01.txt", classes=videos.classes)
    assert rows == [("ApplyLipstick/v_ApplyLipstick_g01_c01.avi", "1")]


def test_hmdb51(tmp_path, run):
    for fold, uses in ((1, "102"), (2, "210")):
        for name in ("brush_hair", "wave"):
            lines = [f"clip{i}_#1&(x).avi {use} \n" for i, use in enumerate(uses)]
            (tmp_path / f"{name}_test_split{fold}.txt").write_text("".join(lines))
    _, rows = run("hmdb51", tmp_path, "--split", "train")
    assert rows == [
        ("brush_hair/clip0_#1&(x).avi", "brush_hair"),
        ("wave/clip0_#1&(x).avi", "wave"),
    ]
    assert run("hmdb51", tmp_path, "--split", "test")[1][1] == ("wave/clip2_#1&(x).avi", "wave")
    assert run("hmdb51", tmp_path, "--split", "train", "--fold", 2)[1][1] == (
        "wave/clip1_#1&(x).avi",
        "wave",
    )


def test_kinetics(tmp_path, run):
    source = tmp_path / "train.csv"
    source.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "testifying,---QUuC4vJs,84,94,train\n"
        '"cooking, on campfire",-0abc,3.0,13.0,train\n'
        "riding bike,zz_9,1200,1210,train\n"
        'massaging person\'s head,"a",0,10,train\n'
    )
    videos, rows = run("kinetics", source)
    assert rows == [
        ("testifying/---QUuC4vJs_000084_000094.mp4", "testifying"),
        ("cooking,_on_campfire/-0abc_000003_000013.mp4", "cooking, on campfire"),
        ("riding_bike/zz_9_001200_001210.mp4", "riding bike"),
        ("massaging_person's_head/a_000000_000010.mp4", "massaging person's head"),
    ]
    assert videos.classes == sorted(label for _, label in rows)


@pytest.mark.parametrize("form", ["ssv2", "something-else"])
def test_ssv2(tmp_path, run, form):
    labels = {
        "Approaching something with your camera": "0",
        "Putting number of something onto something": "1",
    }
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(labels))
    entry = {
        "id": "78687",
        "label": "putting 2 cups onto a table",
        "placeholders": ["2", "cups", "a table"],
    }
    entry["template"] = "Putting [number of] [something] onto [something]"
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    assert run(form, tmp_path / "train.json")[1] == [("78687.webm", "1")]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "val.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"labels\.json.*--labels"):
        run(form, tmp_path / "sub" / "val.json")
    index = tmp_path / "something-something-v2-labels.json"
    assert run(form, tmp_path / "sub" / "val.json", "--labels", index)[1] == [("78687.webm", "1")]


def test_moments(tmp_path, run):
    (tmp_path / "moments_categories.txt").write_text("clapping,4\nadult+female+singing,17\n")
    (tmp_path / "trainingSet.csv").write_text(
        "clapping/abc.mp4,clapping,4,0\nadult+female+singing/x_1.mp4,y,3,1\n"
    )
    rows = run("moments", tmp_path / "trainingSet.csv")[1]
    assert rows == [("clapping/abc.mp4", "4"), ("adult+female+singing/x_1.mp4", "17")]


def test_coin(tmp_path, run):
    entry = {
        "duration": 131.03,
        "class": "ReplaceCDDriveWithSSD",
        "video_url": "",
        "start": 56.6,
        "end": 85.7,
    }
    entry["annotation"] = [
        {"id": "212", "segment": [60.0, 69.0], "label": "take out the laptop CD drive"}
    ]
    database = {"LtRSn-ntcLY": entry | {"subset": "training", "recipe_type": 131}}
    database["-a_b"] = entry | {"subset": "testing", "recipe_type": 2}
    (tmp_path / "COIN.json").write_text(json.dumps({"database": database}))
    assert run("coin", tmp_path / "COIN.json", "--split", "train")[1] == [
        ("LtRSn-ntcLY.mp4", "131")
    ]
    assert run("coin", tmp_path / "COIN.json", "--split", "val")[1] == [("-a_b.mp4", "2")]


def test_breakfast(tmp_path, run):
    names = [
        "P03/cam01/P03_coffee.avi",
        "P16/stereo/P16_friedegg_ch0.avi",
        "P16/stereo/P16_friedegg_ch1.avi",
    ]
    names += ["P54/webcam02/P54_juice.avi", "P54/webcam02/P54_juice.avi.labels"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for fold, held_out in ((1, [names[0]]), (2, [names[1]]), (3, None), (4, [names[3]])):
        train = run("breakfast", tmp_path, "--split", "train", "--fold", fold)[1]
        assert [path for path, _ in train] == [
            n for n in (names[0], names[1], names[3]) if n not in (held_out or [])
        ]
        if held_out:
            test = run("breakfast", tmp_path, "--split", "test", "--fold", fold)[1]
            assert [path for path, _ in test] == held_out
    assert dict(train)[names[1]] == "friedegg"


def test_folder_per_class(tmp_path, run):
    """Names with spaces, commas and quotes, deeper folders; no hidden file, no file that isn't a video."""
    root = tmp_path / "root"
    names = [
        "riding a bike/my clip, 1.MP4",
        "riding a bike/b.webm",
        "swim/a,b.mp4",
        'say "hi"/"q".mp4',
        "swim/deep/x.avi",
    ]
    for name in [*names, "swim/notes.txt", "swim/._x.avi"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    videos, rows = run("folders", root)
    assert sorted(rows) == sorted((name, name.split("/")[0]) for name in names)
    assert videos.classes == ["riding a bike", 'say "hi"', "swim"]


# A file of each suffix: its muxer and encoder.
MUXED = {
    "mp4 m4v qt f4v": ("mp4", "libx264"),
    "mov mj2": ("mov", "mjpeg"),
    "3gp": ("3gp", "libx264"),
    "3g2": ("3g2", "libx264"),
    "mkv mk3d": ("matroska", "libx264"),
    "webm": ("webm", "libvpx"),
    "avi divx": ("avi", "mpeg4"),
    "ts mts m2ts m2t": ("mpegts", "libx264"),
    "mpg mpeg": ("mpeg", "mpeg2video"),
    "vob": ("vob", "mpeg2video"),
    "m1v": ("mpeg1video", "mpeg1video"),
    "m2v": ("mpeg2video", "mpeg2video"),
    "flv": ("flv", "flv"),
    "asf wmv": ("asf", "wmv2"),
    "ogv ogg ogm": ("ogv", "libvpx"),
    "h264 264 avc": ("h264", "libx264"),
    "hevc h265 265": ("hevc", "libx265"),
    "mxf": ("mxf", "mpeg2video"),
    "rm rmvb": ("rm", "rv10"),
    "dv dif": ("dv", "dvvideo"),
    "gif": ("gif", "gif"),
    "ivf": ("ivf", "libvpx"),
    "obu": ("obu", "libsvtav1"),
}


@pytest.mark.parametrize("suffixes", MUXED)
def test_each_suffix_opens(tmp_path, suffixes):
    """`Video` opens a file of each kind that `list folders` and `chunk` take, and so does the walk list it."""
    muxer, codec = MUXED[suffixes]
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    size = (720, 576) if codec == "dvvideo" else (64, 48)
    path = tmp_path / "one"
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(os.fspath(path), "w", format=muxer) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for i in range(10):
            image = np.full((size[1], size[0], 3), 20 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode())
    names = [f"a.{suffix}" for suffix in suffixes.split()]
    (tmp_path / "root" / "class").mkdir(parents=True)
    for name in names:
        (tmp_path / "root" / "class" / name).symlink_to(path)
        with data.Video(tmp_path / "root" / "class" / name) as video:
            assert video.read([0, 5], 32).shape == (2, 3, 32, 32)
    listed = data.list_videos("folders", tmp_path / "root")
    assert sorted(listed) == sorted((f"class/{name}", "class") for name in names)


def test_suffixes_are_those_of_what_opens():
    """Each container that `Video` opens has its suffixes, and each suffix was tried above."""
    assert data.OPEN["format_whitelist"].split(",") == list(data.CONTAINERS)
    assert all(data.CONTAINERS.values())
    assert data.SUFFIXES == {f".{suffix}" for suffix in " ".join(MUXED).split()}


def test_links_lead_to_each_folder_once(tmp_path, cli):
    """A link to a parent, links in a ring, a folder by two names; its own name counts, whatever is sorted first."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("b/x.mp4", "c/deep/y.avi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "a").mkdir()
    outside.mkdir()
    (outside / "z.mp4").touch()
    (root / "a" / "also_b").symlink_to(root / "b")
    (root / "b" / "up").symlink_to(root)
    (root / "c" / "deep" / "up").symlink_to(root / "c")
    (root / "d").symlink_to(outside)
    (outside / "back").symlink_to(root)
    code, out, err = cli("data.py", "list", "folders", root)
    assert (code, sorted(out.splitlines())) == (0, ["b/x.mp4,b", "c/deep/y.avi,c", "d/z.mp4,d"])
    assert "4 folder visited by another name" in err
    assert "1 folder without a video (a)" in err


def test_what_is_skipped_is_counted_and_named(tmp_path, cli):
    root = tmp_path / "root"
    names = [
        "run/a.mts",
        "run/a.jpg",
        "run/b.JPG",
        "run/.hidden.mp4",
        "jump/README",
        "jump/a.y4m",
        "run/b.gif",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "fall").mkdir()
    code, out, err = cli("data.py", "list", "folders", root)
    assert (code, out) == (0, "run/a.mts,run\nrun/b.gif,run\n")
    assert len(err.splitlines()) == 1
    notes = [
        "2 .jpg (run/a.jpg, run/b.JPG)",
        "1 .y4m (jump/a.y4m)",
        "1 without a suffix (jump/README)",
    ]
    notes += ["1 hidden (run/.hidden.mp4)", "2 folder without a video (fall, jump)"]
    assert err.startswith("skipped ") and sorted(err[8:].strip().split("; ")) == sorted(notes)
    (root / "run/a.mts").unlink()
    (root / "run/b.gif").unlink()
    with pytest.raises(UserError, match=r"no such video.*2 \.jpg"):
        data.list_videos("folders", root)


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    for name in ("a/x.mp4", "b/y.mp4"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).touch()
    scandir, skipped = os.scandir, []

    def locked(path):
        if path == str(tmp_path / "root/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert data.list_videos("folders", str(tmp_path / "root"), skipped=skipped) == [
        ("a/x.mp4", "a")
    ]
    assert "1 unreadable folder (b)" in skipped


def test_own_lists_are_never_ambiguous(tmp_path, run):
    """Classes of two words alone, and paths with commas: read back as they are."""
    names = ["riding bike/a.mp4", "brush hair/b,c d.mp4", 'say "hi"/e.mp4']
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).touch()
    for name in names:
        label = name.split("/")[0]
        (tmp_path / "one" / label).parent.mkdir(exist_ok=True)
        (tmp_path / "one" / label).symlink_to(tmp_path / "root" / label)
        assert run("folders", tmp_path / "one")[1] == [(name, label)]
        (tmp_path / "one" / label).unlink()


def test_pipe_and_raw_names(tmp_path):
    """`| head` ends the command quietly; a name that is no UTF-8 passes through as its bytes."""
    folder = tmp_path / "root" / "a"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.mp4")).touch()
    for i in range(3000):
        (folder / f"a_rather_long_name_so_that_the_pipe_is_full_{i:05d}.mp4").touch()
    command = f"{sys.executable} {ROOT / 'data.py'} list folders {tmp_path / 'root'}"
    done = subprocess.run(f"{command} | head -n 2", shell=True, capture_output=True, check=True)
    assert done.stdout.count(b"\n") == 2
    assert done.stderr == b""
    out = subprocess.run(command.split(), capture_output=True, check=True).stdout
    assert b"\na/caf\xe9.mp4,a\n" in out
    assert dict(read(tmp_path, out)[1])[os.fsdecode(b"a/caf\xe9.mp4")] == "a"


ENTRY = '[{"id": "1", "template": "Holding [thing]"},\n {"id": "2"}]'
BAD = [  # format, flags, {file: text}, what the message must hold
    (
        "ucf101",
        (),
        {"s": "A/a.avi 1\nB/b.avi 2\n", "classInd.txt": "1 A\n"},
        ["s:2", "'B'", "classInd.txt"],
    ),
    ("ucf101", (), {"s": "A/a.avi 2\n", "classInd.txt": "1 A\n"}, ["s:1", "number 1"]),
    ("ucf101", (), {"s": "A/a.avi\n", "classInd.txt": "1 A\nB\n"}, ["classInd.txt"]),
    ("ucf101", (), {"s": "A/a.avi 1\n"}, ["classInd.txt", "No such file", "--labels"]),
    ("ucf101", ("--split", "train"), {"s": "A/a.avi 1\n", "classInd.txt": "1 A\n"}, ["no --split"]),
    ("hmdb51", (), {"s/a_test_split1.txt": "a.avi 1\n"}, ["--split", "--fold 1 to 3"]),
    (
        "hmdb51",
        ("--split", "val"),
        {"s/a_test_split1.txt": "a.avi 1\nb.avi 7\n"},
        ["a_test_split1.txt:2", "'7'"],
    ),
    ("hmdb51", ("--split", "val"), {"s/other.txt": ""}, ["no such video", "test_split1.txt"]),
    (
        "kinetics",
        (),
        {"s": "youtube_id,time_start,time_end,split\nx,1,2,test\n"},
        ["s:1", "testifying,---QUuC4vJs,84,94,train"],
    ),
    (
        "kinetics",
        (),
        {"s": "label,youtube_id,time_start,time_end,split\na,x,1,2,t\na,x,one,2,t\n"},
        ["s:3", "one"],
    ),
    ("kinetics", (), {"s": ""}, ["no such video"]),
    (
        "ssv2",
        (),
        {"s": ENTRY, "something-something-v2-labels.json": '{"Holding thing": "0"}'},
        ["entry 2", "template"],
    ),
    ("ssv2", (), {"s": "[\n{", "something-something-v2-labels.json": "{}"}, ["s: not", "line 2"]),
    ("moments", (), {"s": "a/b.mp4,a,1,0\n", "moments_categories.txt": "b,1\n"}, ["s:1", "'a'"]),
    (
        "coin",
        ("--split", "val"),
        {"s": '{"database": {"x": {"subset": "training"}}}'},
        ["entry 1", "recipe_type"],
    ),
    ("coin", ("--split", "val"), {"s": '{"x": 1}'}, ["'database'"]),
    ("coin", ("--split", "val"), {"s": "7"}, ["s: not", "COIN.json"]),
    (
        "coin",
        ("--split", "val"),
        {"s": '{"database": {"x": {"subset": "test", "recipe_type": 1}}}'},
        ["entry 1", "'test' is missing, or unknown"],
    ),
    ("ucf101", (), {"s": "a.avi 1\n", "classInd.txt": "1 A\n"}, ["s:1", "'a.avi 1'"]),
    ("ucf101", (), {"s": "A/a.avi one\n", "classInd.txt": "1 A\n"}, ["'one' is not a number"]),
    (
        "ssv2",
        (),
        {"s": "[]", "something-something-v2-labels.json": '{"a": "b"}'},
        ["labels", "'b'"],
    ),
    ("ssv2", (), {"s": '["a"]', "something-something-v2-labels.json": "{}"}, ["entry 1", "'a'"]),
    (
        "hmdb51",
        ("--split", "val"),
        {"s/a_test_split1.txt": "a.avi\n"},
        ["a_test_split1.txt:1", "a.avi"],
    ),
    ("breakfast", ("--split", "val"), {"s/P03/x.avi": ""}, ["x.avi", "P03_coffee.avi"]),
    ("breakfast", ("--split", "val", "--fold", "5"), {"s/P03/x.avi": ""}, ["--fold 1 to 4"]),
    ("folders", (), {"s/x.avi": ""}, ["x.avi", "<class>/<video>", "that holds class folders"]),
    ("folders", (), {"s/a/x\ny.avi": ""}, ["can't hold"]),
    ("folders", ("--labels", "x"), {"s/a/x.avi": ""}, ["no --labels"]),
    ("folders", (), {}, ["s: No such file"]),
    ("folders", (), {"s": ""}, ["s: Not a directory"]),
    ("folders", (), {"s/a/b.txt": ""}, ["no such video", "1 .txt (a/b.txt)"]),
]


@pytest.mark.parametrize(("form", "flags", "files", "words"), BAD)
def test_malformed_sources(tmp_path, run, form, flags, files, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        run(form, tmp_path / "s", *flags)
    message = str(caught.value)
    assert message.count("\n") == 0, message
    assert all(word in message for word in words), message
    for python in ("object", "unpack", "literal", "convert", "index out", "indices", "None"):
        assert python not in message, message


def test_unknown_format(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("imagenet", "x")
    message = capsys.readouterr().err
    assert all(form in message for form in data.FORMATS)


@pytest.fixture
def damaged(tmp_path):
    """A folder with two good videos and seven that can't be read, and the list of them."""
    make(tmp_path / "good one.mp4")
    make(tmp_path / "good2.mp4")
    make(tmp_path / "sound.mp4", audio=True)
    whole = (tmp_path / "good one.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder.mp4").mkdir()
    names = ["good one", "cut", "zero", "sound", "gone", "text", "folder", "good2", "good2"]
    (tmp_path / "l.csv").write_text(
        "\n" + "".join(f'"{name}.mp4",{i % 2}\n' for i, name in enumerate(names))
    )
    return tmp_path


def test_check(damaged, cli):
    code, out, err = cli(
        "data.py",
        "check",
        damaged / "l.csv",
        "--data-root",
        damaged,
        "--good",
        damaged / "good.csv",
    )
    assert (code, err) == (0, "")  # the list of the good ones is there, and holds some
    first, *shown = out.splitlines()
    assert first.startswith("2 of 8 videos are good; 6 are not")
    assert shown == (damaged / "l.csv.bad").read_text().splitlines()
    bad = dict(line.split(": ", 1) for line in shown)
    reasons = {
        "cut": "",
        "zero": "empty",
        "sound": "no video stream",
        "gone": "No such file",
        "text": "",
        "folder": "file",
    }
    assert list(bad) == [str(damaged / f"{name}.mp4") for name in sorted(reasons)]
    assert all(reason in bad[str(damaged / f"{name}.mp4")] for name, reason in reasons.items())
    videos = data.VideoList(damaged / "good.csv")
    rows = [(videos.video(i), videos.labels[i]) for i in range(len(videos))]
    assert rows == [("good one.mp4", 0), ("good2.mp4", 1), ("good2.mp4", 0)]
    assert data.check_list(damaged / "good.csv", damaged, full=True, out=damaged / "b") == (2, [])
    assert (damaged / "b").read_text() == ""


def test_exit_status_of_check(damaged, monkeypatch, capsys):
    """1 where some videos are bad, but 0 where --good has others; up to ten are on the screen."""

    def status(name, *flags):
        check = ["check", damaged / f"{name}.csv", "--data-root", damaged, *flags]
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, check)])
        try:
            data.main()
        except SystemExit as end:
            return end.code
        return 0

    good = "--good", damaged / "good.csv"
    for name, videos in (("whole", ["good2"]), ("bad", [f"gone{i}" for i in range(12)])):
        (damaged / f"{name}.csv").write_text("".join(f"{video}.mp4,0\n" for video in videos))
    assert status("whole") == status("whole", *good) == 0
    assert status("l") == 1 and status("l", *good) == 0
    capsys.readouterr()
    assert status("bad") == status("bad", *good) == 1
    assert (damaged / "good.csv").read_text() == ""
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 12 and lines[11] == "and 2 more" and "gone" in lines[10]


def test_check_speed(damaged, monkeypatch, capsys):
    """A clip that takes a core 0.25 s is 4 a second, so that 735 a second need 184 cores; by the clock it takes twice as
    long here. What can't be read is counted apart, and no file is written."""
    now = 0.0
    read_views = data.Video.read_views

    def slow(video, views):
        nonlocal now
        now += 0.25
        assert [(len(frames), size) for frames, size, _ in views] == [(4, 32)]
        return read_views(video, views)

    monkeypatch.setattr(data.Video, "read_views", slow)
    monkeypatch.setattr(data.time, "process_time", lambda: now)
    monkeypatch.setattr(data.time, "perf_counter", lambda: 2 * now)
    flags = ["--data-root", damaged, "--speed", "--frames", 4, "--size", 32, "--stride", 2]
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(damaged / "l.csv"), *map(str, flags)])
    data.main()
    out = capsys.readouterr().out
    assert "reads 4.0 clips/s of 4 frames, 2 apart, 32 x 32, without 6 that can't be read" in out
    assert "by the clock 2.0, " in out
    assert "735 " in out and "1707 clips/s" in out and "184 to 427 " in out
    assert not list(damaged.glob("*.bad"))

    (damaged / "bad.csv").write_text("gone.mp4,0\ntext.mp4,0\n")
    with pytest.raises(
        UserError, match="bad.csv: none of 2 videos could be read; the first: .*gone.mp4"
    ):
        data.reading_speed(damaged / "bad.csv", damaged)
    assert data.reading_speed(damaged / "l.csv", damaged, frames=4, size=32, count=2) == (
        4.0,
        2.0,
        [],
    )  # first and last


@pytest.mark.parametrize("flag", ["--out", "--good"])
def test_check_says_first_where_it_cannot_write(damaged, cli, fails, flag, monkeypatch):
    """Before a video is opened; and a file that is there stays whole until the result is known."""
    monkeypatch.setattr(data, "_check", lambda *_: pytest.fail("it began to decode"))
    check = ["check", damaged / "l.csv", "--data-root", damaged]
    for target, words in ((damaged / "no" / "file", "No such file"), (damaged, "directory")):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, check), flag, str(target)])
        with pytest.raises(UserError, match=rf"{target}: can't be written.*{words}"):
            data.main()
    text = (damaged / "l.csv").read_text()
    for target in (
        damaged / "l.csv",
        damaged / "." / "l.csv",
        damaged / "l.csv.bad" if flag == "--good" else None,
    ):
        if target:
            monkeypatch.setattr(sys, "argv", ["data.py", *map(str, check), flag, str(target)])
            with pytest.raises(UserError, match="must be different files"):
                data.main()
    assert (damaged / "l.csv").read_text() == text
    assert not (damaged / "l.csv.bad").exists()


def test_an_interrupted_check_leaves_old_results(damaged, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (damaged / "old.bad").write_text("old")
    monkeypatch.setattr(data, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.check_list(
            damaged / "l.csv", damaged, out=damaged / "old.bad", good=damaged / "new.good"
        )
    assert (damaged / "old.bad").read_text() == "old"
    assert not (damaged / "new.good").exists()


def test_check_decodes_the_end_and_full_decodes_all(tmp_path):
    """A damaged frame at the end is found always, one between those that are decoded by --full alone."""
    make(tmp_path / "v.mp4", n=40)
    whole = (tmp_path / "v.mp4").read_bytes()
    with av.open(str(tmp_path / "v.mp4")) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for name, n, found in (("end", 39, (True, True)), ("middle", 6, (False, True))):
        at, size = packets[n]
        (tmp_path / f"{name}.mp4").write_bytes(
            whole[: at + 4] + b"\xff" * (size - 4) + whole[at + size :]
        )
        (tmp_path / "l.csv").write_text(f"{name}.mp4 0\n")
        for full in (False, True):
            assert (
                len(data.check_list(tmp_path / "l.csv", tmp_path, full, workers=1)[1])
                == found[full]
            )
