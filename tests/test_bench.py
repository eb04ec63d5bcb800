"""tests/bench_decode.py still runs, with PyAV as its only peer, and what it measures are the right frames; and so does
tests/bench_train.py, whose numbers fit each other and whose FLOPs are those of a count by hand."""

import ast
import json
import re
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import bench_train as bench
import pytest
import torch

import avion
import common
import data
import tpt_mae
import turbo

CPU = common.Context(0, 1, torch.device("cpu"), "fp32")


def test_decoding_benchmark(cli, tmp_path):
    values = tmp_path / "a.json"
    code, out, err = cli("tests/bench_decode.py", "--quick", "--json", values, timeout=60)
    assert code == 0, err[-2000:]
    head, _, *rows = [line for line in out.splitlines() if line.startswith("|")]
    assert [row[:4] for row in rows] == ["| a:", "| b:", "| c:", "| d:"]
    columns = [name.strip() for name in head.split("|")]
    written = json.loads((tmp_path / "a.json").read_text())["rows"]
    for row, count in zip(rows, (16, 4, 32, 2), strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in row.split("|")), strict=True))
        assert re.fullmatch(
            rf"{count}/{count}, 0, (4[4-9]|5\d)\.\d dB", cells["right frames, farthest off, PSNR"]
        )
        assert all(
            float(cells[f"/ {name}"]) > 0 for name in ("floor", "decode, then crop", "PyAV")
        ), row
        assert cells["/ decord2"] == "not measured"
        ratios = written.pop(0)
        assert ratios.pop("row").startswith(row[2:4])
        assert {name: f"{value:.2f}" for name, value in ratios.items()} == {
            name: cells[f"/ {name}"].split()[0] for name in ("decode, then crop", "PyAV")
        }
    # The loader's is a difference of two times, which at this size may come out below zero.
    for line in ("Best peer: geometric mean", "4 views", "2 processes", "Loader"):
        assert re.search(rf"^{line}.* -?\d+\.\d+ ", out, re.MULTILINE), out


def test_training_benchmark(cli):
    """Its real command line with toy models: all rows, each number there, sums and ratios as the columns say."""
    code, out, err = cli("tests/bench_train.py", "--tiny", "--rounds", "1", timeout=300)
    assert code == 0, err[-2000:]
    where, command, _, *lines = out.splitlines()
    assert re.search(r"\d cores, \d+ threads; torch \d.*, fp32$", where)
    assert (
        command.startswith("`python tests/bench_train.py --tiny --rounds 1`: ")
        and "GFLOP/s" in command
    )
    end = lines.index("")
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]
    groups = {
        title: [row[2:] for row in group] for title, group in groupby(rows, lambda row: row[0])
    }
    tpt = 5 + bool(find_spec("transformers"))
    assert [len(group) for group in groups.values()] == [5, 2, 3, 4, tpt, 3], list(groups)
    for group in groups.values():
        assert group[0][-2] == "baseline"
        for i, (*numbers, against, spread) in enumerate(group):
            rate, step, wait, compute, optimizer, memory, share = map(float, numbers)
            assert (
                wait >= 0 and compute > 0 and optimizer > 0 and 0 < share and spread == "1.00-1.00"
            )
            assert memory > 0 or not Path("/proc/self/status").exists()
            assert (
                step
                == pytest.approx(wait + compute + optimizer, abs=0.3)
                == pytest.approx(2000 / rate, rel=0.02)
            )
            if i:
                assert float(against[:-1]) == pytest.approx(
                    rate / float(group[0][0]), rel=0.02, abs=0.01
                )
    assert len(lines[end:]) == 1 + 2 + 8  # the clips of one decode


