"""A run ends when something goes wrong: soon, with one line or one traceback, and with nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import avion
import common
import data
import sfa_vivit
import tpt_mae
import turbo
from common import UserError

CPU = torch.device("cpu")

# As much of a trainer as has loader processes and other ranks to wait for; then it does what `act` says.
TRAINER = """
import os, sys
sys.path.insert(0, {root!r})
import torch, common, data

def one_frame(video, index, view, key):
    return [0], None

ctx = common.launch()
videos = data.VideoList({toy!r} + "/train.csv", {toy!r})
dataset = data.ClipDataset(videos, one_frame, {size}, 0, replace=True)
schedule = data.global_batches(16, 16, 8 // ctx.world, 0, 0, 1000, ctx.rank, ctx.world)
batches = data.make_loader(dataset, schedule, {workers}, ctx.device)
next(batches)
if {workers}:
    print(*(int(pid) for pid in dataset.watch[:, 0]), flush=True)
{act}
"""


def trainer(folder, toy, act, workers, size=32):
    script = folder / "trainer.py"
    script.write_text(
        TRAINER.format(root=str(ROOT), toy=str(toy), act=act, workers=workers, size=size)
    )
    return script


def start(*command, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid):
    """A process that has ended may stay a zombie for a while, where nobody asks for its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_ranks(script, n):
    """As torchrun would; but nobody ends the others when one has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)} if n > 1 else {}
    return [start(sys.executable, script, **env, RANK=str(rank)) for rank in range(n)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_an_exception_ends_all_processes(toy, tmp_path, ranks, workers):
    """Within 10 s of its traceback, with status 1; a rank that waits for the failed one adds a line, no traceback."""
    act = "1 / 0 if ctx.rank == 0 else ctx.barrier()"
    processes = start_ranks(trainer(tmp_path, toy, act, workers), ranks)
    try:
        lines = iter(processes[0].stderr.readline, "")
        assert any("ZeroDivisionError" in line for line in lines)
        deadline = time.monotonic() + 10
        results = [
            process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            for process in processes
        ]
        pids = [pid for out, _ in results for pid in out.split()]
        while any(map(alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1] * ranks
    assert len(pids) == ranks * workers
    for _, err in results[1:]:
        assert "lost another rank" in err and "Traceback" not in err, err


def test_a_rank_that_fails_waits_for_no_other(toy, tmp_path):
    """Not even where it has begun to exchange something, with a rank that is far from there."""
    act = """
import time, torch.distributed as dist
if ctx.rank == 0:
    begun = dist.all_reduce(torch.zeros(10), async_op=True)
    raise common.UserError("rank 0 can't go on")
time.sleep(100)
"""
    processes = start_ranks(trainer(tmp_path, toy, act, 2), 2)
    try:
        lines = iter(processes[0].stderr.readline, "")
        assert any("rank 0 can't go on" in line for line in lines)
        out, _ = processes[0].communicate(timeout=10)
        assert processes[0].returncode == 1
        assert not any(map(alive, out.split()))
    finally:
        for process in processes:
            process.kill()


def in_small(folder, size, *command, **env):
    """Run a command where `folder` is an empty file system of `size`, which nobody else sees."""
    prefix = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"',
        "sh",
    ]
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounts of one's own are not permitted here")
    process = start(*prefix, *command, **env)
    try:
        return *process.communicate(timeout=60), process.returncode
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("folder", "size", "words"),
    [
        (
            "/dev/shm",
            "1m",
            "shared memory or the temporary folder is full",
        ),  # 8 clips of 3 x 224 x 224 are 1.2 MB
        ("/dev/shm", "4k", "can't start 2 loader processes"),  # which takes more, before any batch
        # Two folders and one socket of two fit.
        ("temporary", "64k,nr_inodes=3", "shared memory or the temporary folder is full"),
    ],
)
def test_no_room_for_batches_is_said(toy, tmp_path, folder, size, words):
    script = trainer(tmp_path, toy, "for batch in batches: pass", 2, size=224)
    with (
        tempfile.TemporaryDirectory() as temporary
    ):  # a short name: a socket's must have less than 108 characters
        place = temporary if folder == "temporary" else folder
        _, err, status = in_small(place, size, sys.executable, script, TMPDIR=temporary)
    assert status == 1 and "Traceback" not in err, err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert (
        words in line and "--workers" in line and "--shm-size" in line and "No space left" in line
    )


def loader(toy, plan, workers):
    dataset = data.ClipDataset(
        data.VideoList(toy / "train.csv", toy), plan, 32, seed=0, replace=False
    )
    return data.make_loader(dataset, [[(0, i)] for i in range(16)], workers, CPU)


def first_frame(video, index, view, key):
    return [0], None


def test_a_lost_batch_is_no_reason_to_wait(toy, monkeypatch):
    """Nothing that sends a batch may fail in silence: here the sixth can't be pickled, and is dropped on its way."""

    def spoiled(samples, collate=data.collate):
        batch = collate(samples)
        return batch._replace(failures=[lambda: 0]) if batch.index.tolist() == [5] else batch

    monkeypatch.setattr(data, "collate", spoiled)
    monkeypatch.setattr(data, "LOADER_PATIENCE", 3.0)
    seen, began = [], time.monotonic()
    with pytest.raises(UserError, match="a batch was lost.*temporary folder.*ulimit"):
        for batch in loader(toy, first_frame, 2):
            seen += batch.index.tolist()
    assert seen == [0, 1, 2, 3, 4] and time.monotonic() - began < 30


def test_a_worker_that_does_not_answer_is_no_reason_to_wait(toy, monkeypatch):
    """One that stops while it owes the trainer the memory of batches that it has announced."""

    def plan(video, index, view, key):
        if index == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return [0], None

    monkeypatch.setattr(data, "LOADER_PATIENCE", 3.0)
    batches, began = loader(toy, plan, 1), time.monotonic()
    time.sleep(1.0)  # until it has stopped
    with pytest.raises(UserError, match="has been busy for 3 s with .*train_00003"):
        list(batches)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [StopIteration("a mistake"), RuntimeError("a mistake: timed out after 9 seconds")]
)
def test_no_error_in_a_plan_shortens_an_evaluation(toy, workers, error):
    def plan(video, index, view, key):
        if index == 5:
            raise error
        return [0], None

    seen = []
    with pytest.raises(RuntimeError) as caught:
        for batch in loader(toy, plan, workers):
            seen += batch.index.tolist()
    assert seen == [0, 1, 2, 3, 4]
    assert "a mistake" in f"{caught.value} {caught.value.__cause__}"


