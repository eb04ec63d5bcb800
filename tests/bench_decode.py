"""Clips from videos: this project against other libraries, and against decoding alone.

    pip install -r tests/requirements.txt -r tests/requirements-bench.txt
    python tests/bench_decode.py                          # makes its videos; about five minutes on two idle cores
    python tests/bench_decode.py --videos a.mp4 b.mp4     # your own

CPU time of one thread, files in the page cache, each method in a process of its own. For each clip the methods take
turns, in a new random order each round: medians over rounds, ratios of the same clip, medians over clips. All return
uint8 RGB [T, 3, 224, 224] of the same frames and box, RandomResizedCrop of half to all of the area. A library stands
with the fastest of its ways in that row, found afterwards, which favours it.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path

import av
import bench_peers  # first: it sets the number of threads
import numpy as np
import torch
from bench_peers import OWN, PEERS, SIZE, WAYS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import data

NEAR = 4  # a frame that came is looked for among the NEAR before and after the one asked for
TASKS = {  # name: (fewest frames of a video, indices of a random clip, most times the floor)
    "a: 16 frames, stride 4": (61, lambda r, n: range(s := r.randint(0, n - 61), s + 61, 4), 1.55),
    "b: 4 frames of one second": (
        31,
        lambda r, n: sorted(r.sample(range(s := r.randint(0, n - 30), s + 30), 4)),
        1.35,
    ),
    "c: 32 frames over the video": (
        32,
        lambda r, n: [int((i + 0.5) * n / 32) for i in range(32)],
        1.35,
    ),
    "d: 2 frames": (17, lambda r, n: [s := r.randint(0, n - 17), s + 16], 1.55),
}
VIDEOS = {  # name: (frames at 30 fps, short side, tasks)
    "256p": (300, 256, "acd"),
    "288p": (450, 288, "b"),
    "320p": (300, 320, "ad"),
    "720p": (300, 720, "a"),
    "256p, 60 s": (1800, 256, "c"),
}


def pictures(clips):
    """Frames without end: of real clips, or moving blocks under waves and grain."""
    from test_decode import pictures as blocks

    grain = np.random.default_rng(0)
    for clip in cycle(clips):
        with av.open(str(clip)) as file:
            yield from file.decode(video=0)
    for picture in blocks(10**6, 480, 360, smooth=True):
        noisy = (picture + grain.normal(0, 4, (360, 480, 1))).clip(0, 255)  # [H, W, 3]
        yield av.VideoFrame.from_ndarray(noisy.astype(np.uint8), "rgb24")


def encode(path, clips, n, short):
    """n frames as a video at 30 fps, H.264 by x264's defaults."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        for i, frame in enumerate(islice(pictures(clips), n)):
            if i == 0:
                scale = short / min(frame.width, frame.height)
                stream.width, stream.height = (
                    2 * round(side * scale / 2) for side in (frame.width, frame.height)
                )
            frame = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base, frame.pict_type = i, Fraction(1, 30), 0
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return str(path)


def clips_of(task, path, count):
    info, r = data.probe(path), random.Random(1)
    box = lambda i: data.random_resized_box(info, common.make_key(i), scale=(0.5, 1))
    return [(path, list(TASKS[task][1](r, info.num_frames)), box(i)) for i in range(count)]


class Ways:
    """A process for each way to read clips, {(column, number): pool}; method: how it is started."""

    def __init__(self, columns, method):
        self.context = multiprocessing.get_context(method)
        self.pools = {(name, n): None for name in columns for n in range(len(WAYS[name][2]))}

    def ask(self, way, *request):
        """What `timed` answers."""
        (name, n), self.pools[way] = way, self.pools[way] or self.context.Pool(1)
        try:
            return (
                self.pools[way]
                .apply_async(bench_peers.timed, (WAYS[name][1], WAYS[name][2][n], *request))
                .get(60)
            )
        except multiprocessing.TimeoutError:
            self.pools[way].terminate()
            self.pools[way] = None
            return "failed: it crashed, or takes a minute"

    def measure(self, clips, rounds):
        """They take turns. {way: median CPU ms of each clip, or why it failed}, {way: its clips}."""
        outputs, times = (
            {way: [] for way in self.pools},
            {way: [[] for _ in clips] for way in self.pools},
        )
        for turn in range(rounds + 1):  # the first is not timed: imports; and what comes is checked
            for n, clip in enumerate(clips):
                going = [way for way in times if isinstance(times[way], list)]
                for way in random.sample(going, len(going)):
                    answer = self.ask(way, *clip, turn == 0)
                    if isinstance(answer, str):
                        times[way] = answer
                    elif turn:
                        times[way][n].append(answer[0])
                    else:
                        outputs[way].append(answer[1])
        return {
            way: t if isinstance(t, str) else np.median(t, 1) for way, t in times.items()
        }, outputs


