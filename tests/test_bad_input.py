"""Every mistake a user can make ends in one clear line that names the file or flag; nothing hangs or is lost."""

import os
import pickle

import av
import numpy as np
import pytest
import torch

import common
import data
import turbo
from common import UserError


def run(*argv):
    turbo.main(common.parse(turbo.Config, turbo.RECIPES, list(map(str, argv))))


def refused(*argv):
    """The one line that turbo.py's main ends with."""
    with pytest.raises(UserError) as error:
        run(*argv)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--seed", "--max-steps"])
def test_numbers_beyond_64_bits(flag, capsys):
    """No tensor and no generator holds them."""
    with pytest.raises(SystemExit) as end:
        run(flag, str(2**63))
    assert (
        end.value.code == 2
        and capsys.readouterr().err == f"error: argument {flag}: {2**63} has more than 64 bits\n"
    )
    assert common.parse(turbo.Config, turbo.RECIPES, [flag, str(2**63 - 1)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recon-ratio", "0.6"], ["--recon-ratio", "--mask-ratio"]),
        (["--mask-ratio", "1"], ["--mask-ratio", "[0, 1)"]),
        (["--mask-ratio", "-0.1"], ["--mask-ratio"]),
        (["--eval-mask-ratios", "0,1.5"], ["--eval-mask-ratios"]),
        (["--mask-ratio", "0.9999"], ["--mask-ratio", "at least one"]),
        (["--lr", "1e-7"], ["--min-lr 1e-06", "--lr 1e-07"]),
        (["--frames", "15"], ["--frames 15"]),
        (["--frames", "0"], ["--frames 0"]),
        (["--size", "60"], ["--size 60"]),
        (["--batch-size", "6", "--micro-batch", "4"], ["--batch-size 6", "--micro-batch 4"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--batch-size", "6", "--micro-batch", "3", "--mixup", "0.8"], ["--micro-batch", "mixup"]),
        (["--task", "predict", "--init", "none.pt"], ["none.pt", "no such checkpoint"]),
        (["--init", "x" * 300], ["xxx: ", "File name too long"]),
        (["--overwrite", "--resume", "a.pt"], ["--overwrite", "--resume a.pt"]),
        (["--train-list", ""], ["--train-list"]),
        (["--decoder", "big"], ["--decoder", "8x512"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--log-every", "0"], ["--log-every"]),
        (["--eval-every", "0"], ["--eval-every"]),
        (["--fps", "0"], ["--fps"]),
        (["--workers", "-1"], ["--workers"]),
        (["--drop-path", "1"], ["--drop-path"]),
        (["--recon-ratio", "0.001"], ["--recon-ratio", "none of 32"]),
        (["--val-list", ""], ["--val-list"]),
        (["--val-list", "gone.csv"], ["gone.csv", "No such file"]),
        (["--num-classes", "9"], ["--num-classes 9", "8 names"]),
    ],
)
def test_impossible_flags(flags, words, toy_args, tmp_path):
    message = refused(*toy_args, "--out", tmp_path, *flags)
    assert all(word in message for word in words), message


def test_unknown_flag_recipe_and_type(fails, capsys):
    """Status 2, the choices listed: once through the real command line, then in this process."""
    fails(
        ["turbo.py", "--mask-ration", "0.5"],
        "did you mean --mask-ratio",
        "--weight-decay",
        status=2,
    )
    for flag, wrong, *words in (
        ("--recipe", "imagenet", "toy", "ucf101"),
        ("--epochs", "many", "many"),
        ("--model", "vit_x", "vit_b"),
    ):
        with pytest.raises(SystemExit) as stop:
            common.parse(turbo.Config, turbo.RECIPES, [flag, wrong])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and all(word in error for word in (flag, *words)), error


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["train.csv", "No such file"]),
        ("", ["train.csv", "empty"]),
        ("\n  \n", ["train.csv", "empty"]),
        ("a.mp4,left\nb.mp4\n", ["train.csv:2", "b.mp4"]),
        ("a.mp4,left\n\nmy video.mp4 right\n", ["train.csv:3", "quote"]),
        ("a.mp4,left,3\n", ["train.csv:1"]),
        ("a.mp4 0\nb.mp4 8\n", ["train.csv:2", "'8'", "0 ... 7"]),
        ("a.mp4 0\nb.mp4 -1\n", ["train.csv:2", "'-1'"]),
        ("a.mp4 -1\nb.mp4 -1\n", ["train.csv:1", "'-1'"]),
        ("a.mp4 0\nb.mp4 " + "9" * 40 + "\n", ["train.csv:2", "0 ... 7"]),
        ("x" * 200_000 + "\n", ["train.csv:1"]),
        ("a.mp4 0\n" * 20, ["train.csv", "one class"]),
        ("a.mp4 0\nb.mp4 1\n", ["train.csv", "2 videos", "--batch-size"]),
    ],
)
def test_malformed_training_list(content, words, toy_args, tmp_path):
    path = tmp_path / "train.csv"
    if content is not None:
        path.write_text(content)
    classes = ["--num-classes", 0 if content and content.count("0") == 20 else 8]
    message = refused(*toy_args, "--train-list", path, "--out", tmp_path / "run", *classes)
    assert all(word in message for word in words), message


def test_unknown_class_in_validation_list(toy_args, tmp_path):
    (tmp_path / "val.csv").write_text("a.mp4,left\nb.mp4,sideways\n")
    message = refused(*toy_args, "--val-list", tmp_path / "val.csv", "--out", tmp_path / "run")
    assert "val.csv:2" in message and "'sideways'" in message and "clockwise" in message


def test_a_list_is_a_folder(toy_args, tmp_path):
    assert "directory" in refused(*toy_args, "--train-list", tmp_path, "--out", tmp_path / "run")


# ---- videos ----------------------------------------------------------------------------------------------------------


def write(path, n=8, audio=False):
    with av.open(str(path), "w", format="mp4") as file:
        if audio:
            stream = file.add_stream("aac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 44100), np.float32), format="fltp", layout="mono"
            )
            frame.rate = 44100
            file.mux(stream.encode(frame))
        else:
            stream = file.add_stream("libx264", rate=10)
            stream.width = stream.height = 64
            for i in range(n):
                file.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(
                            np.full((64, 64, 3), 5 * i, np.uint8), format="rgb24"
                        )
                    )
                )
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def bad_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "short.mp4", n=8)
    write(folder / "audio.mp4", audio=True)
    write(folder / "good.mp4", n=40)
    (folder / "truncated.mp4").write_bytes((folder / "good.mp4").read_bytes()[:-900])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "folder.mp4").mkdir()
    return folder


