"""tests/cuda.py is right before it meets a GPU: all of it runs here, small, and what must fail in it does."""

import json
import subprocess
import sys
from types import SimpleNamespace

import cuda_checks
import pytest
import torch
from conftest import ROOT

import common

CPU = common.Context(0, 1, torch.device("cpu"), "fp32")


def test_all_of_it_runs_without_a_gpu(tmp_path):
    """Its command, small: no check fails, and no figure passes for a GPU's."""
    values = tmp_path / "values.json"
    command = [sys.executable, ROOT / "tests/cuda.py", "--device", "cpu", "--json", values]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.startswith("no GPU: no figure here is a GPU's")
        and "0 of 28 checks FAILED" in done.stdout
    )
    found = json.loads(values.read_text())
    assert found["gpu"] is False and found["markdown"] in done.stdout
    results = {row["check"]: row["result"] for row in found["checks"]}
    assert set(results.values()) == {"ok", "not measured"}
    for script in ("turbo", "avion", "tpt_mae", "sfa_vivit"):
        assert results[f"runs, {script}, bf16"] == "ok"
        assert results[f"memory, {script}"] == results[f"waits, {script}"] == "not measured"
    assert results["attention, sdpa"] == "ok" and results["attention, flash"] == "not measured"
    assert len(found["steps"]) == 9 and all(
        row["rate"] > 0 and row["mfu"] is None for row in found["steps"]
    )
    assert [
        row["variant"] for row in found["steps"] if "embedded" in row["variant"]
    ]  # VideoMAE's own layout
    table = found["markdown"].split("\n\n")[-1].splitlines()
    assert len(table) == 2 + 9 and len({line.count("|") for line in table}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]


def test_what_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    real = common.attention

    def wrong(q, k, v, kind="auto", **options):
        return real(q, k, v, kind=kind, **options) * (1.1 if kind == "sdpa" else 1.0)

    def broken(clips, keys):
        raise common.UserError("no such thing\nand more")

    monkeypatch.setattr(common, "attention", wrong)
    monkeypatch.setattr(
        cuda_checks,
        "augmentations",
        lambda: [("first", broken), ("second", lambda clips, keys: clips)],
    )
    with pytest.raises(SystemExit) as end:
        cuda_checks.main(
            [
                "--device",
                "cpu",
                "--only",
                "attention",
                "augmentation",
                "--json",
                str(tmp_path / "x.json"),
            ]
        )
    out = capsys.readouterr().out
    assert end.value.code == 1 and "2 of 6 checks FAILED" in out
    assert "FAILED       attention, sdpa: bf16, 98 tokens, width 64: " in out
    assert "FAILED       augmentation, first: UserError: error: no such thing (" in out
    assert "not measured augmentation, second: no GPU" in out


def test_pixels_that_differ_fail(tmp_path):
    """Of 4 x 2 x 3 x 32 x 32 values the first clip's 6,144 are two levels off where the device's keys are used."""
    calls = []

    def function(clips, keys):
        calls.append(keys)
        clips[0] += 2 * (len(calls) - 1)
        return clips

    setting = cuda_checks.Setting(CPU, True, tmp_path)
    with pytest.raises(AssertionError, match="25.00% of the values are more than one level off"):
        cuda_checks.same_pixels(setting, function)


@pytest.mark.parametrize("loss", [1.01, 1.05, None])
def test_a_resumed_run_must_log_the_same(loss, tmp_path, monkeypatch):
    """Exactly on the CPU; on a GPU, where sums have no order, a loss to two in a hundred."""
    setting = cuda_checks.Setting(CPU, True, tmp_path)
    logs = [
        {(3, True): {"loss": 1.0, "seconds": 3.0}},
        {(3, True): {"loss": 1.0 if loss is None else loss, "seconds": 4.0}},
    ]
    monkeypatch.setattr(cuda_checks, "toy_run", lambda *args: [])
    monkeypatch.setattr(cuda_checks, "start", lambda *args, **options: None)
    monkeypatch.setattr(cuda_checks, "finish", lambda *args: "")
    monkeypatch.setattr(cuda_checks, "log_of", lambda setting, out: logs[out.endswith("parts")])
    for cuda, limit in ((False, 1.0), (True, 1.02)):
        setting.cuda = cuda
        if loss and loss > limit:
            with pytest.raises(AssertionError, match="log differs by"):
                cuda_checks.stopped_and_resumed(setting, "turbo", "bf16")
        else:
            assert "loss 1.000" in cuda_checks.stopped_and_resumed(setting, "turbo", "bf16")


