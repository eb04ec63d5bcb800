"""Video in, tensors out: fused decode-crop, frame sampling, lists, chunks, the loader, on-device augmentation, toys.

Decoding, the first section, is AVION's second contribution (Zhao and Krähenbühl, "Training a Large Video Model on a
Single Machine in a Day", Sec. 4.2, Eqs. 1-2, Fig. 8) taken further: crop inside the decoder, decode nothing that the
clip doesn't need, and never return a frame other than the one asked for. `Video`, with the helpers above it, can be
copied into another project: it needs torch, av (PyAV) and numpy, keeps no global state, prints nothing, runs one
thread.

    info = data.probe("clip.mp4")                                # sizes, frame rate, exact number of frames
    clip = data.read_clip("clip.mp4", [0, 4, 8, 12], size=224)   # uint8 [4, 3, 224, 224]
    with data.Video("clip.mp4") as v:                            # one open and one pass over the packets for all reads
        a, b = v.read_views([([0, 8], 224, (0, 0, 240, 240)), ([4, 8], (112, 112), None)])

Shapes: T frames, C = 3 colours (R, G, B), H rows, W columns.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from common import UserError, make_key, permutation, uniform

try:
    import fcntl
except ImportError:
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
import stat
from bisect import bisect_left, bisect_right
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

# ----------------------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------------------

MAX_PIXELS = 1 << 26  # of a frame: 8192x8192. A damaged header may claim anything, and the decoder would allocate it
# Only local files and only containers of video: without this, a text file that lists other files or addresses is a
# video to FFmpeg.
OPEN = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,m4v,mxf,rm,dv,gif,ivf,obu",
    "max_pixels": str(MAX_PIXELS),
}
# FFmpeg looks into a file by decoding its first frames; what these containers and codecs say in their headers is
# enough, and can be checked (`Video._provable`).
OPEN_FAST = OPEN | {"skip_frame": "all", "analyzeduration": "0", "probesize": "32"}
FAST_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
FAST_CODECS = ("h264", "hevc", "vp9", "av1")
KEEP_BYTES = 256 << 20  # packets of a video up to this size stay in memory; those of a larger one are read again

# Planar formats of which a crop is a view, with the log2 of their chroma subsampling (horizontal, vertical).
PLANAR = {
    f"yuv{j}{name}p{depth}": shift
    for name, shift in {"420": (1, 1), "422": (1, 0), "444": (0, 0)}.items()
    for j, depth in (("", ""), ("j", ""), ("", "10le"), ("", "12le"))
} | {"gray": (0, 0), "gray10le": (0, 0), "gbrp": (0, 0), "gbrp10le": (0, 0)}


class VideoError(Exception):
    """A video, or a frame of it, that can't be read. `path` and `reason`; str() is one line of both."""

    def __init__(self, path, reason):
        super().__init__(path, reason)  # the arguments are kept for pickling: workers hand errors to the trainer
        self.path, self.reason = path, reason

    def __str__(self):
        name = os.fsencode(self.path).decode("utf-8", "backslashreplace").replace("\n", "\\n")
        return f"{name}: {self.reason}"


class VideoInfo(NamedTuple):
    """What `probe` tells of a video."""

    width: int  # pixels as shown, after rotation
    height: int
    fps: float  # frames a second, the mean over the video
    num_frames: int  # frames that a sequential decode shows; exact
    duration: float  # seconds from the first frame shown to the end of the last
    rotation: int  # degrees clockwise that were applied to the coded picture to show it upright
    codec: str


@contextmanager
def _errors(path, doing):
    """Whatever FFmpeg raises becomes a VideoError of one line."""
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError(path, f"{doing}: {error.strerror or error}; the file is damaged or not a video") from error
    except (ValueError, MemoryError, OverflowError) as error:
        raise VideoError(path, f"{doing}: {type(error).__name__} {error}; the file is damaged") from error


def _bits(nal):
    """Reader of a NAL unit's fields after its header: n bits for n > 0, an Exp-Golomb code for None."""
    data = bytes(nal).replace(b"\0\0\3", b"\0\0")
    text, at = "".join(f"{b:08b}" for b in data), 0

    def read(n=None):
        nonlocal at
        if n is None:
            zeros = text.index("1", at) - at
            at, n = at + zeros, zeros + 1
            return read(n) - 1
        at += n
        if at > len(text):
            raise ValueError("out of bits")
        return int(text[at - n : at], 2)

    return read


def _h264_frame_size(avcc):
    """(width, height) from the one SPS of an avcC record; None unless each packet is sure to hold one whole frame."""
    try:
        if avcc[0] != 1 or avcc[5] & 31 != 1:
            return None
        sps = avcc[8 : 8 + int.from_bytes(avcc[6:8], "big")]
        read, chroma, separate = _bits(sps[4:]), 1, 0
        read()  # seq_parameter_set_id
        if sps[1] in (100, 110, 122, 244, 44, 83, 86, 118, 128):
            chroma = read()
            separate = read(1) if chroma == 3 else 0
            read(), read(), read(1)
            if read(1):  # scaling matrices: legal, rare, and long to parse
                return None
        read()
        poc_type = read()
        if poc_type == 0:
            read()
        elif poc_type == 1:
            read(1), read(), read()
            for _ in range(read()):
                read()
        read(), read(1)
        width, height = 16 * (read() + 1), 16 * (read() + 1)
        if not read(1):  # not frame_mbs_only: the two fields of a frame may come in packets of their own
            return None
        read(1)
        if read(1):
            x = 2 if chroma in (1, 2) and not separate else 1
            y = 2 if chroma == 1 and not separate else 1
            width, height = width - x * (read() + read()), height - y * (read() + read())
        return width, height
    except (ValueError, IndexError):
        return None


def _nals(packet, length_size):
    """Each NAL unit of a length-prefixed packet, as a view of its bytes."""
    data, at = memoryview(packet), 0
    while at + length_size < len(data):
        n = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        if n:
            yield data[at : at + n]
        at += n


def _droppable(packet, codec, length_size, top):
    """True if no frame of the video refers to that of this packet, and it can be left out.

    H.264: nal_ref_idc, the two bits after the first, is 0. HEVC: a sub-layer non-reference picture (even types below
    16) of the topmost temporal layer. B-frames that others refer to (b-pyramid) are not droppable, rightly.
    """
    for nal in _nals(packet, length_size):
        if codec == "h264" and nal[0] & 31 in (1, 5):
            return nal[0] & 0x60 == 0
        if codec == "hevc" and nal[0] >> 1 & 63 < 32:
            return nal[0] >> 1 & 63 in range(0, 16, 2) and nal[1] & 7 == top
    return False


