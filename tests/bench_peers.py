"""How each library reads a clip in tests/bench_decode.py: its best way at one thread, as far as we know it.

A way is called as read(path, frames, box, *options) and returns uint8 RGB [T, 3, 224, 224]. Libraries are imported by
their first call, in a process that they have for themselves.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported, in the benchmark and in the processes of the ways
)

import av
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

SIZE = 224


def crop_and_resize(clip, box):
    """Where a library has no crop to a box: uint8 [T, 3, H, W] -> [T, 3, 224, 224]."""
    x, y, w, h = box
    return F.interpolate(
        clip[:, :, y : y + h, x : x + w], (SIZE, SIZE), mode="bilinear", antialias=True
    )


def ours(path, frames, box):
    return data.read_clip(path, frames, SIZE, box)


def decode_then_crop(path, frames, box):
    return data.read_clip_decode_then_crop(path, frames, (SIZE, SIZE), box)


@functools.cache
def needed(path, frames):
    """Of the video: its codec's name and extradata, and runs of packets that must be decoded for these frames."""
    with av.open(path) as file:
        context = file.streams.video[0].codec_context
        packets = [packet for packet in file.demux(video=0) if packet.size]
        name, extra, runs = context.name, context.extradata, {}
    shown = sorted((p.pts, n) for n, p in enumerate(packets) if not p.is_discard)
    wanted = sorted({shown[i][1] for i in frames})
    for n in wanted:  # {keyframe: the last frame that is decoded from it}
        runs[max(k for k in range(n + 1) if packets[k].is_keyframe)] = n
    drop = [name == "h264" and data._droppable(p, name, (extra[4] & 3) + 1) for p in packets]
    return (
        name,
        extra,
        [
            [packets[n] for n in range(a, b + 1) if n in wanted or not drop[n]]
            for a, b in runs.items()
        ],
    )


def floor(path, frames, box):
    """Decoding only: packets in memory, from the keyframe before a wanted frame; what nobody needs is left out."""
    name, extra, runs = needed(path, tuple(frames))  # listed in the first call, which is not timed
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata, decoder.thread_count, decoder.thread_type = extra, 1, "NONE"
    for packets in runs:
        decoder.flush_buffers()
        for packet in (*packets, None):
            decoder.decode(packet)


def pyav(path, frames, box, each):
    """Seek once, or before each wanted frame; then decode on. A constant rate tells which frame is which."""
    clip = {}
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
        tick, begin = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
        for i in sorted(set(frames)):
            if each or not clip:
                file.seek(int(begin + i * tick), stream=stream)
                decoded = file.decode(stream)
            frame = next(frame for frame in decoded if frame.pts >= begin + (i - 0.5) * tick)
            clip[i] = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, 3]
    return crop_and_resize(torch.stack([clip[i] for i in frames]).permute(0, 3, 1, 2), box)


def decord2(path, frames, box):
    """It can scale, but before a crop only: a box that is another by rounding, and faster at 720p alone, by 12 %."""
    import decord

    clip = decord.VideoReader(path, num_threads=1).get_batch(frames).asnumpy()  # [T, H, W, 3]
    return crop_and_resize(torch.from_numpy(clip).permute(0, 3, 1, 2), box)


def video_reader_rs(path, frames, box, fallback):
    """fallback: None lets it choose between seeking and reading through; False is seeking."""
    import video_reader

    x, y, w, h = box
    crop = f"crop={w}:{h}:{x}:{y},scale={SIZE}:{SIZE}:flags=bilinear,format=yuv420p"  # it asks for yuv420p
    reader = video_reader.PyVideoReader(path, threads=1, filter=crop)
    return torch.from_numpy(reader.get_batch(frames, with_fallback=fallback)).permute(0, 3, 1, 2)


def spdl_io(path, frames, box, native):
    """native: crop and scale in its filters, which costs more than it saves where frames are small."""
    import spdl.io

    x, y, w, h = box
    crop = f"crop={w}:{h}:{x}:{y},scale={SIZE}:{SIZE}:flags=bilinear," if native else ""
    decoded = spdl.io.sample_decode_video(
        spdl.io.demux_video(path), frames, filter_desc=f"{crop}format=pix_fmts=rgb24"
    )
    clip = torch.from_numpy(spdl.io.to_numpy(spdl.io.convert_frames(decoded))).permute(0, 3, 1, 2)
    return clip if native else crop_and_resize(clip, box)


def torchcodec(path, frames, box, mode):
    """Its own crops are centred or random, not of a given box; made to take one, they were no faster."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode)
    return crop_and_resize(decoder.get_frames_at(frames).data, box)


WAYS = {  # column: (package, function, its options, one set for each way)
    "ours": ("av", ours, [()]),
    "floor": ("av", floor, [()]),
    "decode, then crop": ("av", decode_then_crop, [()]),
    "PyAV": ("av", pyav, [(False,), (True,)]),
    "decord2": ("decord", decord2, [()]),
    "video-reader-rs": ("video_reader", video_reader_rs, [(None,), (False,)]),
    "spdl-io": ("spdl", spdl_io, [(True,), (False,)]),
    "torchcodec exact": ("torchcodec", torchcodec, [("exact",)]),
    "torchcodec approximate": ("torchcodec", torchcodec, [("approximate",)]),
}
OWN, PEERS = list(WAYS)[:3], list(WAYS)[3:]


def timed(read, options, path, frames, box, keep):
    """(CPU ms, the clip as an array if it is to be kept), or a text: why it failed. Runs in the process of a way."""
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # some libraries would print their stack when the process is ended
    try:
        start = time.process_time()
        clip = read(path, frames, box, *options)
        spent = 1000 * (time.process_time() - start)
        assert clip is None or (
            clip.shape == (len(frames), 3, SIZE, SIZE) and clip.dtype == torch.uint8
        )
        return spent, clip.numpy() if keep and clip is not None else None
    except BaseException as error:  # noqa: BLE001, a panic of Rust is no Exception
        what = "not measured" if isinstance(error, ImportError | OSError) else "failed"
        reason = re.sub(r"\S*/|\|", "", " ".join(str(error).split()))  # without paths
        return f"{what}: {type(error).__name__}: {reason[:80]}"


def library_path(folder):
    """Search path for peers that bring no FFmpeg, or don't find theirs: PyAV's under its plain names, for all alike."""
    bundles = [bundle for place in sys.path for bundle in Path(place).glob("*.libs")]
    for library in (
        file for bundle in bundles if bundle.name == "av.libs" for file in bundle.glob("lib*.so.*")
    ):
        name, _, version = library.name.partition(
            ".so."
        )  # libavcodec-5e6b81c2.so.62.28.102 -> libavcodec.so.62
        with contextlib.suppress(FileExistsError):
            (folder / f"{name.split('-')[0]}.so.{version.split('.')[0]}").symlink_to(library)
    bundles = [
        str(bundle) for bundle in bundles if bundle.name in ("av.libs", "video_reader_rs.libs")
    ]
    return os.pathsep.join(
        [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), str(folder), *bundles]
    )
