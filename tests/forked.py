"""What `python script.py`, `-c code` or `-m module` runs, as forks of a process that has imported
torch: 5 seconds less each. A test of how an interpreter ends needs a real one."""

import atexit
import math
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "av", "tqdm"]
)  # none of our own: a script may have a copy


def run_script(args, cwd, files, env, session):
    """In the fork: stdout and stderr are files; the script's folder is first on the path, and our own is not there."""
    os.environ.update(env)
    # as from a terminal: what a shell runs in the background ignores Ctrl-C, and so would its forks
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    for stream, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    multiprocessing.set_start_method(
        None, force=True
    )  # the script's loader starts its processes as it would anywhere
    tests = Path(__file__).resolve().parent
    known = [path for path in sys.path if Path(path).resolve() not in (tests, tests.parent)]
    os.chdir(cwd)
    if args[0] == "-m":
        run, (_, name, *rest), first = run_module, args, cwd
    elif args[0] == "-c":
        run, (_, name, *rest), first = run_code, args, cwd
    else:
        run, (name, *rest), first = run_path, args, Path(args[0]).resolve().parent
    sys.argv[:] = ["-c" if run is run_code else name, *rest]
    sys.path[:] = [str(first), *known]
    status = run_main(run, name)
    atexit._run_exitfuncs()  # multiprocessing would leave without them
    sys.exit(status)


def run_path(path):
    runpy.run_path(path, run_name="__main__")


def run_module(name):
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_code(code):
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102


def run_main(run, what):
    """What sys.exit was handed; an exception's traceback is printed, and its frames are gone on return, as at an exit:
    with them goes the loader that they hold."""
    try:
        run(what)
    except SystemExit as stop:
        return stop.code
    except BaseException:  # noqa: BLE001, as Python itself at the end of a program
        traceback.print_exc()
        return 1


class Forked:
    """As much of subprocess.Popen as the tests use."""

    def __init__(self, args, cwd, session=False, **env):
        self.folder = tempfile.TemporaryDirectory()  # gone with this object
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.outputs:
            path.touch()
        self.process = FORKS.Process(
            target=run_script, args=(args, cwd, self.outputs, env, session)
        )
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill
        self.terminate = self.process.terminate

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait_for(self, word, times=1, timeout=math.inf):
        """Until stdout has the word that often, or the end, or for `timeout` s; returns stdout."""
        deadline = time.monotonic() + timeout
        text = self.outputs[0].read_text()
        while text.count(word) < times and self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            text = self.outputs[0].read_text()
        return text

    def first_line(self):
        """Of stdout, as soon as it is there; "" at the end."""
        return self.wait_for("\n").partition("\n")[0]

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("script", timeout)
        return tuple(path.read_text() for path in self.outputs)


class Ranks:
    """`torchrun --nproc-per-node=n script *args`: a fork a rank, with the variables that torchrun sets."""

    def __init__(self, n, args, cwd):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        env |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        self.ranks = [Forked(args, cwd, **env, RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]

    @property
    def returncode(self):
        return next((rank.returncode for rank in self.ranks if rank.returncode), 0)

    def communicate(self, timeout):
        """All ranks' output; one that fails, or the timeout, ends the others, which would wait for it."""
        deadline = time.monotonic() + timeout
        while any(rank.poll() is None for rank in self.ranks):
            if self.returncode or time.monotonic() > deadline:
                time.sleep(1)  # others may be about to fail too
                for rank in self.ranks:
                    rank.kill()
            time.sleep(0.02)
        outputs = [rank.communicate() for rank in self.ranks]
        return tuple("".join(parts) for parts in zip(*outputs, strict=True))