def test_flops_are_those_of_a_step():
    """All products with their gradients, but none of the pixels'; the same however attention is computed."""
    rows = {(method, title): dict(rows) for method, title, rows in bench.groups("tiny")}
    embed, n, width, spec = 32 * 1536 * 128, 1 + 32, 128, turbo.MODELS["vit_toy"]
    macs = embed + spec["depth"] * (12 * n * width**2 + 2 * n * n * width) + 101 * width
    whole = rows["turbo", "classes"]["m 0, r 0"](CPU, None)
    assert bench.count_flops(whole) == 2 * (3 * macs - embed)
    plain, efficient, again, half = [
        bench.count_flops(build(CPU, None)) for build in rows["avion", "CLIP"].values()
    ]
    assert plain == efficient == again > half > 0


def test_videomaes_own_layout_computes_the_same():
    """The baseline that embeds all patches and writes attention out: dearer, and the same loss from the same weights."""
    rows = {(method, title): dict(rows) for method, title, rows in bench.groups("tiny")}[
        "tpt", "pretraining"
    ]
    plain, ours = (
        rows[name] for name in ("plain attention, all embedded, 16 frames", "ours, 16 frames")
    )
    assert bench.count_flops(plain(CPU, None)) > bench.count_flops(ours(CPU, None))
    plain, ours = plain(CPU, None), ours(CPU, None)
    plain.net.load_state_dict(ours.net.state_dict())
    inputs = ours.inputs(2)
    torch.testing.assert_close(plain.loss(plain.model, *inputs), ours.loss(ours.model, *inputs))


def test_plan_takes_a_gpu_for_as_fast_as_its_counted_kernels():
    """Steps whose kernels were counted one by one for an H100, beside what --plan makes of their multiply-adds."""
    model = tpt_mae.count_gmacs(
        common.parse(tpt_mae.Config, tpt_mae.RECIPES, ["--recipe", "videomae_k400"]), 2, 16
    )
    assert common.gpu_clips(3 * model[0]) == pytest.approx(1570, rel=0.15)
    model = turbo.count_gmacs(
        common.parse(turbo.Config, turbo.RECIPES, ["--recipe", "ucf101"]), 101, 0.75, 0.25
    )
    assert common.gpu_clips(3 * model[0]) == pytest.approx(1245, rel=0.15)
    cfg = common.parse(
        avion.Config,
        avion.RECIPES,
        ["--recipe", "ego4d", "--attention", "sdpa", "--no-grad-checkpoint"],
    )
    with torch.device("meta"):
        net = avion.build(cfg, "clip").visual
        clips = torch.empty(1, 4, 3, 224, 224, dtype=torch.uint8)
        video = common.count_macs(net, clips, torch.zeros(1, dtype=torch.int64))
    assert common.gpu_clips(3 * video) == pytest.approx(839, rel=0.15)


def test_data_wait_is_measured_behind_a_slow_loader(tmp_path):
    """A loader that takes 0.2 s a batch of two, and steps of almost nothing: the step waits for nearly all of it."""
    bench.film(tmp_path / "film.mp4", 86, 64)
    videos = data.Captions([("film.mp4", 0.0, 10.0, "")] * 8, tmp_path)

    def plan(video, index, view, key):
        time.sleep(0.1)
        return [0], None

    net, cfg = torch.nn.Linear(1, 1), turbo.Config(size=16)
    variant = bench.Variant(
        CPU,
        net,
        cfg,
        1,
        plan,
        lambda model, clips, keys, labels: model(clips[:, 0, 0, :1, 0].float()),
    )
    wait = bench.data_wait(variant, videos, 2, 1)
    assert 0.15 < wait < 1


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.glob("[!t]*.py")), ids=lambda p: p.stem
)
def test_tools_ask_for_what_is_there(path):
    """Benchmarks, evidence and checks that take hours: every name of the six files that they use exists."""
    modules = {"turbo", "avion", "tpt_mae", "sfa_vivit", "common", "data"}
    tree = ast.parse(path.read_text())
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    used = set()
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if named and node.value.id in modules & imported:
            used.add((node.value.id, node.attr))
    missing = [f"{module}.{name}" for module, name in sorted(used)
               if not hasattr(import_module(module), name)]  # fmt: skip
    assert not missing, missing
