"""Runs with loader processes to which something happens at a random time.

    python tests/chaos.py raise --times 20      an exception in a random process, thread and line
    python tests/chaos.py full --times 20       shared memory, the temporary folder or the disk of the run is full
    python tests/chaos.py kill --times 20 --script avion tpt_mae        SIGKILL, and the same command again

It is no test of pytest's, because a round takes a quarter of a minute.
raise, full: turbo.py on two ranks. Every run must end within 60 s, with a word on why unless it is complete, with no
process left, and with checkpoints that can be read. A round that fails prints its seed; `--seed N --times 1` repeats
it, but for the machine's own timing. Needs Linux, and to be root: each file system that is filled is a small one of
this script's own, in a mount namespace that nobody else sees.
kill: a script's default command, 160 steps of it. Its weights and logged values must be those of a run that nobody
killed, bit for bit.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0  # seconds from the trouble to the end of the run

# What Python runs first in each process of the run (PYTHONPATH): a thread that waits for a file to appear, and then
# raises in a thread of the process that the round has drawn: rank r itself, or one that it forks, a loader process.
HOOK = """
import builtins, ctypes, json, os, random, sys, threading, time

plan = json.loads(os.environ["CHAOS"])
forks = late = 0

def wait(delay):
    rng = random.Random(plan["seed"])
    while not os.path.exists(plan["signal"]):
        time.sleep(0.01)
    time.sleep(delay)
    threads = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    victim = rng.choice(threads) if rng.random() < 0.3 else threading.main_thread()
    print(f"chaos: {plan['error']} in {victim.name} of process {os.getpid()}", file=sys.stderr, flush=True)
    error = ctypes.py_object(getattr(builtins, plan["error"]))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), error)

def start(delay=0):
    threading.Thread(target=wait, args=[delay], daemon=True).start()

def count():
    global forks, late
    forks += 1
    late += os.path.exists(plan["signal"])

def child():
    if plan["fork"] == forks or (plan["fork"] == "late" and late == 1):
        start(plan["delay"])

if os.environ.get("RANK") == str(plan["rank"]):
    if plan["fork"]:
        os.register_at_fork(before=count, after_in_child=child)
    else:
        start()
"""


def mount(folder, size):
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=2000", "tmpfs", folder], check=True
    )


def fill(folder, spare):
    """Leaves `spare` bytes of a file system; or no room for one more file, where `spare` is None."""
    if spare is None:
        for n in range(10**6):
            try:
                (folder / f"chaos{n}").touch()
            except OSError:
                return
    path = folder / "chaos"
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    os.truncate(path, max(0, path.stat().st_size - spare))


def processes(mark):
    """Those whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def tracebacks(text):
    """How many there are, without torchrun's own of a rank that failed."""
    blocks = re.split(
        r"^(?:\[rank\d\]: )?Traceback \(most recent call last\):$", text, flags=re.MULTILINE
    )[1:]
    return sum("ChildFailedError" not in block for block in blocks)


def check_files(out):
    """What is wrong with the files of the run, in words."""
    import common

    for name in ("last.pt", "best.pt"):
        if (out / name).exists():
            try:
                common.load_checkpoint(out / name)
            except common.UserError as error:
                return str(error)
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    for line in lines[:-1]:
        json.loads(line)
    return ""


def one_round(mode, seed, work, toy):
    """(what happened, what is wrong with it or "")."""
    rng = random.Random(seed)
    disk, temporary, hook = work / "disk", work / "tmp", work / "hook"
    shm = Path("/dev/shm")
    sizes = {disk: "64m", temporary: "8m", shm: "64m"}
    for folder, size in sizes.items():
        mount(folder, size)
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK if mode == "raise" else "")
    go, output = work / "go", work / "output"
    go.unlink(missing_ok=True)
    plan = {
        "seed": seed,
        "signal": str(go),
        "rank": rng.randrange(2),
        "fork": rng.choice(
            (0, 0, 1, 2, "late")
        ),  # 1 and 2 load for training; after the signal, for an evaluation
        "error": rng.choice(
            ("RuntimeError", "OSError", "StopIteration", "MemoryError", "KeyError")
        ),
        "delay": rng.uniform(0, 0.5),
    }
    target = rng.choice((disk, temporary, shm))
    spare = rng.choice((0, 4096, 1 << 16, None))
    from_start = rng.random() < 0.2
    delay = rng.uniform(0, 5)
    what = (
        f"{target.name} is full, but for {spare} B"
        if mode == "full"
        else "{error} in rank {rank}, fork {fork}".format(**plan)
    )
    env = os.environ | {
        "CHAOS": json.dumps(plan),
        "PYTHONPATH": str(hook),
        "TMPDIR": str(temporary),
    }
    env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        ROOT / "turbo.py",
    ]
    command += [
        "--train-list",
        toy / "train.csv",
        "--val-list",
        toy / "val.csv",
        "--data-root",
        toy,
    ]
    command += [
        "--epochs",
        "8",
        "--batch-size",
        "4",
        "--workers",
        "2",
        "--log-every",
        "1",
        "--eval-every",
        "1",
    ]
    command += ["--save-minutes", "0", "--out", disk / "run"]
    with open(output, "w") as file:
        run = subprocess.Popen(
            command, env=env, cwd=work, stdout=file, stderr=file, start_new_session=True
        )
    try:
        began = time.monotonic()
        while not from_start and run.poll() is None and "loss" not in output.read_text():
            time.sleep(0.05)
            if time.monotonic() - began > 120:
                return what, "no step in 120 s"
        time.sleep(delay)
        go.touch()
        if mode == "full":
            fill(target, spare)
        began = time.monotonic()
        try:
            run.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return what, f"still there after {LIMIT:g} s"
        took = time.monotonic() - began
        text = output.read_text()
        lines, traces = text.count("error: "), tracebacks(text)
        what += f", {'from the start' if from_start else 'in training'} + {delay:.1f} s: ended after {took:.1f} s, "
        what += "" if mode == "full" or "chaos: " in text else "not raised, "
        what += f"status {run.returncode}, {lines} error lines, {traces} tracebacks"
        if run.returncode and not lines + traces:
            return what, "ended without a word"
        while processes(str(go).encode()):
            if time.monotonic() - began > took + 10:
                return what, f"left behind: {processes(str(go).encode())}"
            time.sleep(0.2)
        return what, check_files(disk / "run")
    finally:
        for pid in processes(str(go).encode()):
            os.kill(pid, signal.SIGKILL)
        run.wait()
        for folder in sizes:
            subprocess.run(["umount", "-l", folder], check=True)


