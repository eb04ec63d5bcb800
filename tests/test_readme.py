"""Every command of the README runs, word for word where it can, smaller where it needs data or GPUs; so do its snippets,
in an empty folder; its numbers are those of tests/evidence."""

import json
import re
import shlex

import evidence
import pytest
import torch
from conftest import ROOT, command
from torch.distributed.run import parse_args as parse_torchrun

import turbo

SCRIPTS = ("turbo.py", "avion.py", "tpt_mae.py", "sfa_vivit.py")

SMALL = "--max-steps 2 --batch-size 4 --workers 0 --log-every 1"
TOYS = {  # what a toy set of the scripts has for training -> what it has here
    1600: '{"train": 16, "val": 8}',
    480: '{"train": 8, "val": 4}',
    240: '{"train": 4, "val": 2}',
}
MORE = {  # what makes a command small; a flag given twice takes its last value
    "python turbo.py": SMALL,
    "python turbo.py --plan": "--size 64 --drop-path 0",  # test_turbo.py counts and measures at full size
    "python turbo.py --task": "--workers 0",
    "python turbo.py --recipe ucf101 --num-classes": f"{SMALL} --model vit_toy --size 64",
    "python turbo.py --recipe ucf101 --task": "--workers 0",
    "python avion.py": SMALL,
    "python avion.py --task": "--workers 0",
    "python tpt_mae.py": SMALL.replace("2", "4", 1),  # a step a stage
    "python sfa_vivit.py": SMALL,
    "python data.py": "",
    "torchrun": f"{SMALL} --model vit_toy --size 64 --num-classes 8",
}


def commands():
    blocks = re.findall(
        r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    lines = [
        part.split("#")[0].strip()
        for block in blocks
        for line in block.splitlines()
        for part in line.split("&&")
    ]
    return [line for line in lines if re.match(r"(python|torchrun|pip) ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The scripts with a small toy set, and lists and folder by the names that the README uses."""
    work = tmp_path_factory.mktemp("readme")
    for name in ("turbo.py", "avion.py", "tpt_mae.py", "sfa_vivit.py", "common.py", "data.py"):
        source = (ROOT / name).read_text()
        for train, few in TOYS.items():
            source = re.sub(rf'{{"train": {train}, "val": \d+}}', few, source)
        (work / name).write_text(source)
    (work / "tests").symlink_to(ROOT / "tests")
    (work / "UCF-101").symlink_to(work / "toy/actions")
    for label in ("left", "right"):  # a folder per class
        (work / "videos" / label).mkdir(parents=True)
        (work / "videos" / label / "a.mp4").symlink_to(work / "toy/actions/videos/val_00000.mp4")
        for split in ("train", "val"):
            with (work / f"own_{split}.csv").open("a") as rows:
                rows.write(f"{label}/a.mp4,{label}\n" * 2)
    for split in ("train", "val"):
        (work / f"{split}.csv").symlink_to(work / f"toy/actions/{split}.csv")
    torch.save(turbo.Turbo(8, "vit_toy", size=64).state_dict(), work / "videomae.pth")
    return work


def test_commands_run_in_order(folder):
    lines = commands()
    assert len(lines) >= 10 and lines[:2] == ["pip install -r requirements.txt", "python turbo.py"]
    for line in lines:
        words = shlex.split(line)
        if words[0] == "pip" or words[:3] == ["python", "-m", "pytest"]:
            continue  # this test runs by them
        if words[1].startswith("tests/"):  # hours or minutes: their --help
            line = f"python {words[1]} --help"
        elif "--help" not in line and ("--plan" not in line or line.startswith("python turbo.py")):
            more = MORE[
                next(key for key in sorted(MORE, key=len, reverse=True) if line.startswith(key))
            ]
            line = f"{line} {more}".replace("--nproc_per_node=8", "--nproc-per-node=2")
        line, _, target = line.partition(" > ")
        if words[0] == "torchrun":
            parse_torchrun(words[1:])  # its own flags; below, each rank is a fork
        line = line.replace("torchrun", "python -m torch.distributed.run")
        process = command(*shlex.split(line)[1:], cwd=folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{line}\n{out}{err}"
        if target:
            (folder / target.strip()).write_text(out)
    assert (folder / "runs/turbo-toy/recon.png").exists() and (
        folder / "runs/turbo-ucf101/last.pt"
    ).exists()
    assert (folder / "list.csv").read_text() == "left/a.mp4,left\nright/a.mp4,right\n"
    assert (folder / "list.csv.bad").read_text() == "" and (
        folder / "chunks/left/a.mp4/0.mp4"
    ).exists()


def test_files_named_in_the_readme_exist():
    names = set(re.findall(r"`([\w/]+\.(?:py|txt))`", (ROOT / "README.md").read_text()))
    assert {"turbo.py", "avion.py", "tpt_mae.py", "sfa_vivit.py"} <= names
    assert all((ROOT / name).exists() for name in names)


def snippets():
    """The README's Python, each with the files that its first line names."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(re.findall(r"\w+\.py", block.splitlines()[0]), block) for block in blocks]


@pytest.mark.parametrize("files, code", snippets(), ids=lambda value: value[0] if value else "")
def test_snippets_run_beside_the_files_that_they_name(files, code, tmp_path, toy):
    assert files and len(code.splitlines()) <= 9  # its title and eight lines
    for name in files:
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "clip.mp4").symlink_to(toy / "videos/val_00000.mp4")
    process = command("-c", code, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, f"{out}{err}"


def test_evidence_is_what_was_measured():
    """Tables and README say what the JSON files say."""
    written = (ROOT / "tests/evidence/README.md").read_text()
    assert written == evidence.tables()
    text = (ROOT / "README.md").read_text()
    for line in text.splitlines():
        cells = line.strip("| ").split("|")
        if line.startswith("| `") and cells[0].strip(" `") in SCRIPTS:
            numbers = re.findall(r"\d+\.\d+", cells[-1])
            assert numbers, line
            for number in numbers:
                assert f"| {number} " in written, f"{number} of {cells[0]} is not in the tables"
    together = text.split("## Together")[1].split("\n## ")[0]
    numbers = re.findall(r"\d+\.\d+|\d+(?= s\b)", together)
    assert len(numbers) > 12
    written += (ROOT / "tests/evidence/benchmarks.md").read_text()
    for number in numbers:
        assert f"| {number} " in written, f"{number} of Together is not in the tables"


def test_bars_are_of_the_benchmarks_table():
    """Each ratio of decode.json is in its row of benchmarks.md, in the same order."""
    table = (ROOT / "tests/evidence/benchmarks.md").read_text()
    for row in json.loads((ROOT / "tests/evidence/decode.json").read_text())["rows"]:
        name = row.pop("row")
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        found = re.findall(r"\d+\.\d+", line.removeprefix(f"| {name} "))
        floor, crop, best, *peers = found
        assert [f"{ratio:.2f}" for ratio in row.values()] == [crop, *peers], name
        assert float(best) == max(list(row.values())[1:]) and float(floor) > 1


def test_pages_are_short():
    text = (ROOT / "README.md").read_text().splitlines()
    pictures = list((ROOT / "tests/evidence").glob("*.png"))
    assert len(text) <= 250 and sum(path.stat().st_size for path in pictures) <= 300_000
