"""What several test files share: the repository on the path, a small toy set, and the scripts' real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole runs take two processes (pytest-xdist); `-n 0` takes one, and so does naming a file."""
    is_worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    if not is_worker and config.getoption("numprocesses", None) is None and config.args_source.name != "ARGS":
        config.option.numprocesses, config.option.dist = 2, "worksteal"


# A tiny model on the toy videos: what a test of the loop needs, in a second or two a run.
TINY = ["--epochs", "2", "--batch-size", "4", "--workers", "0", "--log-every", "1", "--eval-every", "1"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of a small toy `actions` set: 16 training and 8 validation videos, two and one of each motion."""
    import data

    return data.make_toy(tmp_path_factory.mktemp("toy"), "actions", counts={"train": 16, "val": 8})


@pytest.fixture
def toy_args(toy):
    """Flags that train on the small toy set."""
    return ["--train-list", toy / "train.csv", "--val-list", toy / "val.csv", "--data-root", toy, *TINY]


def command(*args, env=None, **options):
    """Start `python *args` from the repository with one thread; returns the Popen, output captured as text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, **(pipes | options))


@pytest.fixture
def cli():
    """Run `python *args` to its end: (exit status, stdout, stderr)."""

    def run(*args, timeout=120, **options):
        process = command(*args, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err

    return run


@pytest.fixture
def fails(cli):
    """Run a command that must end with one clear line that holds `words`, without a traceback."""

    def run(args, *words, status=1):
        code, out, err = cli(*args)
        assert code == status, out + err
        assert "Traceback" not in err, err
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, err
        assert all(word in err for word in words), err
        return lines[0]

    return run