def records_of(out):
    """The log without what differs from run to run: its header and times."""
    path = out / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # the last line may be half written
    records = [json.loads(line) for line in whole.splitlines()]
    times = {"seconds", "clips_per_second", "data_wait"}
    return [{key: r[key] for key in r.keys() - times} for r in records if "config" not in r]


def results(out):
    """({file: weights}, records) of a complete run and of what follows it, as out_ft."""
    import torch

    folders = sorted(out.parent.glob(f"{out.name}*"))
    files = [path for folder in folders for path in sorted(folder.glob("*.pt"))]
    loaded = [torch.load(path, weights_only=True)["model"] for path in files]
    names = [str(path.relative_to(out.parent)).removeprefix(out.name) for path in files]
    return dict(zip(names, loaded, strict=True)), [records_of(folder) for folder in folders]


def killed(script, times, rng, work):
    """What is wrong with a run that was killed so often, or ""."""
    import torch

    def start(name):
        command = [sys.executable, ROOT / f"{script}.py", "--out", work / name, "--workers", "1"]
        command += ["--max-steps", "160", "--log-every", "3", "--save-minutes", "0.002"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(work / "output", "a") as file:
            return subprocess.Popen(command, env=env, cwd=work, stdout=file, stderr=file)

    def kill(run):
        if run.poll() is not None:
            raise RuntimeError(f"a run ended with status {run.returncode} before its kill")
        run.kill()
        run.wait()

    def logged():
        return sum(len(records_of(folder)) for folder in work.glob("cut*"))

    for _ in range(2):  # while the toy videos are made
        run = start("cut")
        time.sleep(rng.uniform(5, 15))
        kill(run)
    if start("whole").wait():
        return "the run that nobody killed failed"
    counts = []
    for _ in range(times - 2):
        run = start("cut")
        more = rng.randint(0, 4)
        goal = logged() + more
        while run.poll() is None and logged() < goal:
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 1 if more else 10))
        kill(run)
        counts.append(logged())
    if start("cut").wait():
        return "the last life failed"
    print(f"{script}: killed {times} times; records at the kills {counts}", flush=True)
    (whole, records), (cut, again) = results(work / "whole"), results(work / "cut")
    if whole.keys() != cut.keys():
        return f"files {sorted(cut)}, not {sorted(whole)}"
    for name, state in whole.items():
        if not all(torch.equal(state[key], cut[name][key]) for key in state):
            return f"{name} has other weights"
    return "" if records == again else "the log has other values"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("raise", "full", "kill"))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument(
        "--seed",
        type=int,
        default=time.time_ns() % 10**6,
        help="of the first round; then one more each",
    )
    parser.add_argument("--script", nargs="+", default=["turbo"], help="of kill")
    parser.add_argument("--show", action="store_true", help="what each run printed")
    args = parser.parse_args()
    if args.mode == "kill":
        wrongs = []
        for script in args.script:
            with tempfile.TemporaryDirectory(prefix="chaos-") as work:
                wrongs.append(killed(script, args.times, random.Random(args.seed), Path(work)))
            print(f"{script}, seed {args.seed}: {wrongs[-1] or 'bit for bit as never killed'}")
        sys.exit(any(wrongs))
    if "CHAOS_MOUNTS" not in os.environ:
        os.environ["CHAOS_MOUNTS"] = "own"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    sys.path.insert(0, str(ROOT))
    import data

    work, failed = Path(tempfile.mkdtemp(prefix="chaos-")), []
    try:
        toy = data.make_toy(work / "set", "actions", counts={"train": 16, "val": 8})
        for seed in range(args.seed, args.seed + args.times):
            what, wrong = one_round(args.mode, seed, work, toy)
            print(f"seed {seed}: {what}{': WRONG: ' + wrong if wrong else ''}", flush=True)
            if wrong:
                failed.append(seed)
            if wrong or args.show:
                print((work / "output").read_text())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{args.times - len(failed)} of {args.times} rounds of {args.mode} are right{f'; not {failed}' * bool(failed)}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