# ---- Lists are a part of what a run is -------------------------------------------------------------------------------


def lists_of(script, monkeypatch, *args):
    """What a script hands to Run.resume: its lists by their flags' names."""
    handed = {}

    def resume(self, **lists):
        handed.update(lists)
        raise SystemExit

    monkeypatch.setattr(common.Run, "resume", resume)
    with pytest.raises(SystemExit):
        script.main(common.parse(script.Config, script.RECIPES, [str(arg) for arg in args]))
    return handed


@pytest.mark.parametrize("script", [turbo, tpt_mae, sfa_vivit])
def test_digest_of_lists(script, toy, tmp_path, monkeypatch):
    """Of their entries, wherever the files lie: not those of a shorter list, another order or another label."""
    lines = (toy / "train.csv").read_text().splitlines()
    label = lines[0].rpartition(",")[2]
    other = next(line for line in lines if not line.endswith(label)).rpartition(",")[2]
    variants = {
        "moved": lines,
        "shorter": lines[:-1],
        "turned": lines[::-1],
        "relabelled": [lines[0].replace(f",{label}", f",{other}"), *lines[1:]],
    }
    args = ["--train-list", toy / "train.csv", "--val-list", toy / "val.csv", "--data-root", toy]
    args += [
        "--batch-size",
        4,
        "--out",
        tmp_path / "run",
        *(["--then", ""] if script is tpt_mae else []),
    ]
    digests = {}
    for name, rows in variants.items():
        (tmp_path / name).write_text("\n".join(rows))
        train = lists_of(script, monkeypatch, *args, "--train-list", tmp_path / name)
        val = lists_of(script, monkeypatch, *args, "--val-list", tmp_path / name)
        digests[name] = train["train_list"].digest(), val["val_list"].digest()
    original = lists_of(script, monkeypatch, *args)
    assert original["train_list"].digest() == digests["moved"][0] != original["val_list"].digest()
    for column in zip(*digests.values(), strict=True):
        assert len(set(column)) == 4