@pytest.mark.parametrize(
    "name", ["missing", "zero", "text", "audio", "truncated", "folder", "short"]
)
def test_bad_video(name, bad_videos):
    """Each kind is a failure that names the video: replaced in training, left out and counted in evaluation."""
    cfg = common.parse(turbo.Config, turbo.RECIPES, [])
    (bad_videos / f"{name}.csv").write_text(f"{name}.mp4,a\ngood.mp4,b\n")
    videos = data.VideoList(bad_videos / f"{name}.csv", bad_videos)
    for replace in (True, False):
        dataset = turbo.clips_of(cfg, videos, None if replace else (1, 1))
        batch = data.collate([dataset[0, 0], dataset[0, 1]])
        assert batch.failures and all(
            f"{name}.mp4" in line and "\n" not in line for line in batch.failures
        )
        assert batch.index.tolist() == ([1, 1] if replace else [1])
        assert batch.clips.float().std() > 1  # the good one, not black


def test_nothing_readable(bad_videos, toy_args, tmp_path):
    (bad_videos / "all.csv").write_text("zero.mp4,left\ntext.mp4,right\n" * 8)
    lists = [
        "--train-list",
        bad_videos / "all.csv",
        "--val-list",
        bad_videos / "all.csv",
        "--data-root",
        bad_videos,
    ]
    message = refused(*toy_args, *lists, "--num-classes", 0, "--out", tmp_path)
    assert "zero.mp4" in message and "--max-bad" in message