def test_no_wait_is_allowed_in_five_steps(monkeypatch, capsys):
    """The last wait of a step is before `advance`, so from the end of step 12 to that of step 17."""
    seen = []
    run = SimpleNamespace(ctx=SimpleNamespace(device=torch.device("cuda"), rank=0))

    def loop(cfg):
        for step in range(1, 21):
            common.Run.advance(run, step, 20)

    monkeypatch.setattr(common.Run, "advance", lambda run, step, total: seen.append(step))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", seen.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(cuda_checks.signal, "raise_signal", lambda number: seen.append("stop"))
    monkeypatch.setitem(
        cuda_checks.SCRIPTS, "turbo", SimpleNamespace(Config=None, RECIPES=None, main=loop)
    )
    monkeypatch.setattr(common, "parse", lambda *args: None)
    cuda_checks.train("turbo", 0, 12, [])
    assert seen == [*range(1, 13), "error", *range(13, 18), "default", 18, 19, 20]
    assert capsys.readouterr().out == f"peak {3 << 30} bytes\n"


def test_the_reason_of_a_script_that_fails():
    """Of a traceback the last line of our own and the error; of a UserError its line."""

    def reason(err):
        process = SimpleNamespace(communicate=lambda timeout: ("step 3/6", err))
        with pytest.raises(AssertionError) as caught:
            cuda_checks.finish(process)
        return str(caught.value)

    frames = 'Traceback:\n  File "/x/turbo.py", line 9, in main\n    x.item()\n  File "/lib/torch/cuda.py", line 1, in f\n'
    assert (
        reason(frames + "RuntimeError: synchronizing\n")
        == "turbo.py:9, main: RuntimeError: synchronizing"
    )
    assert reason("a warning\nerror: no room\n") == "error: no room"
    assert reason("") == "-"
    assert (
        cuda_checks.finish(SimpleNamespace(communicate=lambda timeout: ("complete: 3", "")))
        == "complete: 3"
    )


# Rank 0's checks take 8 s; what waits for another rank gives up after 5 s, unless it was given a time.
SLOW_CHECKS = """
import sys, time
from datetime import timedelta
sys.path[:0] = [{root!r} + "/tests"]
import cuda_checks
import torch.distributed as dist
new_group = dist.new_group
def impatient(backend, timeout=timedelta(seconds=5)):
    return new_group(backend=backend, timeout=timeout)
dist.new_group = impatient
cuda_checks.check_all = lambda *args: time.sleep(8)
cuda_checks.main(["--device", "cpu", "--only", "augmentation", "--json", "values.json"])
"""


def test_other_ranks_wait_for_the_checks(tmp_path):
    """However long rank 0's take."""
    driver = tmp_path / "driver.py"
    driver.write_text(SLOW_CHECKS.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", driver]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "0 of 0 checks FAILED" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("installed", [False, True])
def test_this_folder_does_not_hide_the_package_of_the_same_name(installed, tmp_path):
    """torch imports NVIDIA's `cuda` if it can. A program of tests/ finds that package, or none; not tests/cuda.py."""
    if installed:
        (tmp_path / "cuda/bindings").mkdir(parents=True)
        (tmp_path / "cuda/bindings/__init__.py").write_text("runtime = 'theirs'")
    program = (
        "import sys\nsys.path[:0] = sys.argv[1:]\ntry:\n    from cuda.bindings import runtime\n"
    )
    program += "except ImportError:\n    runtime = 'none'\nprint(runtime)"
    command = [sys.executable, "-S", "-c", program, ROOT / "tests", tmp_path]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == (
        "theirs" if installed else "none"
    )