@pytest.mark.parametrize("script", [turbo, avion])
def test_digest_of_captions(script, tmp_path, monkeypatch):
    """Of videos, times and texts."""
    rows = [{"video": f"v{i}", "start": i, "end": i + 2.0, "text": f"text {i}"} for i in range(8)]
    variants = {"base": rows, "moved": rows, "shorter": rows[:-1]}
    for key, value in (("video", "w"), ("start", 0.5), ("end", 2.5), ("text", "text")):
        variants[key] = [rows[0] | {key: value}, *rows[1:]]
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(turbo, "open_text", lambda *args: torch.zeros(8, 4))
    monkeypatch.setattr(data, "need_videos", lambda *args: None)
    digests = {}
    for name, entries in variants.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in entries))
        args = [
            "--train-list",
            path,
            "--val-list",
            path,
            "--data-root",
            tmp_path,
            "--batch-size",
            4,
        ]
        args += ["--out", tmp_path / "run", *(["--objective", "align"] if script is turbo else [])]
        handed = lists_of(script, monkeypatch, *args)
        digests[name] = handed["train_list"].digest(), handed["val_list"].digest()
    assert digests.pop("moved") == digests["base"]
    for column in zip(*digests.values(), strict=True):
        assert len(set(column)) == 6


def test_a_shorter_list_is_another_run(toy, toy_args, tmp_path, cli, fails):
    """A complete run and then half the list; the same list elsewhere, or a run that kept no digest, goes on."""
    args = ["turbo.py", *toy_args, "--max-steps", "1", "--out", tmp_path / "run"]
    assert cli(*args)[0] == 0
    for name in ("train", "val"):
        path = tmp_path / f"{name}.csv"
        lines = (toy / f"{name}.csv").read_text().splitlines()
        path.write_text("\n".join(lines[: len(lines) // 2]))
        fails([*args, f"--{name}-list", path], f"--{name}-list {path}", f"{tmp_path / 'run'}")
        path.write_text("\n".join(lines))
        assert "complete" in cli(*args, f"--{name}-list", path)[1]
        path.write_text("\n".join(lines[: len(lines) // 2]))
    state = common.load_checkpoint(tmp_path / "run/last.pt")
    del state["lists"]
    torch.save(state, tmp_path / "run/last.pt")
    assert "complete" in cli(*args, "--train-list", tmp_path / "train.csv")[1]


def test_a_step_behind_the_last_is_said():
    """What is left of that for runs that kept no digest."""
    cfg = turbo.Config(workers=0)
    ctx = common.Context(0, 1, CPU, "fp32")
    dataset = data.ClipDataset(range(16), first_frame, 32, 0, replace=True)
    data.training_batches(cfg, ctx, dataset, 4, 4, 4, 4)
    with pytest.raises(UserError, match="step 8.* 4.*--train-list"):
        data.training_batches(cfg, ctx, dataset, 4, 4, 8, 4)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"vision_config": null}', '{"layer_norm_eps": null}']
)
def test_settings_that_are_none(tmp_path, text):
    """Of a hub model, beside its weights."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: not the settings of a model"):
        common.hub_setting(tmp_path, "layer_norm_eps", 1e-12)


# ---- A full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, where every write finds the disk full"
)
def test_a_full_disk_is_one_line(tmp_path):
    """Checkpoint, log and picture; the old checkpoint stays, and no half of a new one, which takes the room of others."""
    common.save_atomic(tmp_path / "last.pt", {"a": 1})
    for name in ("last.pt.tmp", "x.png.tmp", "log.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(
        UserError, match="last.pt: can't write it .No space left.*the one before is kept"
    ):
        common.save_atomic(tmp_path / "last.pt", {"a": torch.zeros(1000)})
    assert common.load_checkpoint(tmp_path / "last.pt") == {"a": 1}
    with pytest.raises(UserError, match="x.png: can't write it .No space left"):
        data._write_images(tmp_path / "x.png", [torch.zeros(64, 64, 3, dtype=torch.uint8)], 5)
    cfg = turbo.Config(out=str(tmp_path))
    run = common.Run(cfg, common.Context(0, 1, CPU, "fp32"))
    with pytest.raises(UserError, match="log.jsonl: can't write it .No space left"):
        run.log({"val_top1": 1.0}, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.pt", "log.jsonl"]


def test_an_array_on_a_full_disk_is_no_bus_error(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data
from types import SimpleNamespace
cfg = SimpleNamespace(out={str(tmp_path)!r})
ctx = SimpleNamespace(rank=0, barrier=lambda: None)
data.write_features(cfg, ctx, range(10000), None, 100)
"""
    _, err, status = in_small(tmp_path, "1m", sys.executable, "-c", code)
    assert (
        status == 1
        and "features.npy: can't write it (No space left" in err
        and "Traceback" not in err
    ), err


def test_a_new_array_is_numpys(tmp_path):
    rows = common.new_array(tmp_path / "a.npy", (3, 2), np.float32, np.nan)
    rows[1] = 1.5
    rows.flush()
    expected = np.array([[np.nan, np.nan], [1.5, 1.5], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
