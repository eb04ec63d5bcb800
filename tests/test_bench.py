"""tests/bench_decode.py still runs, with PyAV as its only peer, and what it measures are the right frames."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_decoding_benchmark():
    command = [sys.executable, "tests/bench_decode.py", "--quick"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[:4] for row in rows] == ["| a:", "| b:", "| c:", "| d:"]
    columns = [name.strip() for name in head.split("|")]
    for row, count in zip(rows, (16, 4, 32, 2), strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in row.split("|")), strict=True))
        assert re.fullmatch(rf"{count}/{count}, 0, (4[4-9]|5\d)\.\d dB", cells["right frames, farthest off, PSNR"])
        assert all(float(cells[f"/ {name}"]) > 0 for name in ("floor", "decode, then crop", "PyAV")), row
        assert cells["/ decord2"] == "not measured"
    for line in ("Best peer: geometric mean", "4 views", "2 processes", "Loader"):
        assert re.search(rf"^{line}.* \d+\.\d+ ", done.stdout, re.MULTILINE), done.stdout
