"""A run's life, through turbo.py's real loop: resume after any kill, ranks, micro-batches, workers, signals."""

import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import ROOT, command

import common
import data
import turbo

# turbo.py's own main() on a small toy set, with one thing patched in: what a test wants to see, or where it must die.
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, common, data, turbo
data.TOY_SETS["actions"]["counts"] = {{"train": 64, "val": 8}}
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
{patch}
turbo.main(common.parse(turbo.Config, turbo.RECIPES))
"""
SMALL = ["--size", "32", "--frames", "4", "--batch-size", "8", "--eval-every", "1000",
         "--log-every", "3"]  # fmt: skip
HALF_WRITTEN = """
def save(state, file):
    torch_save(state, file), file.flush(), os.truncate(file.name, os.path.getsize(file.name) // 2), die()
torch_save, torch.save = torch.save, save
"""
NOT_RENAMED = "os.replace = lambda a, b: die() if str(b).endswith('last.pt') else os.rename(a, b)"
TOY_HALF_MADE = "data._toy_video = lambda *a, f=data._toy_video: die() if a[-1] == 40 else f(*a)"
SAVE_GRADIENTS = """
def dump(gradients):
    if common.os.environ.get("RANK", "0") == "0":
        torch.save(gradients, sys.argv[sys.argv.index("--out") + 1] + "/gradients.pt")
    sys.exit()
torch.nn.utils.get_total_norm = dump
"""
DIE_AFTER_STEP_4 = """
save = common.Run.save
def save_and_die(self, state, *names):
    save(self, state, *names)
    if state["at"]["step"] == 4:
        self.ctx.barrier(), die()
common.Run.save = save_and_die
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder to run in, with its toy set."""
    folder = tmp_path_factory.mktemp("runs")
    data.make_toy(folder / "toy", "actions", counts={"train": 64, "val": 8})
    return folder


def drive(folder, *args, patch="", ranks=1, **options):
    script = folder / f"driver_{abs(hash(patch))}.py"
    script.write_text(DRIVER.format(root=str(ROOT), patch=patch))
    torchrun = (
        ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        if ranks > 1
        else []
    )
    return command(*torchrun, script, *SMALL, *args, cwd=folder, **options)


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    return out


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]
    return [
        {
            k: r[k]
            for k in r
            if k in ("step", "loss", "ce", "mae", "grad_norm", "val_top1", "val_mae")
        }
        for r in records
    ]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resume_is_exact(work):
    """8 steps = 4 steps, SIGKILL, 4 more; in the middle of a log interval and of an epoch; bit for bit."""
    args = [
        "--max-steps",
        "8",
        "--save-minutes",
        "0",
        "--workers",
        "1",
        "--mixup",
        "0.8",
        "--drop-path",
        "0.2",
    ]
    finish(drive(work, *args, "--out", work / "whole"))
    finish(drive(work, *args, "--out", work / "cut", patch=DIE_AFTER_STEP_4), -signal.SIGKILL)
    assert torch.load(work / "cut/last.pt", weights_only=True)["at"]["step"] == 4
    assert "steps 4 to 8" in finish(drive(work, *args, "--out", work / "cut"))
    assert equal(weights(work / "whole"), weights(work / "cut"))
    assert losses(work / "whole") == losses(work / "cut")
    assert len(losses(work / "whole")) == 4  # logs at 3, 6, 8, and the evaluation
    again = finish(drive(work, *args, "--out", work / "cut"))
    assert "complete" in again and equal(weights(work / "whole"), weights(work / "cut"))


def test_killed_between_log_and_checkpoint_of_an_evaluation(work):
    """Dying while best.pt is written: the evaluation is done, and logged, once."""
    patch = """
save = common.save_atomic
common.save_atomic = lambda path, state: die() if path.name == "best.pt" else save(path, state)
"""
    args = ["--max-steps", "10", "--save-minutes", "0", "--workers", "0", "--eval-every", "1"]
    finish(drive(work, *args, "--out", work / "once"))
    finish(drive(work, *args, "--out", work / "twice", patch=patch), -signal.SIGKILL)
    finish(drive(work, *args, "--out", work / "twice"))
    assert losses(work / "once") == losses(work / "twice")
    assert equal(weights(work / "once"), weights(work / "twice"))


def test_ten_kills(tmp_path):
    """Ten SIGKILLs, 2 workers: seven at times drawn from a printed seed, one in the write of the temporary file, one
    between sync and rename, one while the toy videos are made. Same weights and logged losses as never killed."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"KILL_SEED={seed}")
    rng, total = random.Random(seed), 66
    args = ["--max-steps", total, "--workers", 2, "--batch-size", 4, "--micro-batch", 2]
    args += ["--save-minutes", 0.0005]
    for patch in (TOY_HALF_MADE, HALF_WRITTEN, NOT_RENAMED):
        process = drive(tmp_path, *args, "--out", tmp_path / "cut", patch=patch)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    start = time.time()
    process = drive(tmp_path, *args, "--out", tmp_path / "whole")
    process.first_line()
    ready = time.time() - start  # the steps begin
    process.wait_for("loss")
    first = time.time() - start - ready  # three of them, and the loader's start
    finish(process)
    three = 3 * (time.time() - start - ready) / total
    steps = []
    for _ in range(7):
        process = drive(tmp_path, *args, "--out", tmp_path / "cut")
        # At a drawn time between two lines that the run prints: when the steps begin, and at each
        # third of them. The next line is the latest, however slow the machine was before, so that
        # the seven lives take at most 7 x 9 steps.
        lines, part = rng.randrange(4), rng.random()
        process.wait_for("\n", lines)
        process.wait_for("\n", lines + 1, timeout=part * (ready, first, three, three)[lines])
        assert process.poll() is None, "the run ended before its kill"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        last = tmp_path / "cut/last.pt"
        steps.append(torch.load(last, weights_only=True)["at"]["step"] if last.exists() else 0)
    print("checkpoints after the kills at steps", steps)
    assert steps == sorted(steps) and steps[-1] < total
    finish(drive(tmp_path, *args, "--out", tmp_path / "cut"))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize(
    "mixing", [["--mixup", "0.8"], ["--cutmix", "1.0"], ["--mixup", "0.8", "--cutmix", "1.0"]]
)
def test_ranks_and_micro_batches_give_the_same_gradient(work, mixing):
    """1 process = 2 processes = 4 micro-batches = 2 x 2, drop path and mixing on: 1e-6 overall, 1e-5 a tensor."""
    args = [
        "--batch-size",
        "8",
        "--drop-path",
        "0.3",
        "--label-smoothing",
        "0.1",
        "--workers",
        "0",
        *mixing,
    ]
    gradients = []
    for name, ranks, extra in (
        ("one", 1, []),
        ("two", 2, []),
        ("four", 1, ["--micro-batch", "2"]),
        ("both", 2, ["--micro-batch", "2"]),
    ):
        if mixing != ["--mixup", "0.8"] and name in ("two", "four"):
            continue  # those of one mixing are enough
        out = work / f"grad-{name}-{len(mixing)}{mixing[0]}"
        finish(drive(work, *args, *extra, "--out", out, patch=SAVE_GRADIENTS, ranks=ranks))
        gradients.append(torch.load(out / "gradients.pt", weights_only=True))
    norm = lambda tensors: sum(t.double().square().sum() for t in tensors).sqrt().item()
    for other in gradients[1:]:
        difference = [a - b for a, b in zip(gradients[0], other, strict=True)]
        print("relative gradient difference", norm(difference) / norm(gradients[0]))
        assert norm(difference) <= 1e-6 * norm(gradients[0])
        assert all(
            norm([d]) <= 1e-5 * norm([g]) for d, g in zip(difference, gradients[0], strict=True)
        )


def test_two_ranks_continue_on_one(work):
    """A run saved on 2 ranks ends on 1 as it would have on 1 from the start, to rounding; so does the log."""
    args = ["--max-steps", "8", "--save-minutes", "0", "--workers", "0"]
    finish(drive(work, *args, "--out", work / "single"))
    drive(work, *args, "--out", work / "pair", patch=DIE_AFTER_STEP_4, ranks=2).communicate(
        timeout=120
    )
    assert torch.load(work / "pair/last.pt", weights_only=True)["at"]["step"] == 4
    finish(drive(work, *args, "--out", work / "pair"))
    a, b = weights(work / "single"), weights(work / "pair")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    for x, y in zip(losses(work / "single"), losses(work / "pair"), strict=True):
        assert x == pytest.approx(y, rel=1e-4)


def test_samples_do_not_depend_on_workers_or_ranks(work):
    """The same clips, labels and keys at 0, 1, 2, 4 workers, and joined over 2 ranks, across an epoch's end."""
    cfg = common.parse(turbo.Config, turbo.RECIPES, ["--batch-size", "24", "--crop", "resized"])
    videos = data.VideoList(work / "toy/actions/train.csv", work / "toy/actions")
    dataset = turbo.clips_of(cfg, videos)

    def epoch(workers, rank=0, world=1):
        schedule = data.global_batches(len(videos), 24, 12, 0, 0, 4, rank, world)
        return list(data.make_loader(dataset, schedule, workers, torch.device("cpu")))

    reference = epoch(0)
    assert len(reference) == 8 and len({tuple(b.index.tolist()) for b in reference}) == 8
    for workers in (1, 2, 4):
        for a, b in zip(reference, epoch(workers), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    pairs = [part for step in zip(epoch(0, 0, 2), epoch(2, 1, 2), strict=True) for part in step]
    for a, b in zip(reference, pairs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_evaluation_counts_each_sample_once_on_two_ranks(work):
    """7 videos on 2 ranks: the same result as on 1, none counted twice."""
    lines = (work / "toy/actions/val.csv").read_text().splitlines()[:7]
    (work / "seven.csv").write_text("\n".join(lines))
    args = ["--max-steps", "1", "--workers", "0", "--val-list", work / "seven.csv"]
    finish(drive(work, *args, "--out", work / "eval"))
    results = []
    for ranks in (1, 2):
        flags = [
            "--task",
            "eval",
            "--init",
            work / "eval/best.pt",
            "--out",
            work / "eval",
            "--val-list",
            work / "seven.csv",
        ]
        results.append(finish(drive(work, *flags, ranks=ranks)))
    assert results[0] == results[1] and "val_clips 7" in results[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(work, number):
    """A signal between two steps: saved, said, status 128 + number; the same command continues from that step."""
    out = work / f"signal-{int(number)}"
    args = ["--max-steps", "4000", "--workers", "2", "--log-every", "1", "--out", out]
    process = drive(work, *args, session=True)
    process.wait_for("loss")
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)  # as a terminal does: to the loader's processes too
    stdout, err = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + number
        and "stopped at step" in stdout
        and "Traceback" not in err
    ), stdout + err
    step = torch.load(out / "last.pt", weights_only=True)["at"]["step"]
    assert f"stopped at step {step};" in stdout
    process = drive(work, *args)
    assert f"steps {step} to 4000" in process.first_line()
    process.kill()
    process.communicate()


def test_signal_on_two_ranks(work):
    """SIGTERM to torchrun: both ranks stop at the same step, and rank 0 saves it."""
    out = work / "signal-two"
    process = drive(work, "--max-steps", "4000", "--workers", "0", "--log-every", "1", "--out", out, ranks=2,
                    real=True)  # fmt: skip
    process.wait_for("loss")
    assert process.poll() is None, process.communicate()
    process.terminate()
    stdout, _ = process.communicate(timeout=60)
    assert "stopped at step" in stdout and (out / "last.pt").exists()


def test_unreadable_videos_are_replaced_alike_everywhere(work):
    """One damaged video of 64: named, replaced by the same other one at any number of workers; counted in the log."""
    folder = work / "damaged"
    folder.mkdir()
    lines = [
        f"{work}/toy/actions/{line}"
        for line in (work / "toy/actions/train.csv").read_text().splitlines()
    ]
    (folder / "bad.mp4").write_bytes(b"not a video")
    (folder / "train.csv").write_text("\n".join([f"{folder}/bad.mp4,left", *lines[1:]]))
    args = ["--max-steps", "8", "--train-list", folder / "train.csv", "--data-root", ".",
            "--val-list", folder / "train.csv", "--task"]  # fmt: skip
    outs = [
        finish(drive(work, *args, "train", "--workers", n, "--out", folder / str(n)))
        for n in (0, 2)
    ]
    assert all(
        out.count("unreadable, replaced by another") == 1 and "bad.mp4" in out for out in outs
    )
    assert equal(weights(folder / "0"), weights(folder / "2"))
    assert losses(folder / "0")[-1] == losses(folder / "2")[-1]
    assert "val_unread 1" in outs[0] and "val_clips 63" in outs[0]


def test_too_many_unreadable_videos_stop_the_run(work):
    """2 of 64 is more than max(1, 1 %): the count, names and the flag; --max-bad allows it."""
    folder = work / "many"
    folder.mkdir()
    lines = [
        f"{work}/toy/actions/{line}"
        for line in (work / "toy/actions/train.csv").read_text().splitlines()
    ]
    for name in ("bad_a.mp4", "bad_b.mp4"):
        (folder / name).write_bytes(b"not a video")
    (folder / "train.csv").write_text(
        "\n".join([f"{folder}/bad_a.mp4,left", f"{folder}/bad_b.mp4,right", *lines[2:]])
    )
    (folder / "val.csv").write_text("\n".join(lines[2:10]))
    args = ["--epochs", "1", "--train-list", folder / "train.csv", "--data-root", ".", "--workers", "2",
            "--val-list", folder / "val.csv", "--out", folder / "out"]  # fmt: skip
    process = drive(work, *args, "--log-every", "100")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert "2 videos" in err and "bad_a.mp4" in err and "bad_b.mp4" in err and "--max-bad" in err


def test_non_finite_loss_stops_with_the_last_good_checkpoint(work):
    """A learning rate that explodes: updates are skipped, clips named, the run stops; the kept weights are finite and
    those of the last step that was good."""
    out = work / "explode"
    args = [
        "--max-steps",
        "60",
        "--lr",
        "1e18",
        "--warmup-epochs",
        "1",
        "--save-minutes",
        "0",
        "--workers",
        "0",
    ]
    process = drive(work, *args, "--out", out, "--max-skipped", "5")
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert (
        "not finite" in stdout
        and ".mp4" in stdout
        and "--max-skipped" in err
        and "last good checkpoint" in err
    )
    state = torch.load(out / "last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["model"].values()) and state["at"]["step"] < 6


def test_one_bad_clip_is_skipped_and_named(work):
    """One step's loss made NaN: that update is skipped, the clip named, everything else goes on."""
    patch = """
loss_of = turbo.turbo_loss
def loss(logits, *rest, calls=[]):
    calls.append(0)
    value, ce, pmae = loss_of(logits, *rest)
    return (value + torch.tensor([float("nan")] + [0.0] * 7) if len(calls) == 2 else value), ce, pmae
turbo.turbo_loss = loss
"""
    out = finish(
        drive(work, "--max-steps", "6", "--workers", "0", "--out", work / "nan", patch=patch)
    )
    assert (
        out.count("updates skipped") == 1 and "1 updates skipped" in out and out.count(".mp4") == 1
    )
    state = torch.load(work / "nan/last.pt", weights_only=True)
    assert (state["at"]["step"], state["at"]["skipped"]) == (6, 1)
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {5.0}


def test_fp16_state_is_in_the_checkpoint(work):
    """The loss scale travels with the run."""
    args = ["--precision", "fp16", "--workers", "0", "--max-steps", "3"]
    finish(drive(work, *args, "--out", work / "half"))
    assert torch.load(work / "half/last.pt", weights_only=True)["scaler"]["scale"] >= 1024


def test_best_is_kept(work):
    """best.pt is of the evaluation with the highest top-1 in the log."""
    finish(
        drive(
            work, "--max-steps", "16", "--eval-every", "1", "--workers", "0", "--out", work / "best"
        )
    )
    top1 = {r["step"]: r["val_top1"] for r in losses(work / "best") if "val_top1" in r}
    state = torch.load(work / "best/best.pt", weights_only=True)
    assert len(top1) == 2 and state["at"]["best"] == max(top1.values()) == top1[state["at"]["step"]]
