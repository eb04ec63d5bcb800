"""Size and decoding time of chunks at equal quality, by encoding: python tests/bench_chunk.py VIDEO ... [--rounds 3]

Each video, with a short side of 288 at most, is played forwards and backwards until it lasts 15 s (a cut would bring a
keyframe), and encoded at two CRFs. All numbers are interpolated to the luma PSNR that x264's defaults reach. Times are
CPU ms of one thread, for 14 random clips: 4 frames spread over one second, read with `data.Video`, which leaves out
frames that nobody wants and nothing refers to. decode: of an open video; read: with opening, and scaling the centre to
224. Medians over clips and rounds, the files taking turns in random order; geometric means over the videos.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

FLAT = "bframes=7:b-pyramid=none:b-adapt=0"  # all B-frames the same: 7 of them, none referred to
BASE = "x264"
TRIED = data.ENCODINGS | {  # name: libx264's options, with a CRF that gives about the quality of the defaults
    "keyint=60": {"crf": "23", "x264-params": "keyint=60"},
    "cabac=0": {"crf": "22.5", "x264-params": "cabac=0"},
    "no-deblock": {"crf": "22.5", "x264-params": "no-deblock=1"},
    "tune fastdecode": {"crf": "22.5", "tune": "fastdecode"},
    "flat": {"crf": "21.5", "x264-params": FLAT},
    "flat, keyint=60": {"crf": "22", "x264-params": f"{FLAT}:keyint=60"},
    "flat, cabac=0, keyint=60": {"crf": "21.5", "x264-params": f"{FLAT}:cabac=0:keyint=60"},
    "flat of 3, cabac=0, keyint=60": {"crf": "22.5", "x264-params": f"{FLAT}:bframes=3:cabac=0:keyint=60"},
    "flat of 11, fastdecode, keyint=60": {
        "crf": "21", "tune": "fastdecode", "x264-params": f"{FLAT}:bframes=11:keyint=60"
    },
    "flat but b-adapt=2, cabac=0, keyint=60": {
        "crf": "22.5", "x264-params": f"{FLAT}:b-adapt=2:cabac=0:keyint=60"
    },
}  # fmt: skip


def piece(path, seconds, short_side):
    """(frames yuv420p, rate) of a video as a chunk holds it, forwards and backwards until `seconds` are full."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        scale = min(1, short_side / min(stream.width, stream.height))
        w, h = (2 * round(side * scale / 2) for side in (stream.width, stream.height))
        need = math.ceil(seconds * stream.average_rate)
        frames = []
        for frame in file.decode(stream):
            frames.append(frame.reformat(w, h, "yuv420p", interpolation="BICUBIC", threads=1))
            if len(frames) == need:
                break
        there_and_back = frames + frames[-2:0:-1]
        return (
            [there_and_back[i % len(there_and_back)].to_ndarray() for i in range(need)],
            stream.average_rate,
            (w, h),
        )


def encode(frames, rate, size, path, options):
    """Writes a chunk; CPU milliseconds a frame."""
    start = time.process_time()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options=options)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode())
    return (time.process_time() - start) * 1000 / len(frames)


def psnr(frames, size, path):
    errors = []
    with av.open(str(path)) as file:
        for picture, frame in zip(frames, file.decode(video=0), strict=True):
            luma = picture[: size[1]].astype(np.int32) - frame.to_ndarray()[: size[1]]
            errors.append(float((luma * luma).mean()))
    return 10 * math.log10(255**2 / statistics.mean(errors))


def clips(path, seed, n=14):
    """CPU milliseconds of n random clips: (decode, read) each."""
    rng, times = random.Random(seed), []
    with data.Video(path) as video:
        info = video.info
        for _ in range(n):
            start = rng.uniform(0, info.duration - 1)
            wanted = [int((start + (i + 0.5) / 4) * info.fps) for i in range(4)]
            began = time.process_time()
            for _ in video._frames(wanted):
                pass
            decoded = time.process_time()
            data.read_clip(path, wanted, 224, data.centre_box(info))
            times.append((1000 * (decoded - began), 1000 * (time.process_time() - decoded)))
    return times


def at(target, curve):
    """Values at a PSNR between, or near, the two of a curve of (psnr, values): their logarithms are about linear."""
    (x, first), *rest = curve
    if not rest:
        return first
    share = (target - x) / (rest[0][0] - x)
    return [a ** (1 - share) * b**share for a, b in zip(first, rest[0][1], strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--only", nargs="+", choices=TRIED, metavar="NAME", help=", ".join(TRIED))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried = [name for name in TRIED if name in (args.only or TRIED) or name == BASE]
    files, times, encoding = {}, defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for v, source in enumerate(args.videos):
            frames, rate, size = piece(source, 15, 288)
            for name in tried:
                for step in [0] if name == BASE else [-1, 1]:
                    path, crf = f"{folder}/{len(files)}.mp4", float(TRIED[name]["crf"]) + step
                    encoding[name].append(
                        encode(frames, rate, size, path, TRIED[name] | {"crf": str(crf)})
                    )
                    files[path] = (name, v, psnr(frames, size, path), crf, os.path.getsize(path))
                    print(*files[path], file=sys.stderr, flush=True)
        for _ in range(args.rounds):
            for path in random.sample(list(files), len(files)):
                times[path] += clips(path, seed=files[path][1])
    table = {}
    for name in tried:
        rows = []
        for v in range(len(args.videos)):
            target = next(quality for n, w, quality, *_ in files.values() if (n, w) == (BASE, v))
            curve = []  # (psnr, (crf, bytes, decode, read)) of each encoding of this video
            for path, (n, w, quality, crf, size) in files.items():
                if (n, w) == (name, v):
                    decode, read = (
                        statistics.median(column) for column in zip(*times[path], strict=True)
                    )
                    curve.append((quality, (crf, size, decode, read)))
            rows.append(at(target, sorted(curve)))
        table[name] = [statistics.geometric_mean(column) for column in zip(*rows, strict=True)]
    _, size, decode, read = table[BASE]
    print(f"{'encoding':40}   crf  bytes  decode ms (faster)  read ms (faster)  encode ms a frame")
    for name, (crf, s, d, r) in table.items():
        print(
            f"{name:40} {crf:5.1f} {s / size:6.2f} {d:10.2f} {decode / d:7.2f} {r:9.2f} {read / r:7.2f}",
            end="",
        )
        print(f"{statistics.mean(encoding[name]):12.1f}")


if __name__ == "__main__":
    main()