def frames_off(clips, outputs):
    """(frames that are not those asked for, how many places the farthest is off), by likeness to their neighbours."""
    wrong, farthest = 0, 0
    for (path, frames, box), clip in zip(clips, outputs, strict=True):
        last = data.probe(path).num_frames - 1
        near = sorted({j for i in frames for j in range(max(0, i - NEAR), min(last, i + NEAR) + 1)})
        plain = dict(
            zip(near, neighbours(path, tuple(near), box), strict=True)
        )  # {index: [3, 112, 112]}
        for i, got in zip(frames, torch.from_numpy(clip)[:, :, ::2, ::2].float(), strict=True):
            error = {j: (plain[j] - got).square().mean().item() for j in near if abs(i - j) <= NEAR}
            best = min(error, key=error.get)
            if error[i] > 1.05 * error[best] + 0.1:  # else it is the one, or looks the same
                wrong, farthest = wrong + 1, max(farthest, abs(best - i))
    return wrong, farthest


@lru_cache(8)
def neighbours(path, near, box):
    return data.read_clip_decode_then_crop(path, near, (SIZE, SIZE), box)[:, :, ::2, ::2].float()


def quality(path, frames, box, clip):
    """PSNR of a clip's first frame against the float64 picture of tests/test_decode.py."""
    from test_decode import ideal, psnr

    with av.open(path) as file:
        frame = next(islice(file.decode(video=0), frames[0], None))
    matrix = {1: "709", 9: "2020", 10: "2020"}.get(int(frame.colorspace), "601")
    full = int(frame.color_range) == 2 or "yuvj" in frame.format.name
    pictures = [ideal(frame, box, (SIZE, SIZE), matrix, full, left) for left in (True, False)]
    return max(psnr(torch.from_numpy(clip[0]), picture) for picture in pictures)


def row(clips, rounds, ways):
    """({column: cell}, {column: time of ours / its time}) of one line of the table."""
    times, outputs = ways.measure(clips, rounds)
    cells, ratios, total, mine = (
        {},
        {},
        sum(len(frames) for _, frames, _ in clips),
        times["ours", 0],
    )
    if isinstance(mine, str):
        raise SystemExit(f"{clips[0][0]}: {mine}")
    for name in WAYS:
        done = {way: t for way, t in times.items() if way[0] == name and not isinstance(t, str)}
        if not done:
            cells[name] = times.get((name, 0), "not measured")
            continue
        way = min(done, key=lambda way: np.median(done[way]))
        ratios[name] = float(np.median(mine / done[way]))
        cells[name] = f"{ratios[name]:.2f}"
        wrong, farthest = frames_off(clips, outputs[way]) if name != "floor" else (0, 0)
        if wrong:
            cells[name] += f" ({wrong} of {total} frames wrong, by up to {farthest})"
        if name == "ours":
            psnr = min(quality(*clip, out) for clip, out in zip(clips, outputs[way], strict=True))
            cells |= {
                "ours": f"{np.median(mine):.1f}",
                "exact": f"{total - wrong}/{total}, {farthest}, {psnr:.1f} dB",
            }
    best, name = max((ratios.get(name, 0), name) for name in PEERS)  # the fastest
    return cells | {"best peer": f"**{best:.2f}** {name}"}, ratios | {"best": best}


def four_views(clips, rounds):
    """CPU time of four views of one decode, as times one view."""
    spent = {1: [], 4: []}
    for path, frames, _ in clips * (rounds + 1):
        info = data.probe(path)
        views = [
            (frames, SIZE, data.random_resized_box(info, common.make_key(9, k), (0.5, 1)))
            for k in range(4)
        ]
        for count in (1, 4):
            start = time.process_time()
            with data.Video(path) as video:
                video.read_views(views[:count])
            spent[count].append(time.process_time() - start)
    return np.median(np.divide(spent[4], spent[1]))


def read_for(seconds, clips):
    """Clips a second of wall time."""
    start = time.perf_counter()
    for done, (path, frames, box) in enumerate(cycle(clips), 1):
        data.read_clip(path, frames, SIZE, box)
        if (spent := time.perf_counter() - start) > seconds:
            return done / spent


def two_processes(clips, rounds, seconds):
    """Clips a second of two processes, as times one."""
    rates = {1: [], 2: []}
    for count in (1, 2) * rounds:
        with multiprocessing.get_context("fork").Pool(count) as pool:
            rates[count].append(
                sum(pool.starmap(read_for, [(seconds, clips)] * count, chunksize=1))
            )
    return statistics.median(rates[2]) / statistics.median(rates[1])


