"""What several test files share: the repository on the path, a small toy set, and the scripts' real command line."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # before torch looks: tests are of the CPU, tests/cuda.py is of a GPU
)

import pytest
from forked import Forked, Ranks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Whole runs take two processes (pytest-xdist); `-n 0` takes one, and so does naming a file."""
    is_worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    if (
        not is_worker
        and config.getoption("numprocesses", None) is None
        and config.args_source.name != "ARGS"
    ):
        config.option.numprocesses, config.option.dist = 2, "worksteal"


# Begun last, one of these would keep one of the two processes busy alone.
LONG = (
    "test_ten_kills",
    "test_commands_run_in_order",
    "test_all_of_it_runs_without_a_gpu",
    "test_training_benchmark",
    "test_two_ranks_compiled",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name not in LONG)


# A tiny model on the toy videos: what a test of the loop needs, in a second or two a run.
TINY = [
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--eval-every",
    "1",
]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of a small toy `actions` set: 16 training and 8 validation videos, two and one of each motion."""
    import data

    return data.make_toy(tmp_path_factory.mktemp("toy"), "actions", counts={"train": 16, "val": 8})


@pytest.fixture(scope="session")
def narrated(tmp_path_factory):
    """Folder of a small toy `narrated` set: 4 training and 2 validation videos, of 8 captions each."""
    import data

    folder = tmp_path_factory.mktemp("narrated")
    return data.make_toy(folder, "narrated", counts={"train": 4, "val": 2})


@pytest.fixture
def toy_args(toy):
    """Flags that train on the small toy set, on clips of 32 x 32: half the time of a run is pictures and checkpoints."""
    lists = ["--train-list", toy / "train.csv", "--val-list", toy / "val.csv", "--data-root", toy]
    return [*lists, *TINY, "--size", 32]


def command(*args, cwd=ROOT, real=False, session=False):
    """Start `python *args` from the repository with one thread; returns the Popen, output captured as text.

    It is a fork, which spares it the imports, and so is each rank of torchrun, unless `real`: then
    torchrun starts them itself. session: with a process group of its own."""
    args = [str(arg) for arg in args]
    if args[:2] != ["-m", "torch.distributed.run"] or real:
        return Forked(args, str(cwd), session)
    first = next(i for i, arg in enumerate(args) if arg.endswith(".py"))
    ranks = next(int(arg.partition("=")[2]) for arg in args if arg.startswith("--nproc-per-node="))
    return Ranks(ranks, args[first:], str(cwd))


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


@pytest.fixture(scope="session")
def by_hand():
    """common.block_bytes worked out, for --plan: measuring a real block takes a second or ten. In half precision 16
    bytes of each token and channel: the inputs of the two norms and their outputs, 2 each, q, k and v, 6, attention's
    output, 2; and the MLP's hidden layer before and after its activation. That is what is measured on a small block."""
    import common

    measured = common.block_bytes

    def worked_out(cfg, block, depth, shape, *args):
        assert cfg.precision != "fp32"
        if block.attn.kind == "plain":
            return measured(cfg, block, depth, shape, *args)
        tokens, width = shape
        one = tokens * (16 * width + 4 * block.mlp.fc1.out_features)
        kept = 2 * tokens * width if cfg.grad_checkpoint else one
        return depth * kept + one * 4 / 3

    for recomputed, depth in ((False, 5), (True, 5), (True, 0)):
        cfg = SimpleNamespace(precision="bf16", grad_checkpoint=recomputed)
        case = cfg, common.Block(128, 2, 3), depth, (64, 128)
        assert measured(*case) == pytest.approx(worked_out(*case), rel=0.02)
    return worked_out


@pytest.fixture
def blocks_by_hand(by_hand, monkeypatch):
    import common

    monkeypatch.setattr(common, "block_bytes", by_hand)