def test_predict_names_the_bad_video(bad_videos, toy_args, tmp_path):
    run(*toy_args, "--max-steps", 1, "--out", tmp_path)
    message = refused(
        "--task",
        "predict",
        "--out",
        tmp_path,
        "--workers",
        0,
        "--input",
        bad_videos / "good.mp4",
        bad_videos / "zero.mp4",
    )
    assert "zero.mp4" in message and "good.mp4" not in message and "--input" not in message
    for name, words in (
        ("own.csv", "--input takes videos, one or several"),
        ("folder", "give the files, "),
    ):
        path = bad_videos / name
        if name == "folder":
            path.mkdir()
        else:
            path.write_text("good.mp4 left\n")
        message = refused("--task", "predict", "--out", tmp_path, "--workers", 0, "--input", path)
        assert str(path) in message and words in message


def test_two_classes(toy, toy_args, tmp_path):
    """Top-k with k > classes must not crash: it is top-2 then."""
    lines = [
        line.split(",")[0] + f",{i % 2}"
        for i, line in enumerate((toy / "train.csv").read_text().splitlines())
    ]
    (tmp_path / "two.csv").write_text("\n".join(lines))
    lists = ["--train-list", tmp_path / "two.csv", "--val-list", tmp_path / "two.csv"]
    run(*toy_args, *lists, "--num-classes", 2, "--max-steps", 1, "--out", tmp_path / "run")
    assert '"val_top2": 100.0' in (tmp_path / "run/log.jsonl").read_text()


# ---- checkpoints and folders -----------------------------------------------------------------------------------------


class Malice:
    """Pickled, it would make a folder when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("flag", ["--init", "--resume"])
def test_malicious_pickle_is_refused(flag, toy_args, tmp_path):
    for name, save in (
        ("a.pt", torch.save),
        ("b.pt", lambda x, path: path.write_bytes(pickle.dumps(x))),
    ):
        save({"model": Malice(tmp_path / "hacked")}, tmp_path / name)
        message = refused(*toy_args, flag, tmp_path / name, "--out", tmp_path / name[0])
        assert name in message and "refused" in message and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_damaged_checkpoint(content, toy_args, tmp_path):
    path = tmp_path / "w.pt"
    if content is None:
        torch.save({"model": {"x": torch.zeros(1000)}}, path)
        content = path.read_bytes()[:-500]
    path.write_bytes(content)
    assert "w.pt" in refused(*toy_args, "--init", path, "--out", tmp_path / "run")


def test_checkpoint_of_another_shape(toy_args, tmp_path):
    torch.save({"model": turbo.Turbo(8, "vit_s").state_dict()}, tmp_path / "s.pt")
    message = refused(*toy_args, "--init", tmp_path / "s.pt", "--out", tmp_path / "run")
    assert "s.pt" in message and "384)" in message and "--model" in message
    torch.save({"model": {"other": torch.zeros(1)}}, tmp_path / "o.pt")
    assert "other" in refused(*toy_args, "--init", tmp_path / "o.pt", "--out", tmp_path / "run2")


def test_run_folder_of_another_run(toy_args, tmp_path):
    """Stops and names what differs; --overwrite starts anew; machine flags may differ."""
    run(*toy_args, "--max-steps", 1, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    message = refused(*toy_args, "--max-steps", 1, "--out", tmp_path, "--lr", "0.5", "--seed", 3)
    assert (
        "--lr 0.001 -> 0.5" in message and "--seed 0 -> 3" in message and "--overwrite" in message
    )
    assert (tmp_path / "last.pt").read_bytes() == before
    run(*toy_args, "--max-steps", 1, "--out", tmp_path, "--workers", 1, "--micro-batch", 2)
    assert (tmp_path / "last.pt").read_bytes() == before
    run(*toy_args, "--max-steps", 1, "--out", tmp_path, "--lr", "0.5", "--overwrite")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["config"]["lr"] == 0.5


def test_unwritable_output_folder(toy_args, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(*toy_args, "--out", tmp_path / "file" / "run")
    if os.geteuid():
        os.chmod(tmp_path, 0o500)
        assert "--out" in refused(*toy_args, "--out", tmp_path / "run")


def test_missing_validation_weights(toy_args, tmp_path):
    assert "best.pt" in refused(*toy_args, "--task", "eval", "--out", tmp_path / "none")