def _vp9_shows(packet):
    """True if a VP9 packet surely shows a frame: its last one has show_existing_frame or show_frame."""
    data = memoryview(packet)
    marker, at = data[-1], 0
    if marker >> 5 == 0b110:  # a superframe: hidden frames, then the shown one; their sizes stand at the end
        width, count = (marker >> 3 & 3) + 1, (marker & 7) + 1
        index = len(data) - 2 - width * count
        if index > 0 and data[index] == marker:
            at = index - int.from_bytes(data[-1 - width : -1], "little")
    return at >= 0 and data[at] >> 6 == 2 and data[at] >> 4 != 0b1011 and data[at] & 0b1010 != 0


def _av1_shows_keyframe(packet):
    """True if the first frame of an AV1 packet is a shown keyframe: show_existing_frame 0, frame_type 0, show_frame 1."""
    data, at = memoryview(packet), 0
    while at < len(data):
        kind, extension, sized = data[at] >> 3 & 15, data[at] >> 2 & 1, data[at] >> 1 & 1
        at += 1 + extension
        size, shift = 0, 0
        while sized and at < len(data):  # leb128
            size |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                break
        if kind in (3, 6):
            return at < len(data) and data[at] & 0xF0 == 0x10
        if not sized:
            return False
        at += size
    return False


def _hevc_layer(packet, length_size, first):
    """The temporal layer of an HEVC packet, from 1; 0 if it may keep itself or another frame from being shown.

    That is: a start that is not an IDR, a BLA picture or the end of a sequence (leading pictures are skipped after
    them), or no_output_of_prior_pics.
    """
    layer = 0
    for nal in _nals(packet, length_size):
        kind = nal[0] >> 1 & 63
        if kind in (16, 17, 18, 36, 37) or (first and kind < 32 and kind not in (19, 20)):
            return 0
        if 16 <= kind <= 23 and not first and nal[2] & 0x40:
            return 0
        if kind < 32:
            layer = max(layer, nal[1] & 7)
    return layer


def _starts_clean(packet, codec, length_size):
    """True where decoding may start: the frames shown from this one on depend on nothing before it.

    The container's keyframe mark is not proof (intra frames without a refresh are marked by some muxers), so the
    bitstream is asked: H.264 IDR, or a recovery point that is exact and immediate; HEVC IRAP; VP9 and AV1 keyframe.
    """
    if codec == "vp9":
        return memoryview(packet)[0] & 0b1100 == 0  # the first frame of the packet is a keyframe
    if codec == "av1":
        return _av1_shows_keyframe(packet)
    for nal in _nals(packet, length_size):
        if codec == "hevc" and nal[0] >> 1 & 63 < 32:
            return 16 <= nal[0] >> 1 & 63 <= 21
        if codec == "h264":
            kind = nal[0] & 31
            if kind in (1, 5):
                return kind == 5
            if kind == 6 and len(nal) > 3 and nal[1] == 6 and nal[3] & 0xC0 == 0xC0:
                return True
    return False


def _orientation(frame):
    """(transpose, flip_x, flip_y) that show a decoded frame upright, from its display matrix; in that order."""
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5]  # (p, q) is shown at (a p + c q, b p + d q)
            if b == c == 0 and a and d:
                return False, bool(a < 0), bool(d < 0)
            if a == d == 0 and b and c:
                return True, bool(c < 0), bool(b < 0)
            raise ValueError("the display matrix is not a rotation by a multiple of 90 degrees")
    return False, False, False


def _may_be_turned(path):
    """False if the header of an mp4 or mkv file surely holds no rotation: only then no frame is decoded to see it."""
    with open(path, "rb") as file:
        head = file.read(1 << 14)
        if head[:4] == b"\x1aE\xdf\xa3":
            return b"\x76\x70" in head  # the element Projection
        at = 0
        for _ in range(64):
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            if head[4:8] == b"moov" and size < 1 << 26:
                file.seek(at)
                moov, unit = file.read(size), b"\0\1\0\0" + bytes(12) + b"\0\1\0\0"  # a, b, u, c, d of a matrix
                return moov.count(unit) < moov.count(b"tkhd") + moov.count(b"mvhd")
            if size < 8:
                break
            at += size
    return True


def _view(frame, box):
    """The box (x, y, w, h) of a decoded frame as a frame that shares its memory, or None where that can't be.

    This is what a crop costs: nothing. Chroma samples can't be cut in half, so a box of a 4:2:0 frame must be even.
    """
    (x, y, w, h), name = box, frame.format.name
    if name not in PLANAR:
        return None
    sx, sy = PLANAR[name]
    if (x | w) & sx or (y | h) & sy:
        return None
    planes = []
    for i, plane in enumerate(frame.planes):
        dtype = np.uint16 if name.endswith("le") else np.uint8
        rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)  # [H, line]
        i, j = (sy, sx) if i and name[0] == "y" else (0, 0)
        planes.append(rows[y >> i : (y + h) >> i, x >> j : (x + w) >> j])  # [h, w], or of chroma [h >> sy, w >> sx]
    view = av.VideoFrame.from_dlpack(planes, format=name)
    view.colorspace, view.color_range = frame.colorspace, frame.color_range
    return view


def _write(out, frame):
    """Copy a frame in gbrp to out, uint8 [3, h, w] in R, G, B."""
    for channel, plane in zip((1, 2, 0), frame.planes, strict=True):
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # [h, line]
        out[channel] = rows[:, : out.shape[2]]


def _convert(out, frame, box, scaler):
    """Crop, scale (bilinear, antialiased) and convert a decoded frame to RGB: out, uint8 [3, h, w], is filled."""
    h, w = out.shape[1:]
    whole = box == (0, 0, frame.width, frame.height)
    view = _view(frame, box) or (frame if whole else None)
    if view is not None:
        return _write(out, scaler.reformat(view, w, h, "gbrp", threads=1))
    # A box that cuts a chroma sample: colours first, at full size, then crop and scale as decode-then-crop does.
    x, y, bw, bh = box
    full = np.empty((3, frame.height, frame.width), np.uint8)
    _write(full, scaler.reformat(frame, format="gbrp", threads=1))
    full = torch.from_numpy(full[:, y : y + bh, x : x + bw])[None]  # [1, 3, bh, bw]
    out[:] = F.interpolate(full, (h, w), mode="bilinear", antialias=True)[0].numpy()  # [3, h, w]