def loader(clips, rounds, folder, count):
    """CPU and wall time of a batch from the loader with one worker, without its start, as times a plain loop."""
    (folder / "list.csv").write_text(f'"{Path(clips[0][0]).resolve()}",0\n')
    plan = lambda video, index, view, key: clips[key.item() % len(clips)][1:]
    dataset = data.ClipDataset(
        data.VideoList(folder / "list.csv"), plan, SIZE, seed=0, replace=False
    )
    batches = [[(epoch, 0) for epoch in range(n, n + 8)] for n in range(0, 8 * count, 8)]
    usage = lambda: sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    spent = {(way, n): [] for way in ("loop", "loader") for n in (1, count)}
    for way, n in list(spent) * rounds:
        cpu, wall = usage(), time.perf_counter()
        if way == "loop":
            for item in (item for batch in batches[:n] for item in batch):
                frames, box = plan(None, 0, 0, common.make_key(0, *item, 0))
                data.read_clip(clips[0][0], frames, SIZE, box)
        else:
            for batch in data.make_loader(dataset, batches[:n], 1, torch.device("cpu")):
                assert len(batch.clips) == 8
        spent[way, n].append((usage() - cpu, time.perf_counter() - wall))
    loop, loaded = (
        np.median(np.subtract(spent[way, count], spent[way, 1]), 0) for way in ("loop", "loader")
    )
    return loaded / loop


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = [f"Python {platform.python_version()}", f"FFmpeg {av.ffmpeg_version_info}"]
    for name in ("av", "torch", "decord2", "video-reader-rs", "spdl-io", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    where = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return f"{where}; {', '.join(versions)}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--videos", nargs="+", help="measure on these instead of the videos made here"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small video, one round, PyAV only: does it still run?",
    )
    parser.add_argument(
        "--json", type=Path, help="the ratios as a file, of which tests/evidence.py draws bars"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, rounds = time.perf_counter(), 1 if args.quick else 3
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["LD_LIBRARY_PATH"] = bench_peers.library_path(
            folder
        )  # for the processes of the ways
        real = (
            []
            if args.quick
            else sorted((Path(__file__).resolve().parents[2] / "shared/clips").glob("*.mp4"))
        )
        made = {"64p": (70, 64, "abcd")} if args.quick else VIDEOS
        rows = [
            (task, name)
            for name in args.videos or made
            for task in (TASKS if args.videos else made[name][2])
        ]
        paths = {name: name for name in args.videos or ()}
        for n, name in enumerate([] if args.videos else made):
            paths[name] = encode(folder / f"{n}.mp4", real[n:] + real[:n], *made[name][:2])
        print(
            "videos:",
            ", ".join(Path(path).name for path in args.videos or real) or "synthetic",
            flush=True,
        )
        there = {name for name, (package, *_) in WAYS.items() if importlib.util.find_spec(package)}
        ways = (
            Ways([*OWN, "PyAV"], "fork")
            if args.quick
            else Ways([name for name in WAYS if name in there], "spawn")
        )
        columns = ["ours", "exact", "floor", "decode, then crop", "best peer", *PEERS]
        head = [
            "ours, ms",
            "right frames, farthest off, PSNR",
            *(f"/ {name}" for name in columns[2:]),
        ]
        print(f"\n| ours | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
        table, used, shares = [], {}, []
        for task, name in sorted(
            (full, name) for task, name in rows for full in TASKS if full[0] == task[0]
        ):
            info = data.probe(paths[name])
            if info.num_frames < TASKS[task][0]:
                print(f"| {task}, {name} | too short |")
                continue
            slow = min(info.width, info.height) > 400 or (task[0] == "c" and info.num_frames > 600)
            clips = clips_of(task, paths[name], 1 if args.quick else 3 if slow else 6)
            used.setdefault(task[0], clips)
            cells, ratios = row(clips, rounds, ways)
            table.append((task, ratios))
            shares.append(
                {"row": f"{task}, {name}"}
                | {peer: ratios[peer] for peer in columns[3:] if peer in ratios}
            )
            print(
                f"| {task}, {name} | {' | '.join(cells[column] for column in columns)} |",
                flush=True,
            )
        if args.json:
            record = {
                "command": "python tests/bench_decode.py",
                "machine": machine(),
                "rows": shares,
            }
            args.json.write_text(json.dumps(record, indent=1))
        if best := [ratios["best"] for _, ratios in table if ratios["best"]]:
            mean = statistics.geometric_mean(best)
            print(
                f"\nBest peer: geometric mean {mean:.3f} (<= 0.75), worst row {max(best):.2f} (<= 0.88)"
            )
        for task, (_, _, most) in TASKS.items():
            found = [
                f"{ratios['floor']:.2f}" for at, ratios in table if at == task and "floor" in ratios
            ]
            print(f"Floor, {task}: {', '.join(found)} (<= {most})")
        if {"a", "d"} <= used.keys():
            print(
                f"4 views of one decode, d: {four_views(used['d'], rounds):.2f} times one view (<= 1.6)"
            )
            rate = two_processes(used["a"], rounds, 0.2 if args.quick else 4)
            print(
                f"2 processes: {rate:.2f} times the clips a second of 1 (>= 1.8, on 2 idle cores)"
            )
            cpu, wall = loader(used["a"], rounds, folder, 2 if args.quick else 20)
            print(
                f"Loader, 1 worker: {cpu:.2f} times a plain loop's CPU time, {wall:.2f} times its time (<= 1.10)"
            )
    print(f"{time.perf_counter() - start:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