class Video:
    """An open video: what is in it, and any number of reads.

        with Video(path) as v:
            clip = v.read(range(0, 64, 4), 224, (0, 0, 240, 240))    # uint8 [16, 3, 224, 224]

    Args: path of a local file: str, bytes or os.PathLike.
    Attributes: info, a VideoInfo; times, float64 [num_frames], seconds of each frame after the first one shown.
    Raises VideoError: no such file, not a video, no video stream, no frame, truncated, damaged.

    Frames are numbered in the order in which they are shown. Where the packets alone prove which frame is which
    (`_index`), a read decodes only what it must (`_plan`, `_run`). Any other video is decoded from its beginning and
    its frames are counted (`_count`): slower, and as exact.
    """

    def __init__(self, path):
        self.path, self._container, self._kept = os.fsdecode(path), None, []
        try:
            status = os.stat(self.path)
        except (OSError, ValueError) as error:
            raise VideoError(self.path, getattr(error, "strerror", None) or str(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(self.path, "not a file")
        if not status.st_size:
            raise VideoError(self.path, "the file is empty (0 bytes)")
        try:
            with _errors(self.path, "can't be opened"):
                self._fast = self._open(OPEN_FAST) and self._index()
                if not self._fast:
                    self._open(OPEN)
                    self._index()
                self._describe()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __reduce__(self):  # another process opens the file anew
        return Video, (self.path,)

    def close(self):
        """Free the file, the decoder and the packets. What was read stays valid."""
        if self._container is not None:
            self._container.close()
        self._container = self._stream = self._decoder = self._packets = self._kept = None

    # -- what is in the file -------------------------------------------------------------------------------------------

    def _open(self, options):
        """Open the container; True if it is of a kind whose packets may prove which frame is which."""
        if self._container is not None:
            self._container.close()
        self._container = av.open("file:" + self.path, options=options, metadata_errors="replace")
        self._options, self._stream = options, self._container.streams.best("video")
        if self._stream is None or self._stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(self.path, "no video stream in the file")
        if self._stream.codec_context is None:
            raise VideoError(self.path, "FFmpeg has no decoder for the video stream")
        self._decoder = self._stream.codec_context
        self._decoder.thread_count, self._decoder.thread_type = 1, "NONE"
        # strict: a stream that doesn't say how far its frames are reordered makes the decoder guess, and lose a frame
        # where the guess is low; strict assumes the largest depth.
        self._decoder.options = {"strict": "1", "max_pixels": str(MAX_PIXELS)}
        self._codec = self._decoder.codec.canonical_name
        return self._container.format.name in FAST_CONTAINERS and self._codec in FAST_CODECS

    def _index(self):
        """List the packets in decode order. True if they prove the frames: one each, all shown, each at its own time."""
        decoder, extra = self._decoder, self._decoder.extradata or b""
        safe = self._options is OPEN_FAST
        if self._codec == "h264":
            safe = safe and _h264_frame_size(extra) == (decoder.width, decoder.height)
            self._prefix = (extra[4] & 3) + 1 if safe else 0  # bytes of a NAL unit's length
        elif self._codec == "hevc":
            safe = safe and len(extra) > 22 and extra[0] == 1
            self._prefix = (extra[21] & 3) + 1 if safe else 0
        else:
            self._prefix = 0
        self._packets, self._rows, self._starts, self._top = [], [], [], 0
        total = read = 0
        for packet in self._container.demux(self._stream):
            read += 1
            if not packet.size:  # a gap; PyAV's mark of the end too
                continue
            n = len(self._rows)
            self._rows.append((packet.pts, packet.dts, packet.size, packet.is_discard))
            total += packet.size
            if total > KEEP_BYTES:
                self._packets = None
            if self._packets is not None:
                self._packets.append(packet)
            if safe:
                safe = packet.pts is not None and not packet.is_corrupt and not packet.has_sidedata("new_extradata")
                if packet.is_keyframe and _starts_clean(packet, self._codec, self._prefix):
                    self._starts.append(n)
                if self._codec == "vp9":
                    safe = safe and _vp9_shows(packet)
                elif self._codec == "hevc":
                    layer = _hevc_layer(packet, self._prefix, n == 0)
                    self._top, safe = max(self._top, layer), safe and layer > 0
        missing = len(self._stream.index_entries) - (read - 1)
        if missing > 0 and self._container.format.name == FAST_CONTAINERS[0]:
            raise VideoError(self.path, f"truncated: {missing} of {missing + read - 1} frames are missing at the end")
        if not self._rows:
            raise VideoError(self.path, "no frame in the video stream")
        shown = sorted((row[0], n) for n, row in enumerate(self._rows) if not row[3]) if safe else []
        self._pts, self._order = [pts for pts, _ in shown], [n for _, n in shown]
        safe = safe and read - 1 == len(self._rows) and self._starts[:1] == [0]
        return safe and len(set(self._pts)) == len(shown) > 0

    def _count(self):
        """Decode all frames, for their number and their times; a short video's stay in memory for the reads."""
        self._pts, self._bad, self._kept, bad, room = [], [], [], False, KEEP_BYTES // 4
        for frame in self._decode_all():
            bad = frame.is_corrupt or (bad and not frame.key_frame)
            room -= 3 * frame.width * frame.height
            if room >= 0:
                self._kept.append(frame)
            if not self._pts:
                first = frame
            self._pts.append(frame.pts)
            self._bad.append(bad)
        if not self._pts:
            raise VideoError(self.path, "no frame can be decoded")
        return first

    def _describe(self):
        """Fill `info` and `times`."""
        self._size, self._turn, rotation = (self._decoder.width, self._decoder.height), (False, False, False), 0
        first = None if self._fast else self._count()
        if self._fast and _may_be_turned(self.path):
            packets = [*self._read(0, 1), None]
            first = next(frame for packet in packets for frame in self._decoder.decode(packet))
        if first is not None:
            self._size, self._turn, rotation = (first.width, first.height), _orientation(first), first.rotation
        self._rotation = rotation
        width, height = self._size[:: -1 if self._turn[0] else 1]
        n, rate = len(self._pts), float(self._stream.average_rate or self._stream.guessed_rate or 25)
        pts = np.array([-1 if pts is None else pts for pts in self._pts], np.float64)  # [num_frames]
        if n > 1 and (np.diff(pts) <= 0).any():  # no times worth the name
            self.times = np.arange(n) / rate  # [num_frames]
        else:
            self.times = (pts - pts[0]) * float(self._stream.time_base)  # [num_frames]
        fps = float((n - 1) / self.times[-1]) if n > 1 else rate
        self.info = VideoInfo(width, height, fps, n, float(self.times[-1] + 1 / fps), -rotation % 360, self._codec)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, frames, size, box=None):
        """Frames of the video, cropped and scaled, in RGB.

        Args: frames, indices in the order shown, 0 to num_frames - 1, in any order, repeats allowed;
            size, of the output, pixels: an int for a square, or (h, w);
            box, (x, y, w, h) in pixels of the upright frame; the whole frame if None. Even numbers are faster where
            chroma is subsampled (4:2:0): see `_convert`.
        Returns: uint8 [T, 3, h, w], T = len(frames), in the order of `frames`.
        Raises: VideoError if an index is out of range, or if a frame is missing, damaged, or depends on a damaged one;
            ValueError if the box is not inside the frame.
        """
        return self.read_views([(frames, size, box)])[0]

    def read_views(self, views):
        """Several clips of the video in one decode pass: each further view of a frame costs its conversion only.

        Args: views, a list of (frames, size, box) as `read` takes them. Returns: a list of uint8 [T, 3, h, w].
        """
        if self._container is None:
            raise ValueError(f"{self.path} is closed")
        wanted, jobs = defaultdict(lambda: defaultdict(list)), []
        for n, (frames, size, box) in enumerate(views):
            frames, size = [int(i) for i in frames], tuple(size) if isinstance(size, (tuple, list)) else (size, size)
            if min(size) < 1:
                raise ValueError(f"size {size} is not positive")
            for t, i in enumerate(frames):
                if not 0 <= i < self.info.num_frames:
                    raise VideoError(self.path, f"frame {i} is out of range, the video has {self.info.num_frames}")
                wanted[i][n].append(t)
            out = torch.empty((len(frames), 3, *size), dtype=torch.uint8)  # [T, 3, h, w]
            jobs.append((out, self._coded_view(out.numpy()), self._coded_box(box), VideoReformatter()))
        with _errors(self.path, "can't be decoded"):
            for i, frame in (self._runs if self._fast else self._counted)(wanted) if wanted else ():
                if (frame.width, frame.height) != self._size or frame.rotation != self._rotation:
                    raise VideoError(self.path, f"frame {i} has another size or rotation than the first; re-encode it")
                for n, (t, *again) in wanted[i].items():
                    _, out, box, scaler = jobs[n]
                    _convert(out[t], frame, box, scaler)
                    out[again] = out[t]
        return [out for out, *_ in jobs]

    def _coded_box(self, box):
        """A box of the upright frame as one of the coded frame; both (x, y, w, h)."""
        width, height = self.info[:2]
        x, y, w, h = (0, 0, width, height) if box is None else (int(v) for v in box)
        if not (w > 0 and h > 0 and 0 <= x <= width - w and 0 <= y <= height - h):
            raise ValueError(f"box {(x, y, w, h)} is not inside the {width}x{height} frames of {self.path}")
        transpose, flip_x, flip_y = self._turn
        x, y = width - x - w if flip_x else x, height - y - h if flip_y else y
        return (y, x, h, w) if transpose else (x, y, w, h)

    def _coded_view(self, out):
        """The upright output [T, 3, h, w] as a view that a coded frame is written to: [T, 3, h, w] or [T, 3, w, h]."""
        transpose, flip_x, flip_y = self._turn
        out = out[:, :, :: -1 if flip_y else 1, :: -1 if flip_x else 1]  # [T, 3, h, w]
        return out.swapaxes(2, 3) if transpose else out

    def _runs(self, wanted):
        """Plan, then decode: yields (index, frame) of each wanted frame.

        A run is the packets from a clean start to the last wanted frame before the next clean start that helps.
        """
        plan = []
        for position, i in sorted((self._order[i], i) for i in wanted):
            at = bisect_right(self._starts, position) - 1
            # A frame shown before the keyframe that precedes it in the file (a leading picture of an open GOP) refers
            # to frames before that keyframe: start one earlier.
            while at > 0 and self._rows[self._starts[at]][0] > self._pts[i]:
                at -= 1
            if not plan or self._starts[at] > plan[-1][1]:
                plan.append([self._starts[at], position, {}])
            plan[-1][1] = position
            plan[-1][2][self._pts[i]] = i
        for start, last, want in plan:
            try:
                yield from self._run(start, last, want, drop=True)
            except (
                VideoError
            ):  # damaged; or a stream that is not what it seems: all from the beginning, nothing left out
                yield from self._run(0, last, want, drop=False)

    def _run(self, start, last, want, drop):
        """Decode packets start .. last; yields (index, frame) of the frames in want, {pts: index}.

        Every packet that goes in must come out as its frame, undamaged, or the frames that refer to it are not right.
        """
        self._decoder.flush_buffers()
        expected, begin = set(), self._rows[start][0] if start else float("-inf")
        for n, packet in enumerate(chain(self._read(start, last + 1), [None]), start):
            if packet is not None:
                pts, _, _, hidden = self._rows[n]
                if (
                    drop
                    and pts not in want
                    and self._prefix
                    and _droppable(packet, self._codec, self._prefix, self._top)
                ):
                    continue
                if not hidden and pts >= begin:
                    expected.add(pts)
            for frame in self._decode(packet):
                if frame.pts in expected and not frame.is_corrupt:
                    expected.remove(frame.pts)
                    if frame.pts in want:
                        yield want[frame.pts], frame
                elif frame.pts is None or frame.pts >= begin:
                    raise VideoError(self.path, f"damaged near frame {bisect_right(self._pts, frame.pts or 0)}")
        if expected:
            raise VideoError(self.path, f"damaged: frame {bisect_left(self._pts, min(expected))} can't be decoded")

    def _counted(self, wanted):
        """The slow way: decode from the first frame and count. Yields (index, frame) of each wanted frame."""
        last = max(wanted)
        for i, frame in enumerate(self._kept if last < len(self._kept) else self._decode_all()):
            if i in wanted:
                if self._bad[i]:
                    raise VideoError(self.path, f"frame {i} is damaged, or refers to a damaged one")
                yield i, frame
            if i == last:
                return

    def _decode_all(self):
        """Every frame of the video, in the order shown."""
        self._decoder.flush_buffers()
        started = False
        for packet in chain(self._read(0, len(self._rows)), [None]):
            try:
                frames = self._decoder.decode(packet)
            except av.FFmpegError as error:
                if started:  # from here on the count is not certain
                    raise VideoError(self.path, f"damaged: {error.strerror} after {started} frames") from error
                continue  # a recording that starts between two keyframes
            started += len(frames)
            yield from frames

    def _decode(self, packet):
        try:
            return self._decoder.decode(packet)
        except av.FFmpegError as error:
            raise VideoError(self.path, f"damaged: {error.strerror}") from error

    def _read(self, start, stop):
        """Packets start .. stop - 1 in decode order: from memory, or those of a large video from the file again."""
        if self._packets is not None:
            yield from self._packets[start:stop]
            return
        with av.open("file:" + self.path, options=self._options, metadata_errors="replace") as container:
            stream, n = container.streams[self._stream.index], 0
            if start:
                pts, dts, *_ = self._rows[start]
                container.seek(pts if dts is None else dts, stream=stream)
                n = None
            for packet in container.demux(stream):
                if n is None and (packet.pts, packet.dts, packet.size) == self._rows[start][:3]:
                    n = start
                if n is not None and packet.size:
                    yield packet
                    n += 1
                    if n >= stop:
                        return
        raise VideoError(self.path, "changed while it was read")


def probe(path):
    """VideoInfo of a video file, from its packets; nothing is decoded where they are proof. Raises VideoError."""
    with Video(path) as video:
        return video.info


def read_clip(path, frames, size, box=None):
    """Frames of a video file, cropped and scaled, in RGB: uint8 [T, 3, h, w]. Arguments and errors of `Video.read`."""
    with Video(path) as video:
        return video.read(frames, size, box)


def read_clip_decode_then_crop(path, frames, size, box=None):
    """The plain loader that AVION starts from (Fig. 8a): decode all up to the last frame, then crop and scale.

    Arguments and result as `read_clip`. It stands here for the paper's ablation, and as the reference of the tests.
    """
    clip = {}
    with av.open("file:" + os.fsdecode(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "NONE"
        stream.codec_context.options = {"strict": "1"}
        for i, frame in enumerate(container.decode(stream)):
            if i in frames:
                turn, clip[i] = frame.rotation // 90, torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, 3]
            if i >= max(frames):
                break
    clip = torch.stack([clip[i] for i in frames]).permute(0, 3, 1, 2).rot90(turn, (2, 3))  # [T, 3, H, W]
    x, y, w, h = box or (0, 0, clip.shape[3], clip.shape[2])
    return F.interpolate(clip[:, :, y : y + h, x : x + w], size, mode="bilinear", antialias=True)  # [T, 3, h, w]


# ---- Frame sampling --------------------------------------------------------------------------------------------------
# Pure functions: (VideoInfo, number of frames, ..., a uniform draw) -> presentation-order indices.


def fps_frames(info, n, fps, u):
    """n frames at `fps`, from a start that u in [0, 1) picks (Turbo, Sec. 4.1: 16 frames at 5 fps, about 3.2 s).

    Where the video is too short for that the frames are spread evenly over all of it, and a video slower than `fps`
    gives consecutive frames: n different frames, always. ValueError where the video has fewer than n.
    """
    if info.num_frames < n:
        raise ValueError(f"has {info.num_frames} frames, a clip needs {n}; leave the video out or lower --frames")
    stride = min(max(1.0, info.fps / fps), (info.num_frames - 1) / max(1, n - 1))
    start = u * (info.num_frames - 1 - (n - 1) * stride)
    return [int(start + i * stride + 1e-6) for i in range(n)]  # 1e-6: 3 * (1 / 3) must not round down to frame 0


# ---- Boxes: what decode-crop cuts out, (x, y, w, h) in pixels -------------------------------------------------------


def centre_box(info):
    """The largest centred square."""
    side = min(info.width, info.height)
    return (info.width - side) // 2, (info.height - side) // 2, side, side


def random_resized_box(info, key, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Inception's crop, drawn from a key before anything is decoded (AVION, Eqs. 1-2; ratio log-uniform as in practice).

    Sides and corner are even, so that the crop falls on whole chroma samples. After `tries` misses: the centre box.
    """
    draws = uniform(key, "crop", 4 * tries).reshape(tries, 4).tolist()
    for area, shape, left, top in draws:
        area = info.width * info.height * (scale[0] + area * (scale[1] - scale[0]))
        shape = ratio[0] * (ratio[1] / ratio[0]) ** shape
        w, h = (2 * max(1, round(math.sqrt(side) / 2)) for side in (area * shape, area / shape))
        if w <= info.width and h <= info.height:
            x, y = (2 * int(u * (room // 2 + 1)) for u, room in ((left, info.width - w), (top, info.height - h)))
            return x, y, w, h
    return centre_box(info)


# ---- Lists -----------------------------------------------------------------------------------------------------------


class VideoList:
    """A list file in memory: one video a line, `path label` or `path,label`; labels all integers or class names.

    Paths are kept as one block of bytes and labels as an array, so that millions of entries are shared with the loader's
    workers instead of copied into each. `classes` (names, in order) checks a list against the training list's; without
    it they are this list's own: sorted names, or 0 ... num_classes - 1. Mistakes raise UserError with file and line.
    """

    def __init__(self, path, root="", num_classes=0, classes=None):
        self.path = str(path)
        paths, labels, lines = [], [], []
        try:
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        video, label = self._split(line.strip(), number)
                        paths.append(video.encode("utf-8", "surrogateescape"))
                        labels.append(label)
                        lines.append(number)
        except OSError as error:
            raise UserError(f"{path}: can't read the list ({error.strerror})") from None
        if not paths:
            raise UserError(f"{path}: the list is empty; it should hold a line a video, `path label` or `path,label`")
        integers = all(label.lstrip("-").isdecimal() for label in labels)
        if classes is None:
            count = num_classes or (max(map(int, labels)) + 1 if integers else 0)
            classes = [str(i) for i in range(count)] if integers else sorted(set(labels))
        names = {name: i for i, name in enumerate(classes)}
        for number, label in zip(lines, labels, strict=True):
            if label not in names:
                known = f"0 ... {len(classes) - 1}" if classes[0].isdecimal() else ", ".join(classes[:8])
                raise UserError(f"{path}:{number}: label {label!r} is not one of the {len(classes)} classes ({known})")
        self._keep(paths, [names[label] for label in labels], classes, root)

    @classmethod
    def of(cls, paths):
        """A list of given paths, all labelled 0."""
        videos = cls.__new__(cls)
        videos._keep([os.fsencode(path) for path in paths], [0] * len(paths), ["0"])
        return videos

    def _keep(self, paths, labels, classes, root=""):
        self.root, self.classes, self.labels = str(root), classes, np.array(labels, np.int32)
        self._ends, self._bytes = np.cumsum([len(p) for p in paths]), np.frombuffer(b"".join(paths), np.uint8)

    def _split(self, line, number):
        for separator in ", ":  # the quote character keeps a path together that holds the separator
            fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            if len(fields) == 2 and all(fields):
                return fields[0].strip(), fields[1].strip()
        raise UserError(
            f'{self.path}:{number}: not `path label` or `path,label`: {line[:80]!r} (quote a "path with spaces")'
        )

    def __len__(self):
        return len(self.labels)

    def video(self, index):
        """Path of entry `index`, joined to the root."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._bytes[start : self._ends[index]].tobytes()))


# ---- The loader ------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A micro-batch: what a step needs, and what could not be read on the way to it."""

    clips: torch.Tensor  # uint8 [B, T, C, H, W]
    labels: torch.Tensor  # int64 [B]
    keys: torch.Tensor  # int64 [B], of (seed, epoch, index, view): all later draws for these clips hash from them
    index: torch.Tensor  # int64 [B], place in the list (stays on the CPU)
    failures: list  # one line a video that could not be read

    def to(self, device):
        """Copy to the device; from pinned memory the copy overlaps with what the GPU is doing."""
        move = lambda x: x.to(device, non_blocking=True)
        return self._replace(clips=move(self.clips), labels=move(self.labels), keys=move(self.keys))


class ClipDataset(torch.utils.data.Dataset):
    """Clips by (epoch, index): decoded by plan(info, key) -> (frames, box), at `size`.

    replace: an unreadable video's place is taken by another, drawn from the sample's own key (training). Otherwise the
    sample is left out of its batch (evaluation). Both are reported in Batch.failures; nothing is repeated or black.
    """

    def __init__(self, videos, plan, size, seed, replace):
        self.videos, self.plan, self.size, self.seed, self.replace = videos, plan, size, seed, replace

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, item):
        """(epoch, index) -> (clip uint8 [T, C, H, W] or None, label, key, index, failures)."""
        epoch, index = item
        key, failures = make_key(self.seed, epoch, index, 0), []  # 0: the view
        for attempt in range(10 if self.replace else 1):
            if attempt:
                index = int(uniform(key, f"replace.{attempt}") * len(self))
            path = self.videos.video(index)
            try:
                with Video(path) as video:
                    frames, box = self.plan(video.info, key)
                    clip = video.read(frames, self.size, box)
                return clip, int(self.videos.labels[index]), key, index, failures
            except VideoError as error:
                failures.append(str(error))
            except ValueError as error:  # a clip that this video is too short for
                failures.append(f"{path}: {error}")
        return None, -1, key, index, failures


def collate(samples):
    """Samples of ClipDataset as a Batch; the unreadable ones are left out."""
    failures = [line for sample in samples for line in sample[4]]
    read = [sample for sample in samples if sample[0] is not None]
    if not read:
        return Batch(*(torch.empty(0, dtype=torch.int64),) * 4, failures)
    clips, labels, keys, index, _ = zip(*read, strict=True)
    return Batch(torch.stack(clips), torch.tensor(labels), torch.stack(keys), torch.tensor(index), failures)


class GlobalBatches:
    """The (epoch, index) lists of one rank's micro-batches, from step `start` to step `stop`, through all epochs.

    Step s of an epoch takes entries s * batch ... of a permutation of (seed, epoch); a rank takes its slice of them and
    cuts it into micro-batches. So the same clips meet in a step at any number of ranks, micro-batches and workers, and
    there is no position to save but the step. What an epoch has left over at its end is left for the next shuffle.
    """

    def __init__(self, n, batch_size, micro_batch, seed, start, stop, rank=0, world=1):
        self.n, self.batch_size, self.micro_batch, self.seed = n, batch_size, micro_batch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self):
        return (self.stop - self.start) * (self.batch_size // self.world // self.micro_batch)

    def __iter__(self):
        per_rank, per_epoch, shuffled = self.batch_size // self.world, self.n // self.batch_size, None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, per_epoch)
            if shuffled != epoch:
                order, shuffled = permutation(make_key(self.seed, epoch), "shuffle", self.n), epoch
            first = i * self.batch_size + self.rank * per_rank
            for micro in order[first : first + per_rank].split(self.micro_batch):
                yield [(epoch, index) for index in micro.tolist()]


def every_sample(n, batch_size, rank=0, world=1):
    """The (epoch, index) lists of one rank that together, over ranks, hold each entry once (evaluation)."""
    mine = range(rank, n, world)
    return [[(0, index) for index in mine[i : i + batch_size]] for i in range(0, len(mine), batch_size)]


def _outlive_first_signal(worker):
    """A signal to the whole process group is for the trainer to heed; a loader process that died of it would end the
    step that the trainer means to finish. A second signal is obeyed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def make_loader(dataset, batches, workers, device):
    """A DataLoader over `batches` whose processes live as long as its iterator: for training, the whole run."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_outlive_first_signal,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )


class Failures:
    """Unreadable videos of an epoch, over workers and ranks: named in the log, and too many of them end the run."""

    def __init__(self, n, fraction):
        self.limit, self.new, self.names, self.count, self.epoch = max(1, int(fraction * n)), [], [], 0, 0

    def add(self, batch, size):
        """Note a training batch's failures; UserError where even its replacements could not be read."""
        self.new += batch.failures
        if len(batch.labels) < size:
            raise UserError(f"no replacement found for a clip (--max-bad): {'; '.join(batch.failures[:3])}")

    def collect(self, ctx, epoch):
        """Exchange the failures since the last call; every rank calls it. Returns their lines, UserError past the limit."""
        if epoch != self.epoch:
            self.names, self.count, self.epoch = [], 0, epoch
        lines, self.new = [line for part in ctx.gather(self.new) for line in part], []
        self.count += len(lines)
        self.names = [*self.names, *lines][:5]
        if self.count > self.limit:
            raise UserError(
                f"{self.count} videos could not be read in epoch {epoch}, more than the {self.limit} that --max-bad allows: "
                + "; ".join(self.names)
            )
        return lines


# ---- Augmentation on the device: batched over clips, the same for all frames of a clip, keyed by clip ---------------


def flip(clips, keys, p=0.5):
    """Mirror a clip left-right with probability p: [B, T, C, H, W] -> the same."""
    chosen = uniform(keys, "flip") < p  # [B]
    return torch.where(chosen[:, None, None, None, None], clips.flip(-1), clips)


def soft_labels(labels, classes, smoothing):
    """One-hot labels with `smoothing` of each spread evenly over all classes: int64 [B] -> float32 [B, classes]."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(clips, targets, step_key, mixup, cutmix):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), one of them and one lambda a step, half the time each.

    clips [B, T, C, H, W] (any dtype) and soft targets float [B, classes] -> mixed clips (float32 in mixup), targets.
    Clip 2i is mixed with 2i + 1 and the other way round, so that B must be even; step_key, (seed, step), is common to all
    micro-batches and ranks. mixup and cutmix are the Beta distribution's parameters; 0 turns one off.
    """
    if not (mixup or cutmix):
        return clips, targets
    rng = np.random.Generator(
        np.random.Philox(key=make_key(*step_key, "mix").item() & 2**64 - 1)
    )  # keyed: no state is kept
    use_cutmix = rng.random() < (0.5 if mixup and cutmix else float(cutmix > 0))
    lam, cx, cy = rng.beta(*[cutmix if use_cutmix else mixup] * 2), rng.random(), rng.random()
    swap = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # clip 2i <-> clip 2i + 1
    if use_cutmix:
        H, W = clips.shape[-2:]
        h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
        y0, y1 = (min(max(int(cy * H) + d, 0), H) for d in (-h // 2, h - h // 2 - h % 2))
        x0, x1 = (min(max(int(cx * W) + d, 0), W) for d in (-w // 2, w - w // 2 - w % 2))
        mixed = clips.clone()
        mixed[..., y0:y1, x0:x1] = swap(clips)[..., y0:y1, x0:x1]
        clips, lam = mixed, 1 - (y1 - y0) * (x1 - x0) / (H * W)  # the area that was really replaced
    else:
        clips = clips.float().lerp(swap(clips).float(), 1 - lam)  # [B, T, C, H, W]
    return clips, targets.lerp(swap(targets), 1 - lam)


def normalize(patches, mean, std):
    """0-255 pixels, colours last and fastest, to (x / 255 - mean) / std in float32: [..., P] -> [..., P]."""
    mean, std = (torch.tensor(v, device=patches.device).repeat(patches.shape[-1] // 3) for v in (mean, std))  # [P]
    return (patches.float() / 255 - mean) / std


# ---- Pictures --------------------------------------------------------------------------------------------------------


def write_panels(path, panels, fps, marked=None, columns=8):
    """Write a strip picture, path (.png), and beside it <name>_animated.png (APNG: any browser plays it).

    panels: uint8 [B, T, C, H, W] each. The strip has a row for each clip and panel, clip by clip, and a column for each of
    up to `columns` frames; the animation has the panels of a clip side by side. Panel `marked` gets a red frame.
    """
    path, T = Path(path), panels[0].shape[1]
    framed = [F.pad(panel, [2] * 4, value=255) for panel in panels]  # [B, T, C, H + 4, W + 4]
    for panel in framed[marked : marked + 1] if marked is not None else ():
        edge = F.pad(torch.zeros_like(panel[0, 0, 0, 2:-2, 2:-2], dtype=torch.bool), [2] * 4, value=True)
        panel[..., edge] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None]
    video = torch.stack(framed, 1)  # [B, panels, T, C, H, W]
    strip = video[:, :, :: max(1, T // columns)].permute(0, 1, 4, 2, 5, 3)  # [B, panels, H, T, W, C]
    _write_images(path, [strip.flatten(3, 4).flatten(0, 2)], "png", fps)  # [B panels H, T W, C]
    movie = video.permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)  # [T, B H, panels W, C]
    _write_images(path.with_stem(path.stem + "_animated"), list(movie), "apng", fps)


def _write_images(path, images, codec, fps):
    """Write uint8 [H, W, 3] images as one PNG or APNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    kind = {"png": "image2", "apng": "apng"}[codec]
    with av.open(
        str(temporary), "w", format=kind, options={"update": "1"} if codec == "png" else {"plays": "0"}
    ) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "rgb24"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")))
        file.mux(stream.encode())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Toy videos: small H.264 files in which appearance never tells the label, only motion does.
#
# The state of an object is a point on a 4-torus, (x, y, angle, log size), each coordinate in loops [0, 1): what leaves
# the picture on the right comes back on the left, what has grown to its largest starts again as its smallest. A motion
# is a constant velocity along one axis, and the start is uniform. A uniform point moved by any velocity is uniform
# again, so every frame, the first and the last included, has the same distribution whatever the motion; colour, shape
# and background are drawn without looking at it.
# ---------------------------------------------------------------------------------------------------------------------
TOY_VERSION = 1  # a new number remakes every set that exists
TOY_SIZE = 64  # pixels, both sides
TOY_MOTIONS = {  # name: velocity over (x, y, angle, log size); y and angles point down and clockwise on the screen
    "left": (-1, 0, 0, 0),
    "right": (1, 0, 0, 0),
    "up": (0, -1, 0, 0),
    "down": (0, 1, 0, 0),
    "clockwise": (0, 0, 1, 0),
    "counter-clockwise": (0, 0, -1, 0),
    "grow": (0, 0, 0, 1),
    "shrink": (0, 0, 0, -1),
}
TOY_SHAPES = {"triangle": 3, "square": 4, "pentagon": 5}
TOY_COLOURS = {  # bright, so that every one stands out from the dim sky
    "red": (0.95, 0.25, 0.2),
    "orange": (1.0, 0.6, 0.15),
    "yellow": (0.95, 0.95, 0.3),
    "green": (0.3, 0.85, 0.3),
    "cyan": (0.3, 0.9, 0.95),
    "blue": (0.35, 0.5, 1.0),
    "purple": (0.75, 0.4, 0.95),
    "pink": (1.0, 0.65, 0.8),
}
TOY_RADIUS = 12.0, 22.0  # pixels from the centre to a corner, smallest and largest
TOY_SPEED = 0.22, 0.34  # loops a second in `actions`: 16 frames at 5 fps cover .7 to 1.1 loops
TOY_TINT = 0.2
TOY_FPS = {"actions": 10}
TOY_COUNTS = {"actions": {"train": 1600, "val": 320}}


def _toy_rng(seed, *key):
    """A generator of its own for each (split, index), so that no draw depends on which worker made what before."""
    return np.random.default_rng([seed, *(int.from_bytes(k.encode(), "big") if isinstance(k, str) else k for k in key)])


def _toy_sky(rng):
    """A dim still background [H, W, 3] in [0, 1]: one gradient that all videos share, under weak coarse blobs."""
    grid = np.linspace(0, 3, TOY_SIZE, dtype=np.float32)
    up = np.maximum(0, 1 - np.abs(grid[:, None] - np.arange(4)))  # [H, 4] bilinear weights of a 4 x 4 grid
    blobs = np.einsum("ya,xb,abc->yxc", up, up, rng.uniform(0, 0.12, (4, 4, 3)))
    tint = rng.uniform(0, TOY_TINT, 3)
    return (0.05 + 0.15 * (1 - grid / 3)[:, None, None] + blobs + tint).astype(np.float32)


def _toy_path(rng, velocity):
    """Loops moved per frame [T, 4] -> state per frame [T, 4] in [0, 1): (x, y, angle, log size), uniform at each T."""
    return (rng.random(4) + np.cumsum(velocity, 0)).astype(np.float32) % 1


def _toy_draw(frames, state, shape, colour):
    """Paints a polygon with a dark spot near one corner, where rotation shows, into frames [T, H, W, 3] in place."""
    x, y, angle, size = state.T[:, :, None, None]  # [T, 1, 1] each
    grid = np.arange(TOY_SIZE, dtype=np.float32)
    dx = (grid - x * TOY_SIZE + TOY_SIZE / 2) % TOY_SIZE - TOY_SIZE / 2  # [T, 1, W] the short way around the torus
    dy = ((grid - y * TOY_SIZE + TOY_SIZE / 2) % TOY_SIZE - TOY_SIZE / 2).transpose(0, 2, 1)  # [T, H, 1]
    radius = TOY_RADIUS[0] * (TOY_RADIUS[1] / TOY_RADIUS[0]) ** size
    sides, angle = TOY_SHAPES[shape], 2 * np.pi * angle
    far = None  # [T, H, W] how far out, along the normal of the nearest side
    for k in range(sides):
        normal = angle + np.float32(2 * np.pi * (k + 0.5) / sides)
        along = np.cos(normal) * dx + np.sin(normal) * dy
        far = along if far is None else np.maximum(far, along, out=far)
    cover = np.clip(radius * np.float32(np.cos(np.pi / sides)) - far + 0.5, 0, 1)
    spot = np.hypot(dx - 0.5 * radius * np.cos(angle), dy - 0.5 * radius * np.sin(angle))
    paint = np.clip(spot - 0.27 * radius + 0.5, 0, 1)[..., None] * np.float32(TOY_COLOURS[colour])
    frames += cover[..., None] * (paint - frames)


def _toy_write(path, frames, fps):
    """Writes frames [T, H, W, 3] in [0, 1] as H.264 with x264's default group of pictures and B-frames."""
    with av.open(str(path), "w") as out:
        # 64 pixels are few: crf 20, not 23, keeps the spot; one thread, because each file has a worker of its own
        stream = out.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in (frames * 255 + 0.5).astype(np.uint8):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", threads=1)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _toy_action(folder, seed, split, index):
    """Renders one clip of `actions`, 4 s; returns its list line."""
    deck = _toy_rng(seed, split, "labels").permutation(math.ceil((index + 1) / 1600) * 1600)
    motion = list(TOY_MOTIONS)[index % 8]
    rng = _toy_rng(seed, split, index)
    fps = TOY_FPS["actions"]
    frames = np.repeat(_toy_sky(rng)[None], 4 * fps, 0)
    velocity = rng.uniform(*TOY_SPEED) / fps * np.array([TOY_MOTIONS[motion]] * len(frames))
    shape, colour = rng.choice(list(TOY_SHAPES)), rng.choice(list(TOY_COLOURS))
    _toy_draw(frames, _toy_path(rng, velocity), shape, colour)
    _toy_write(folder / f"videos/{split}_{index:05d}.mp4", frames, fps)
    return f"videos/{split}_{index:05d}.mp4,{motion}\n"


TOY_MAKERS = {"actions": _toy_action}


@contextmanager
def _one_maker(path):
    """Holds a lock file: a second process waits; the kernel frees it when its holder ends, however it ends."""
    with open(path, "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_toy(root, which, seed=0, counts=None, workers=None):
    """Makes the toy set `which` ('actions') under root/which, if it is not there as asked; returns its folder."""
    if which not in TOY_MAKERS:
        raise ValueError(f"unknown toy set {which!r}; choose from {', '.join(TOY_MAKERS)}")
    root, counts = Path(root), counts or TOY_COUNTS[which]
    target, wanted = root / which, {"version": TOY_VERSION, "seed": seed, "counts": counts}
    root.mkdir(parents=True, exist_ok=True)
    with _one_maker(root / f".{which}.lock"):
        try:
            if json.loads((target / "version.json").read_text()) == wanted:
                return target
        except (OSError, ValueError):
            pass
        for old in root.glob(f".{which}.tmp-*"):
            shutil.rmtree(old)
        temp = root / f".{which}.tmp-{os.getpid()}"
        (temp / "videos").mkdir(parents=True)
        jobs = [(split, i) for split, n in counts.items() for i in range(n)]
        lines = {split: [] for split in counts}
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            rows = pool.map(lambda job: TOY_MAKERS[which](temp, seed, *job), jobs)
            for (split, _), row in zip(jobs, tqdm(rows, f"making toy {which}", len(jobs), unit="video")):
                lines[split].append(row)
        for split, rows in lines.items():
            (temp / f"{split}.csv").write_text("".join(rows))
        (temp / "version.json").write_text(json.dumps(wanted))
        if target.exists():
            os.rename(target, root / f".{which}.tmp-old")
        os.rename(temp, target)
        shutil.rmtree(root / f".{which}.tmp-old", ignore_errors=True)
    return target


if __name__ == "__main__":
    import sys
    import time

    t = time.perf_counter()
    print(make_toy(sys.argv[1], sys.argv[2]), time.perf_counter() - t)


# ---- Command line ----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Tools around video data.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="make the toy videos: actions/, long/ and narrated/ under DIR")
    toy.add_argument("root", metavar="DIR")
    args = parser.parse_args()
    for which in TOY_MAKERS:
        print(make_toy(args.root, which))


if __name__ == "__main__":
    main()
