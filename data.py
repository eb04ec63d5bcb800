"""Video in, tensors out: lists, frame sampling, fused decode-crop, the loader,
on-device augmentation; toys, tools.

Decoding is AVION's second contribution (Zhao and Krähenbühl, "Training a Large Video Model on a
Single Machine in a Day", Sec. 4.2, Eqs. 1-2, Fig. 8) taken further: crop inside the decoder, decode
nothing that the clip doesn't need, and never return a frame other than the one asked for. `Video`,
with the helpers above it, can be copied into another project: it needs torch, av (PyAV) and numpy,
keeps no global state, prints nothing, runs one thread.

    info = data.probe("clip.mp4")        # size, frame rate, exact number of frames
    clip = data.read_clip("clip.mp4", [0, 4, 8, 12], size=224)        # uint8 [4, 3, 224, 224]
    with data.Video("clip.mp4") as v:    # one open and one pass over the packets for all reads
        a, b = v.read_views([([0, 8], 224, (0, 0, 240, 240)), ([4, 8], (112, 112), None)])

Shapes: B clips, T frames, C = 3 colours (R, G, B), H rows, W columns, of an output h and w; V clips
(views) of each of S samples; n clips that an operation changes.
"""

import argparse
import atexit
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import threading
import time
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, compress, dropwhile, groupby, islice, pairwise, product, starmap, tee
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import Interpolation, VideoReformatter
from tqdm import tqdm

from common import (
    LIST_SPEED,
    LOADER_ADVICE,
    Failures,
    UserError,
    gather_tokens,
    gpu_clips,
    make_key,
    new_array,
    permutation,
    replacing,
    uniform,
    unpatchify,
    writing,
)

try:
    import fcntl
except ImportError:
    fcntl = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------
# A list names the videos of a data set, one a line with its label, and stays in memory as a few
# arrays that all loader processes share. The underscored names may be skipped: they find a list's
# separator, and refuse what would be read wrongly without a word. To lift: VideoList, with Strings.


class Strings:
    """A list of strings, append-only, as one block of bytes and their ends:
    8 bytes a string beside its own.

    A Python list would take 60 more, and each worker process would end up with a copy: reading
    an object writes its count of references, which copies its page. These arrays are only read,
    and all processes share them.
    """

    def __init__(self, items=()):
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for item in items:
            self.append(item)

    def append(self, text):
        # bytes of a path that are no UTF-8 pass through
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self):
        return len(self._ends) - 1

    def digest(self):
        """What tells this list from any other: a SHA-256, in hexadecimal."""
        return hashlib.sha256(hashlib.sha256(self._bytes).digest() + self._ends).hexdigest()

    def __getitem__(self, i):
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


def digest(*parts):
    """Of Strings and numbers: a SHA-256, in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Strings):
            content = part.digest().encode()
        else:
            content = np.ascontiguousarray(part)
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()


def _named_video(name):
    """True if a name ends as those of videos do."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


@contextmanager
def reading(path):
    """Around what reads a list: UserError where it can't be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't read the list ({error.strerror})") from None


def full_lines(path, *_):
    """Yields (`path:number`, line) of those that aren't empty, stripped, whatever ends them (an
    old Mac's CR, too); bytes that are no UTF-8 pass through. FORMATS gives its readers more."""
    with reading(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if line:
                yield f"{path}:{number}", line


SEPARATORS = {"\t": "tab", ",": "comma", " ": "space"}
_WORDS = re.compile("[ ,;]")
# a field that holds the separator is quoted, as in csv
_SPLIT = {
    at: re.compile(rf'("(?:[^"]|"")++"|[^"{at}]++)\s*{at}\s*("(?:[^"]|"")++"|[^"{at}]++)')
    for at in SEPARATORS
}


def _fields(line, separator):
    """(path, label) of a line; None where it isn't these two."""
    match = _SPLIT[separator].fullmatch(line)
    fields = []
    for field in match.groups() if match else ():
        if field.startswith('"'):
            field = field[1:-1].replace('""', '"')
        fields.append(field.strip())
    return fields if fields and all(fields) else None


def _separators(line):
    """Those of SEPARATORS that may split a line in two: a tab where there is one; of the others the
    one that doesn't cut through a video's name, where one does."""
    candidates = "\t" if "\t" in line else ", "
    found = set()
    uncut = set()
    for separator in candidates:
        fields = _fields(line, separator)
        if not fields:
            continue
        found.add(separator)
        path, label = fields
        if not any(map(_named_video, _WORDS.split(path)[:-1] + _WORDS.split(label))):
            uncut.add(separator)
    return uncut or found


_INTEGER = re.compile("-?[0-9]+")


def _refuse(place, line, own=""):
    raise UserError(
        f"{place}: not `path,label` or `path label`{own}: {line[:80]!r} "
        '(quote a field that holds the separator: "path with spaces" label)'
    )


class VideoList:
    """A list file in memory: one video a line, `path,label`; labels all integers or class names.

    One separator holds for the whole file: tab, comma or spaces. The first line that only one of
    them can split in two decides: a line with a tab; `a.mp4 x`; `a b.mp4,x` and `a,b.mp4 x`, where
    the other would cut a video's name; but not `a,b c`. A path or label that holds the separator is
    quoted, "a,b.mp4",x. Refused are a line that is not these two fields, a file that can be split
    in two ways, a header, and a label that names a video.

    `classes` (names, in order) checks a list against the training list's; without it they are this
    list's own: sorted names, or 0 ... num_classes - 1, where num_classes is 0 up to its largest.
    Mistakes raise UserError with file and line.
    """

    def __init__(self, path, root="", num_classes=0, classes=None):
        self.path = str(path)
        self.root = str(root)
        self._paths = Strings()
        numbers, seen = self._read()
        self._refuse_other_tables(seen, once=numbers.count(0) == 1)
        if classes is None and all(map(_INTEGER.fullmatch, seen)):
            small = [int(label) for label in seen if re.fullmatch("[0-9]{1,7}", label)]
            count = num_classes or max(small, default=0) + 1
            classes = [str(i) for i in range(count)]
        self.classes = classes or sorted(seen)
        if num_classes not in (0, len(self.classes)):
            raise UserError(
                f"{path}: its labels are {len(self.classes)} names ({self.classes[0]} ...), "
                f"not --num-classes {num_classes}"
            )
        place = {name: i for i, name in enumerate(self.classes)}
        self._refuse_unknown_labels(seen, place)
        self.labels = np.array([place[label] for label in seen], np.int32)[numbers]  # [entries]

    @classmethod
    def of(cls, paths):
        """A list of given paths, all labelled 0; with no `path` of its own."""
        videos = cls.__new__(cls)
        videos.root = ""
        videos.classes = ["0"]
        videos.labels = np.zeros(len(paths), np.int32)
        videos._paths = Strings(map(os.fsdecode, paths))
        return videos

    def _read(self):
        """Fills `_paths`. Returns the number of each entry's label, array of int [entries]; and
        {label: (its number, the place that has it first)}."""
        numbers = array("i")
        seen = {}
        lines = full_lines(self.path)
        head, separator = self._separator(lines)
        own = f"; its separator is a {SEPARATORS[separator]}"
        for place, line in chain(head, lines):
            fields = _fields(line, separator)
            if not fields:
                _refuse(place, line, own)
            video, label = fields
            self._paths.append(video)
            number, _ = seen.setdefault(label, (len(seen), place))
            numbers.append(number)
        if not seen:
            raise UserError(
                f"{self.path}: the list is empty; "
                "it should hold a line a video, `path label` or `path,label`"
            )
        return numbers, seen

    def _separator(self, lines):
        """(the lines that were read to find it, the file's separator)."""
        head = []
        left = set(SEPARATORS)
        for place, line in lines:
            head.append((place, line))
            left &= _separators(line)
            if not left:
                _refuse(place, line)
            if len(left) == 1:
                return head, left.pop()
        if head:
            place, line = head[0]
            raise UserError(
                f"{place}: {line[:80]!r} can be split at its comma and at its space, and no other "
                'line tells which: quote what belongs together, "my,video.mp4" label or '
                'video.mp4,"my label"'
            )
        return head, ","

    def _refuse_other_tables(self, seen, once):
        """UserError for a header, and for labels that are paths: they would be taken for a class
        without a word. once: whether the first label is no other line's."""
        first = self._paths[0]
        second = self._paths[min(1, len(self._paths) - 1)]
        label, *others = seen
        _, place = seen[label]
        by_name = label.lower() in ("label", "class") or _named_video(second)
        by_number = others and once and all(map(_INTEGER.fullmatch, others))
        if not _named_video(first) and not _INTEGER.fullmatch(label) and (by_name or by_number):
            raise UserError(
                f"{place}: a header, {first!r} and {label!r}? A list has none: "
                "remove it (`data.py list` makes lists of published tables); "
                "if it is a folder of chunks, let a video's line come first"
            )
        for label, (_, place) in seen.items():
            if any(map(_named_video, _WORDS.split(label))):
                raise UserError(
                    f"{place}: the label {label!r} names a video: a line is "
                    '`path,label`, and a path that holds the separator is quoted, "a,b.mp4",label'
                )

    def _refuse_unknown_labels(self, seen, known):
        for label, (_, place) in seen.items():
            if label not in known:
                count = len(self.classes)
                names = ", ".join(self.classes[:8])
                if self.classes[0] == "0":
                    names = f"0 ... {count - 1}"
                raise UserError(
                    f"{place}: label {label!r} is not one of the {count} classes ({names})"
                )

    def __len__(self):
        return len(self.labels)

    def digest(self):
        """What tells its entries from another list's, wherever the two files lie:
        a SHA-256, in hexadecimal."""
        return digest(self._paths, Strings(self.classes), self.labels)

    def video(self, index):
        """Path of entry `index`, joined to the root."""
        return os.path.join(self.root, self._paths[index])


# --------------------------------------------------------------------------------------------------
# Captioned lists
# --------------------------------------------------------------------------------------------------
# EK-100, Ego4D, HTM-AA and HTM-Align, each published in a form of its own, become one kind of
# object: times of videos, and what is said of them. The forms may be skipped, from Unlike to
# _CAPTION_FORMATS, and at the end what a run asks of its lists before its first step. To lift:
# read_captions with Captions; plain_pickle, which runs nothing of a pickle.


class Caption(NamedTuple):
    """A row of a captioned list, of whatever format: a time of a video, what is said of it, its
    classes."""

    video: str  # path below the root; without an ending, .mp4's
    start: float  # in seconds
    end: float
    text: object  # a text, or a list of phrasings
    action: str = None  # two classes, `verb:noun`
    nouns: tuple = ()  # classes of all nouns, each once, in order
    narration_id: str = ""  # EK-100's


class Captions:
    """Captioned segments in memory, from rows (Caption, or its first four).

    Each of `video(index)`, a path under root, `start` and `end`, float64 [entries], `text(index,
    u)`, and `video_of`, int32 [entries], the number of its video among `names`. Where its list has
    classes: `action` and `noun_set`, int32 [entries], places in `actions` and in `noun_sets`; and
    `narration_ids`, a list. About 50 bytes an entry beside its text, so that Ego4D's 35 million
    narrations fit, once for all of a machine's workers.

    `paths`: of its lists, `path` in words. `left_out`: their rows that can't be used, a place and a
    reason each.
    """

    def __init__(self, rows, root="", paths=()):
        self.root = str(root)
        self.paths = paths
        self.path = ", ".join(paths)
        self.left_out = []
        self.texts = Strings()
        self.narration_ids = []
        numbers = {}
        actions = {}
        noun_sets = {}
        video_of = array("i")
        times = array("d")
        ends = array("q", [0])
        action_of = array("i")
        noun_set_of = array("i")
        for row in rows:
            video, start, end, text, action, nouns, narration_id = Caption(*row)
            video_of.append(numbers.setdefault(video, len(numbers)))
            times.extend((start, end))
            for phrasing in (text,) if isinstance(text, str) else text:
                self.texts.append(phrasing)
            ends.append(len(self.texts))
            action_of.append(actions.setdefault(action, len(actions)))
            noun_set_of.append(noun_sets.setdefault(nouns, len(noun_sets)))
            if narration_id:
                self.narration_ids.append(narration_id)
        self._ends = ends
        self.names = Strings(numbers)
        self.video_of = np.frombuffer(video_of, np.int32)  # [entries]
        self.start, self.end = np.frombuffer(times).reshape(-1, 2).T  # [entries] each
        self.actions = list(actions)
        self.noun_sets = list(noun_sets)
        self.action = np.frombuffer(action_of, np.int32)  # [entries]
        self.noun_set = np.frombuffer(noun_set_of, np.int32)  # [entries]
        self.labels = np.broadcast_to(np.int32(0), len(video_of))  # none: the caption is the label

    def __len__(self):
        return len(self.video_of)

    @property
    def classified(self):
        """Whether each entry has an action."""
        return None not in self.actions

    def video(self, index):
        """Path of the video of entry `index`, joined to the root."""
        return os.path.join(self.root, self.names[self.video_of[index]])

    def digest(self):
        """What tells its entries from another list's, wherever the two files lie: a SHA-256, in
        hexadecimal."""
        numbers = self.video_of, self.start, self.end, self._ends, self.labels
        return digest(self.names, self.texts, *numbers)

    def text(self, index, u=0.0):
        """Caption of entry `index`; of several phrasings the one that u in [0, 1) picks."""
        first, stop = self._ends[index], self._ends[index + 1]
        return self.texts[first + int(u * (stop - first))]


def numbered(items):
    """int64 [items]: 0, 1, ... in the order of appearance, equal for equal items."""
    seen = {}
    return torch.tensor([seen.setdefault(item, len(seen)) for item in items])


def read_captions(
    paths, root="", max_bad=0.01, reach=0.0, texts=True, classes=None, kind=Captions, ctx=None
):
    """The captioned segments of one or several lists, as one object of this `kind` of Captions.

    Formats, by ending: .pkl, AVION's Ego4D: tuples (video, start, end, text or phrasings, ...).
    .csv: EK-100's as published (EPIC_100_train.csv ...); HTM-AA's (vid, timestamp, text), whose
    captions are of `reach` seconds before and after their time; or video, start, end, text. .json:
    HTM-Align's, {video: [[alignable, start, end, text]]}. .jsonl: {"video", "start", "end", "text"}
    a line. Left out are captions that are not seen in their video (not alignable, or "visible":
    false); and, counted (--max-bad), those that end before they start and, unless not `texts`,
    those without a word. These are as unreadable videos are: one, or this share of the rows, is
    forgiven, and printed where there is a Context. classes: how many of EK-100's verbs and nouns
    there may be. UserError names file and row of a mistake.
    """
    paths = [str(path) for path in paths]
    left_out = []
    rows = [_captions_of(path, reach, texts, classes, left_out) for path in paths]
    captions = kind(chain.from_iterable(rows), root, paths)
    captions.left_out = left_out
    if left_out:
        n = len(captions) + len(left_out)
        note = f"{left_out[0]} ({len(left_out)} such of {n} rows"
        if len(left_out) > max(1, int(max_bad * n)) or not len(captions):
            raise UserError(f"{note}, --max-bad {max_bad:g})")
        if ctx and ctx.rank == 0:
            print(f"left out: {note})")
    return captions


class Unlike(ValueError):
    """An entry of an annotation is not as published: why, in words for its user."""


# what reading a malformed entry raises
MALFORMED = ValueError, LookupError, TypeError, AttributeError, csv.Error


def _why(error):
    """What such an error says to a user, in brackets; "" where it only speaks of Python."""
    number = re.search(r"(?:to float|base 10): (.+)", str(error))
    if number:
        return f" ({number[1]} is not a number)"
    if isinstance(error, KeyError):
        return f" ({error} is missing, or unknown)"
    if isinstance(error, (Unlike, json.JSONDecodeError, csv.Error)):
        return f" ({error})"
    return ""


def _captions_of(path, reach, texts, classes, left_out):
    """Yields what a Caption holds of each row of a list that can be used; of the others their place
    and why go to `left_out`."""
    read, parse = _CAPTION_FORMATS.get(Path(path).suffix, _CAPTION_FORMATS[".csv"])
    place = path
    row = ""
    found = False
    named = {}  # {video in the list: with its ending}: many rows are of the same video
    try:
        for place, row in read(path):
            caption = parse(row, reach)
            if caption is None:
                continue
            found = True
            video, start, end, text, action, nouns, narration_id = caption
            if classes:
                _check_classes(place, action, classes)
            start = float(start)
            end = float(end)
            phrasings = _phrasings(text)
            spoken = [text for text in phrasings if _WORD.search(text)]
            if not 0 <= start <= end < math.inf:
                time = f"its time is {start:g} to {end:g} s"
                left_out.append(f"{place}: {time}: the start must be before the end")
            elif texts and not spoken:
                shown = " ".join(" ".join(phrasings).split())
                left_out.append(f"{place}: its sentence has no word: {shown or 'it is empty'}")
            else:
                if video not in named:
                    named[video] = video if _named_video(video) else f"{video}.mp4"
                yield named[video], start, end, spoken or phrasings, action, nouns, narration_id
    except MALFORMED as error:
        raise UserError(
            f"{place}: not a row of EPIC_100_train.csv, of HTM-AA or HTM-Align, of AVION's .pkl, "
            f"nor video, start, end, text: {row!r:.80}{_why(error)}"
        ) from None
    if not found:
        raise UserError(
            f"{path}: no annotation is in it: it holds no narration, no sentence that can be seen"
        )


_WORD = re.compile(r"\w")


def _phrasings(text):
    """A caption's phrasings, a list; Unlike where it isn't text. Half of an emoji, cut off,
    becomes a `?`."""
    clean = []
    for phrasing in text if isinstance(text, (list, tuple)) else [text]:
        if not isinstance(phrasing, str):
            raise Unlike("the narration is not text")
        clean.append(phrasing.encode("utf-8", "replace").decode())
    return clean


def _check_classes(place, action, classes):
    for word, number, count in zip(("verb", "noun"), action.split(":"), classes, strict=True):
        if not 0 <= int(number) < count:
            raise UserError(f"{place}: {word}_class {number} is not one of 0 ... {count - 1}")


def plain_pickle(path):
    """What a pickle of plain data holds: lists, tuples, dicts, strings, numbers. It can name no
    class and no function, so there is nothing that it could run; UserError where it tries."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"loading it would call {module}.{name}")

    with reading(path), open(path, "rb") as file:
        try:
            return Plain(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(
                f"{path}: refused, {error or 'it ends too early'}; nothing in it was run. The same "
                "rows as .csv or .jsonl (video, start, end, text) are read too"
            ) from error


def read_lines(path):
    """Yields (`path:number`, line) of a text file; UserError names a file that can't be
    read, or a line not in UTF-8."""
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not text in UTF-8 ({error.reason})") from None
            yield place, text


def read_table(path):
    """Yields (`path:number of its last line`, {column: cell}) of each row of a csv file with a
    header. UserError names the line where a row that is not csv begins."""
    rows = csv.DictReader((line for _, line in read_lines(path)), strict=True)
    before = 0
    try:
        for row in rows:
            before = rows.line_num
            yield f"{path}:{before}", row
    except csv.Error as error:  # an open quote, mostly, which would swallow all that follows
        raise UserError(f"{path}:{before + 1}: this row is not csv ({error})") from None


# Of each format its rows, with their places for messages, and the Caption that a row is: None where
# its video doesn't show it. A row that is none raises whatever it raises.


def _tuples(path):
    for number, row in enumerate(plain_pickle(path)):
        yield f"{path}: row {number}", row


def _of_tuple(row, reach):
    video, start, end, text = row[:4]
    return Caption(video, max(start, 0.0), end, text)


def _sentences(path):
    whole = "".join(line for _, line in read_lines(path))
    for video, sentences in json.loads(whole).items():
        for number, sentence in enumerate(sentences):
            yield f"{path}, {video}, sentence {number}", (video, sentence)


def _of_sentence(row, reach):
    video, (alignable, start, end, text) = row
    return Caption(video, start, end, text) if alignable else None


def _of_json(line, reach):
    if not line.strip():
        return None
    row = json.loads(line)
    if not row.get("visible", True):
        return None
    unnamed = ("",)  # one set for all, of no noun: digests have it from the beginning
    caption = Caption(row["video"], row["start"], row["end"], row["text"], nouns=unnamed)
    words = str(row["text"]).split(" ", 3)
    if "visible" in row and len(words) == 4:  # the toy set's: `a red square moves left`
        noun = f"{words[1]} {words[2]}"
        return caption._replace(action=f"{words[3]}:{noun}", nouns=(noun,))
    return caption


def _of_cells(row, reach):
    if "vid" in row:  # HTM-AA
        at = float(row["timestamp"])
        return Caption(row["vid"], max(0.0, at - reach), at + reach, row["text"])
    if "verb_class" not in row:
        return Caption(row["video"], float(row["start"]), float(row["end"]), row["text"])
    verb = int(row["verb_class"])
    noun = int(row["noun_class"])
    nouns = json.loads(row["all_noun_classes"]) if "all_noun_classes" in row else [noun]
    return Caption(
        f"{row['participant_id']}/{row['video_id']}.MP4",
        _clock(row["start_timestamp"]),
        _clock(row["stop_timestamp"]),
        row.get("narration") or "",
        f"{verb}:{noun}",
        tuple(sorted(set(nouns))),
        row.get("narration_id") or "",
    )


def _clock(text):
    """Seconds of hours:minutes:seconds."""
    seconds = 0.0
    for n, part in enumerate(reversed(text.split(":"))):
        seconds += float(part) * 60**n
    return seconds


_CAPTION_FORMATS = {
    ".pkl": (_tuples, _of_tuple),
    ".pickle": (_tuples, _of_tuple),
    ".json": (_sentences, _of_sentence),
    ".jsonl": (read_lines, _of_json),
    ".csv": (read_table, _of_cells),
}


def need_list(flag, path, ctx, what="a file of one video a line, `path label` or `path,label`"):
    """UserError where a list is missing. A toy set that it is of, toy/<set>/, is made on first
    use."""
    if not path:
        raise UserError(f"{flag} is missing: {what}")
    parts = Path(path).parts
    if len(parts) == 3 and parts[0] == "toy" and parts[1] in TOY_SETS:
        if ctx.rank == 0:
            try:
                make_toy("toy", parts[1])
            except OSError as error:
                raise UserError(f"can't make the toy videos: {error}") from None
        ctx.barrier()


def need_lists(cfg, ctx, *what):
    """need_list of both lists of a training."""
    need_list("--train-list", cfg.train_list, ctx, *what)
    need_list("--val-list", cfg.val_list, ctx, *what)


def need_classes(videos):
    """UserError where a classifier has nothing to tell apart."""
    if len(videos.classes) < 2:
        raise UserError(f"{videos.path}: all videos are of one class; a classifier needs two")


def need_videos(videos, max_bad, root="--data-root"):
    """UserError where more of a validation list's videos are missing than its
    evaluation would forgive: said before the first step, and not hours later. root: the
    flag that says where they are."""
    paths = {videos.video(i) for i in range(len(videos))}
    missing = sorted(path for path in paths if not os.path.exists(place_of(path)))
    if len(missing) > max(1, max_bad * len(paths)) or len(missing) == len(paths):
        raise UserError(
            f"{videos.path}: {len(missing)} of its {len(paths)} videos are missing "
            f"({missing[0]} ...): is {root} right? (--max-bad {max_bad:g} allows a few)"
        )


# --------------------------------------------------------------------------------------------------
# Features of sentences
# --------------------------------------------------------------------------------------------------
# Sentences become features of a frozen language model once, in a file that training maps into
# memory (Turbo, Sec. 4.2). All of it may be skipped by who trains on video alone. To lift:
# encode_sentences; or hash_words, which needs no model.


def hash_words(text, width=256):
    """A sentence as a unit vector, float32 [width], without a model: words and pairs of
    neighbours, each at a place and with a sign that its hash gives (Weinberger et al. 2009).
    Enough to tell toy sentences apart."""
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    vector = np.zeros(width, np.float32)
    for term in [*words, *pairs]:
        code = zlib.crc32(term.encode())
        vector[code % width] += 1 if code >> 31 else -1
    return vector / max(np.linalg.norm(vector), 1e-6)


def _language_model(name, device):
    """(tokenizer, encoder) of a Hugging Face text model; of an encoder-decoder the encoder."""
    try:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        net = AutoModel.from_pretrained(name)
    except Exception as error:
        # no such folder or name, no network, a missing package: anything is raised
        why = (str(error) or repr(error)).splitlines()[0]
        need = "it needs `pip install transformers`; hashing doesn't"
        raise UserError(f"--text-model {name}: {why} ({need})") from error
    if net.config.is_encoder_decoder:
        net = net.get_encoder()
    else:
        net = getattr(net, "text_model", net)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, net.to(device).eval()


@torch.no_grad()
def encode_sentences(texts, model, device):
    """Yields float16 [b, width] of consecutive sentences: the first token's output of a language
    model, a hub name or folder; or hash_words, model "hashing"."""

    def batches():
        for first in range(0, len(texts), 256):
            yield [texts[i] for i in range(first, min(first + 256, len(texts)))]

    if model == "hashing":
        for batch in batches():
            yield np.stack([hash_words(text) for text in batch]).astype(np.float16)
        return
    tokenizer, net = _language_model(model, device)
    # MPNet's, RoBERTa's begin at 2
    places = (getattr(net.config, "max_position_embeddings", 0) or 512) - 2
    length = min(128, places, tokenizer.model_max_length)
    for batch in batches():
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        part = net(**tokens.to(device)).last_hidden_state[:, 0].half().cpu()  # [b, width]
        # The first token of a causal model sees no other: it says nothing of the sentence.
        alike = len(set(batch)) > 1 and (part == part[0]).all()
        if alike or not part.isfinite().all():
            raise UserError(
                f"--text-model {model}: its first output token is not finite, or the same for all"
            )
        yield part.numpy()


def text_file(captions, model, folder):
    """Where the features of a list's sentences are kept: its name tells list,
    model and sentences apart."""
    code = zlib.crc32(f"{model} {captions.texts.digest()}".encode())
    return Path(folder) / f"{Path(captions.path).stem}-{Path(model).name}-{code:08x}.text.npy"


def write_text(captions, model, folder, device):
    """Encode each sentence of Captions once (`encode_sentences`), into `text_file`."""
    out = text_file(captions, model, folder)
    batches = -(-len(captions) // 256)
    rows = None
    done = 0
    with replacing(out) as temporary:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")  # an error is raised here, before the language model is loaded
        parts = encode_sentences(captions.texts, model, device)
        for part in tqdm(parts, f"encoding {captions.path}", batches, unit="batch", disable=None):
            if rows is None:
                rows = new_array(temporary, (len(captions), part.shape[1]), np.float16)
            rows[done : done + len(part)] = part
            done += len(part)
        rows.flush()
    print(f"{out}: {rows.shape[0]} sentences x {rows.shape[1]}")


def open_text(captions, model, folder, width=0):
    """The features that `write_text` wrote, float16 [sentences, width], mapped into
    memory; of hashing made on the spot where there is no file. UserError where they are
    missing, or of another width."""
    path = text_file(captions, model, folder)
    again = f"run --task encode_text --text-model {model} with the same lists"
    if model == "hashing" and not path.exists():
        return np.concatenate([*encode_sentences(captions.texts, "hashing", None)])
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        why = f"no features of the sentences of {captions.path} by {model}"
        raise UserError(f"{path}: {why} ({getattr(error, 'strerror', error)}); {again}") from None
    if rows.ndim != 2 or len(rows) != len(captions) or width not in (0, rows.shape[1]):
        shape = len(captions), width or "any width"
        raise UserError(
            f"{path}: features of shape {rows.shape}, where {shape} are needed; {again}"
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Frame sampling
# --------------------------------------------------------------------------------------------------
# Pure functions -> frames in the order shown, for `read`. u in [0, 1) is the uniform draw that
# picks among what the paper picks from at random, the first and the last of it included; 0.5 is
# the middle, 1 the last too, but for segment_frames. n different frames, always, unless said
# otherwise; ValueError where the video has fewer than n. What a paper states in seconds goes by the
# frames' times, not by their number: frame rates vary. What your paper doesn't name may be skipped.
# To lift: any of them, for a Video or its VideoInfo.


def _check_length(info, n):
    if info.num_frames < n:
        raise ValueError(
            f"has {info.num_frames} frames, a clip needs {n}; "
            "leave the video out or lower --frames (--stages)"
        )


def fps_frames(video, n, fps, u):
    """n frames of a Video at `fps`, by its times, from a random start (Turbo,
    Sec. 4.1: 16 frames at 5 fps, 3 s).

    The first is any frame behind which the clip still fits. Where the video is too short for that
    the frames are spread evenly over all of it; a video slower than `fps` gives consecutive frames.
    A frame repeats where the video pauses.
    """
    _check_length(video.info, n)
    step = max(1 / fps, 1 / video.info.fps)  # seconds
    last = video.times[-1] - (n - 1) * step  # second of the last start
    # 1e-3: as `Video.at` rounds
    starts = max(1, int(np.searchsorted(video.times, last + 1e-3, "right")))
    step = min(step, video.times[-1] / max(1, n - 1))
    start = video.times[min(int(u * starts), starts - 1)]
    return video.at(start + step * np.arange(n))


def stride_frames(info, n, stride, u):
    """n frames, `stride` apart, from a random start: any that leaves n * stride frames, as likely
    as any other (VideoMAE, pretraining).

    A shorter video is spread evenly over the n frames, where VideoMAE repeats its last.
    """
    _check_length(info, n)
    # as VideoMAE, which leaves stride - 1 frames free behind the last
    room = max(0, info.num_frames - n * stride)
    step = min(stride, (info.num_frames - 1) / max(1, n - 1))
    start = min(int(u * (room + 1)), room)
    return [start + int(i * step + 1e-6) for i in range(n)]


def segment_frames(info, n, u):
    """One frame of each of n equal segments (TSN, Wang et al. 2016; for SSv2): u, [n] or
    one for all, places it there.

    Training draws u anew for each segment; test clip k of K, as VideoMAE
    interleaves them, is u = k / K.
    """
    _check_length(info, n)
    edges = [i * info.num_frames // n for i in range(n + 1)]
    places = np.broadcast_to(u, n).tolist()
    return [a + int(p * (b - a)) for (a, b), p in zip(pairwise(edges), places, strict=True)]


def _end_within(video, start, end):
    """`end`, or the video's if that is earlier; ValueError where nothing lies before it."""
    stop = video.clamp(end)
    if not 0 <= start < stop:
        raise ValueError(f"has nothing from second {start:g} to {end:g}, its end or the clip's")
    return stop


def between_frames(video, start, end, n, u=0.5):
    """n frames between two times in seconds, one in each of n equal segments (AVION):
    u = 0.5, or [n] draws as jitter.

    An end behind the video's is the video's. Frames repeat if there are fewer than n between the
    two. ValueError where nothing is between them.
    """
    end = _end_within(video, start, end)
    return video.at(start + (np.arange(n) + np.asarray(u)) * (end - start) / n)


def moment_frames(video, start, end, n, fps, u=0.5):
    """n frames at `fps` somewhere between two times in seconds, u says where; around
    their middle if that is shorter.

    Turbo's video-language clips (u drawn; HTM-AA). The clip stays within the video; if
    that is shorter, it is spread over it, and frames may repeat. ValueError where
    nothing is between the times.
    """
    _end_within(video, start, end)
    room = end - start - n / fps
    stop = video.clamp(max(0, start + room * (u if room > 0 else 0.5)) + n / fps)
    begin = max(0, stop - n / fps)
    return video.at(begin + (np.arange(n) + 0.5) * (stop - begin) / n)


def second_frames(video, second, n, fps=0):
    """n frames around the middle of a second, at `fps` or n a second: for features at
    one a second (HTM-Align)."""
    return moment_frames(video, second, second + 1, n, fps or n)


def span_frames(video, n, u):
    """n frames of a Video, evenly spread in time, from one in its first 20 % to one in its
    last 20 % (Turbo, long video); u: two draws, of the first and of the last. A frame
    repeats where the video pauses."""
    _check_length(video.info, n)
    times = video.times
    end = times[-1]
    early = int(np.searchsorted(times, 0.2 * end + 1e-3, "right"))  # frames in the first 20 %
    late = len(times) - int(np.searchsorted(times, 0.8 * end - 1e-3))  # frames in the last 20 %
    first = min(int(u[0] * early), early - 1)
    last = len(times) - 1 - min(int(u[1] * late), late - 1)
    if last - first < n - 1:
        first = 0
        last = len(times) - 1
    return video.at(np.linspace(times[first], times[last], n))


def view_frames(info, n, stride, k, views):
    """Test clip k of `views`, evenly placed over the video, n frames `stride` apart
    (VideoMAE; with `crop_box`)."""
    _check_length(info, n)
    room = max(0, info.num_frames - n * stride)
    first = room * k // (views - 1) if views > 1 else room // 2
    return [first + i for i in stride_frames(info, n, stride, 0.0)]


# --------------------------------------------------------------------------------------------------
# Boxes
# --------------------------------------------------------------------------------------------------
# What decode-crop cuts out, (x, y, w, h) in pixels of the upright frame, is drawn before anything
# is decoded; even numbers, so that they fall on whole chroma samples, but for a side that is all of
# an odd short side. What your paper doesn't name may be skipped. To lift: any of them, of a
# VideoInfo and a key, with common.uniform.


def crop_box(info, k=1, crops=3, share=1.0):
    """Square k of `crops` along the long side, first and last at its ends, in the middle of
    the other (multi-crop test).

    Its side is `share` of the short side, as of random_box; 1: all of it.
    """
    short, long = sorted(info[:2])
    side = short if share == 1 else max(2, round(share * short / 2) * 2)
    along = (long - side) * k // (crops - 1) if crops > 1 else (long - side) // 2
    along &= ~1
    across = (short - side) // 2 & ~1
    if info.width >= info.height:
        return along, across, side, side
    return across, along, side, side


def centre_box(info):
    """The largest centred square."""
    return crop_box(info)


def _placed(info, w, h, left, top):
    """(x, y, w, h) of a box of w x h pixels, at an even place by two draws."""
    x = 2 * int(left * ((info.width - w) // 2 + 1))
    y = 2 * int(top * ((info.height - h) // 2 + 1))
    return x, y, w, h


def random_box(info, key, share=1.0):
    """A square anywhere, of `share` of the short side: simple random crop (AVION,
    Sec. 4.2; AlexNet, DeiT III).

    Scaling the short side to 256 and cutting 224 (AVION, App. B) is share = 224 / 256.
    """
    short = min(info.width, info.height)
    side = min(max(2, round(share * short / 2) * 2), short)
    return _placed(info, side, side, *uniform(key, "crop", 2).tolist())


def random_resized_box(info, key, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), tries=10):
    """Inception's crop, drawn from a key before anything is decoded (AVION, Eqs. 1-2;
    ratio log-uniform, as usual).

    After `tries` misses: the centre box.
    """
    draws = uniform(key, "crop", 4 * tries).reshape(tries, 4).tolist()
    for size, shape, left, top in draws:
        area = info.width * info.height * (scale[0] + size * (scale[1] - scale[0]))
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** shape
        w = 2 * max(1, round(math.sqrt(area * aspect) / 2))
        h = 2 * max(1, round(math.sqrt(area / aspect) / 2))
        if w <= info.width and h <= info.height:
            return _placed(info, w, h, left, top)
    return centre_box(info)


def multi_scale_box(info, key, scales=(1.0, 0.875, 0.75, 0.66)):
    """TSN's multi-scale crop (VideoMAE pretraining; Turbo, Table 6): sides of the short side times
    two scales that are at most one step apart, at one of 13 places: a 5 x 5 grid's corners, edge
    middles, centre and inner quarters."""
    short = min(info.width, info.height)
    which, where = uniform(key, "crop", 2).tolist()
    pairs = []
    for i, a in enumerate(scales):
        pairs += [(a, b) for b in scales[max(0, i - 1) : i + 2]]
    a, b = pairs[int(which * len(pairs))]
    w = int(short * a) & ~1
    h = int(short * b) & ~1
    places = []  # quarters of the room, 9 + 4 of them
    for i in range(5):
        places += [(i, j) for j in range(i % 2, 5, 2)]
    i, j = places[int(where * len(places))]
    x = (info.width - w) * i // 4 & ~1
    y = (info.height - h) * j // 4 & ~1
    return x, y, w, h


# --------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------
# A file becomes uint8 [T, 3, h, w], and nothing is decoded that the clip doesn't need. What reads
# in headers and packets what needn't be decoded may be skipped, from `_nals` to `_turn`; and so may
# the slow way of `Video`, `_count`, `_counted` and `_decode_all`, for files that don't say. To
# lift: Video, and all that it names.
#
# Why it is fast. CPU time of each step as a share of the step before: geometric means over 256p to
# 720p, H.264 by x264's defaults with a keyframe in 60 to 150 frames, one thread of two busy
# x86-64 cores. (a) 16 frames at stride 4, (b) 4 of one second in 15, (c) 32 over the video,
# (d) 2 frames:                                                                a    b    c    d
#   decode all from the first frame, convert, crop, scale (Fig. 8a)          1.00 1.00 1.00 1.00
#   crop before scaling and colour conversion (Fig. 8b)         `_convert`    .80  .96  .95  .98
#   scale to planar RGB: swscale is slow at interleaving, and we want that    .96  .99  .99 1.00
#   headers and list of packets say what is there, no decoding  `_index`     1.00 1.01  .99 1.01
#   start at the keyframe before a wanted frame, by that list   `_plan`       .77  .41  .76  .79
#   leave out frames that none refers to and nobody wants       `_droppable`  .76  .77  .69  .73
# What remains is 1.05 to 1.3 times the bare decoding of the packets that a clip
# needs (tests/bench_decode.py).

# of a frame, 8192x8192: a damaged header may claim anything, and the decoder would allocate it
MAX_PIXELS = 1 << 26
# seconds that a last frame stays on the screen: cuts are rounded to frames, and headers round too
HOLD = 0.25
CHUNK_TIMES = "frame_times"  # metadata of a chunk: `_times_in_whole`, as 16 hexadecimal digits each
# packets of a video stay in memory up to this size; those of a larger one are read again
KEEP_BYTES = 256 << 20
# The containers that are opened, by FFmpeg's names, and how their files are called. A file is what
# its content says: the suffixes only tell which files of a folder, and which words of a list, are
# meant as videos (`_named_video`).
CONTAINERS = {
    "mov": "mp4 mov qt 3gp 3g2 f4v mj2",
    "matroska": "mkv mk3d",
    "webm": "webm",
    "avi": "avi divx",
    "mpegts": "ts mts m2ts m2t",
    "mpeg": "mpg mpeg vob",
    "mpegvideo": "m1v m2v",
    "flv": "flv",
    "asf": "asf wmv",
    "ogg": "ogv ogg ogm",
    "h264": "h264 264 avc",
    "hevc": "hevc h265 265",
    "m4v": "m4v",
    "mxf": "mxf",
    "rm": "rm rmvb",
    "dv": "dv dif",
    "gif": "gif",
    "ivf": "ivf",
    "obu": "obu",
}
SUFFIXES = {f".{suffix}" for suffix in " ".join(CONTAINERS.values()).split()}
# Local files and containers of video only. Without this, a text that lists other files
# or addresses is a video too.
OPEN = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(CONTAINERS),
    "max_pixels": str(MAX_PIXELS),
}
# FFmpeg learns about a stream by decoding its first frames. The headers of these
# containers and codecs say enough.
OPEN_FAST = OPEN | {"skip_frame": "all", "analyzeduration": "0", "probesize": "32"}
FAST_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
FAST_CODECS = ("h264", "hevc", "vp9", "av1")
# Planar formats, of which a crop is a view.
PLANAR = re.compile(r"(gray|gbrp|yuv4(20|22|44)p)(10le|12le)?|yuvj4(20|22|44)p")
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND


class VideoError(Exception):
    """A video, or a frame of it, that can't be read: `path` and `reason`;
    str() is both, in one line."""

    def __init__(self, path, reason):
        # kept as arguments, so that workers can hand the error to the trainer (pickle)
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self):
        name = os.fsencode(self.path).decode("utf-8", "backslashreplace").replace("\n", "\\n")
        return f"{name}: {self.reason}"


class VideoInfo(NamedTuple):
    """What `probe` tells of a video."""

    width: int  # pixels, upright: after rotation
    height: int
    fps: float  # frames a second, the mean over the video
    num_frames: int  # frames that a decoder shows; exact
    duration: float  # seconds from the first frame to the end of the last
    # degrees clockwise that the coded picture was turned by to be upright; doesn't tell mirroring
    rotation: int
    codec: str


@contextmanager
def _errors(path, doing, hint="; it is damaged, or not a video"):
    """Whatever FFmpeg and PyAV raise on a bad file becomes one VideoError."""
    kinds = av.FFmpegError, ValueError, LookupError, RuntimeError, MemoryError, OverflowError
    try:
        yield
    except kinds as error:
        why = getattr(error, "strerror", None) or error
        raise VideoError(path, f"{doing}: {why}{hint}") from error


def _nals(packet, prefix):
    """The NAL units of an H.264 or HEVC packet, each behind its length of `prefix` bytes,
    as views."""
    data = memoryview(packet)
    at = 0
    while at + prefix < len(data):
        start = at + prefix
        at = start + int.from_bytes(data[at:start], "big")
        if at < start + 2 or at > len(data):  # damaged
            return
        yield data[start:at]


def _droppable(packet, codec, prefix):
    """True if no other frame refers to that of this packet: a non-reference picture.

    H.264: nal_ref_idc is 0. HEVC without temporal layers (`_read_header` sees to it): an even type
    below 16. B-frames that others refer to (b-pyramid) are not droppable, rightly. PyAV's
    is_disposable says nothing for these.
    """
    for nal in _nals(packet, prefix):
        if codec == "h264" and nal[0] & 31 in (1, 5):
            return nal[0] & 0x60 == 0
        if codec == "hevc" and nal[0] >> 1 < 32:
            return nal[0] & 0xE2 == 0
    return False


def _clean_start(packet, codec, prefix, first):
    """True if decoding may start at this packet: no frame shown after its own
    needs one before it in the file.

    The container's keyframe mark is no proof for H.264 and HEVC, whose decoders make up
    missing references: some muxers mark every intra frame. So: IDR; or HEVC's CRA where it
    isn't the first of the file, whose decoder would hide the frames that refer to what is
    missing; and no HEVC picture with no_output_of_prior_pics. VP9's and AV1's decoders refuse
    to start anywhere but at a keyframe.
    """
    if not prefix:
        return True
    for nal in _nals(packet, prefix):
        if codec == "h264" and nal[0] & 31 in (1, 5):
            return nal[0] & 31 == 5
        kind = nal[0] >> 1
        if codec == "hevc" and kind < 32:
            if first:
                return kind in (19, 20)
            return kind in (19, 20, 21) and nal[2] & 0x40 == 0
    return False


def _only_frames(sps):
    """frame_mbs_only_flag of an H.264 sequence parameter set (7.3.2.1.1): no picture
    under it is a single field."""
    raw = sps.replace(b"\0\0\3", b"\0\0")  # without emulation prevention
    bits = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}"
    at = 32  # behind profile and level

    def flag():
        nonlocal at
        at += 1
        return bits[at - 1] == "1"

    def number():  # Exp-Golomb: n zeros, then n + 1 bits
        nonlocal at
        zeros = bits.index("1", at) - at
        at += 2 * zeros + 1
        return int(bits[at - zeros - 1 : at], 2) - 1

    number()  # its id
    if raw[1] not in (66, 77, 88):  # any profile but Baseline, Main and Extended
        chroma = number()
        if chroma == 3:
            flag()
        number()  # bit depths
        number()
        flag()  # lossless
        # scaling lists: a list's differences go on until they are all there, or an entry is 0
        if flag():
            for i in range(12 if chroma == 3 else 8):
                entry = 8 if flag() else 0
                for _ in range(16 if i < 6 else 64):
                    if entry:
                        code = number()
                        entry = (entry + ((code + 1) // 2 if code % 2 else -code // 2)) % 256
    number()  # bits of a frame's number
    order = number()
    if order == 0:
        number()
    if order == 1:
        flag()
        number()
        number()
        for _ in range(number()):
            number()
    number()  # references
    flag()  # gaps
    number()  # width
    number()  # height
    return flag()


def _may_be_turned(stream):
    """False if the container says that it turns no picture; otherwise a frame must tell.

    FFmpeg has read the display matrix, but PyAV only hands it on: to the header of an mp4 file
    that is written here for the stream, with no picture in it.
    """
    header = io.BytesIO()
    try:
        with av.open(header, "w", "mp4", options={"movflags": "empty_moov"}) as file:
            file.add_stream_from_template(stream, opaque=True)
            file.start_encoding()
    except (av.FFmpegError, ValueError):  # the stream can't be in an mp4 file
        return True
    _, _, track = header.getvalue().partition(b"tkhd")
    straight = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0"  # a, b, u, c, d of the matrix
    return not track.startswith(straight, 40)


def _filtered(frame, filters):
    """The frame that comes out of FFmpeg's filters, `name` or `name=arguments` each."""
    graph = av.filter.Graph()
    graph.threads = 1
    steps = [graph.add(*each.split("=", 1)) for each in filters]
    source = graph.add_buffer(frame, time_base=1)  # no step asks when it is shown
    graph.link_nodes(source, *steps, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _side_data(frame):
    """What a frame carries beside its picture, of the types that PyAV knows; one that it
    doesn't know hides them all."""
    try:
        return frame.side_data
    except ValueError:
        known = {kind.value for kind in av.sidedata.sidedata.Type}
        unknown = set(range(64)) - known
        return _filtered(frame, [f"sidedata=mode=delete:type={n}" for n in unknown]).side_data


def _turn(frame):
    """(transpose, flip_x, flip_y), in this order, that make a decoded frame
    upright; from its display matrix."""
    for side in _side_data(frame):
        if side.type.name == "DISPLAYMATRIX":
            # (p, q) is shown at (a p + c q, b p + d q)
            a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5]
            if b == c == 0 and a and d:
                return False, bool(a < 0), bool(d < 0)
            if a == d == 0 and b and c:
                return True, bool(c < 0), bool(b < 0)
            if a or b or c or d:  # some writers leave it empty
                raise ValueError("its display matrix is no multiple of 90 degrees")
    return False, False, False


def _planes(frame):
    """The planes of a frame in a format of PLANAR, [H, W] each, of chroma as small as it is, as
    arrays that share its memory."""
    dtype = np.uint16 if frame.format.name.endswith("le") else np.uint8
    return [np.frombuffer(p, dtype).reshape(p.height, -1)[:, : p.width] for p in frame.planes]


def _view(frame, box):
    """The box (x, y, w, h) of a frame as a frame that shares its memory; None where chroma samples
    would be cut, or the format is none of PLANAR."""
    x, y, w, h = box
    # pixels to a sample of chroma, 1 or 2
    sx = 2 // frame.format.chroma_width(2)
    sy = 2 // frame.format.chroma_height(2)
    if not PLANAR.fullmatch(frame.format.name) or (x | w) % sx or (y | h) % sy:
        return None
    luma, *chroma = _planes(frame)
    planes = [luma[y : y + h, x : x + w]]  # [h, w], of chroma [h / sy, w / sx]
    for plane in chroma:
        planes.append(plane[y // sy : (y + h) // sy, x // sx : (x + w) // sx])
    view = av.VideoFrame.from_dlpack(planes, format=frame.format.name)
    view.colorspace = frame.colorspace
    view.color_range = frame.color_range
    return view


def _convert(out, frame, box, scaler):
    """Crop, scale and convert a decoded frame into out, uint8 [3, h, w], R, G, B:
    AVION's cropping filter (Fig. 8b).

    In that order: what is cropped away is never touched, and colours are converted at the output's
    size. swscale's bilinear widens with the reduction, so it antialiases. Matrix (BT.601, 709,
    2020) and range are the frame's own.
    """
    h, w = out.shape[1:]
    whole = box == (0, 0, frame.width, frame.height)
    # A whole frame is no view: it knows where its chroma samples sit, which a view can't be told,
    # half a pixel. But of an interlaced one swscale would scale the two fields apart.
    view = None if whole and not frame.interlaced_frame else _view(frame, box)
    if view is None and whole:
        view = frame
    elif view is None:
        # colours first, at full size, which takes 3 to 10 times as long
        rgb = VideoReformatter().reformat(frame, format="gbrp", interpolation=EXACT, threads=1)
        view = _view(rgb, box)
    # Without a change of size swscale takes a shortcut that repeats chroma samples, and leaves
    # the last columns of gbrp unwritten unless the width is a multiple of 16 (FFmpeg 8.1). EXACT
    # keeps it off.
    flags = EXACT if (view.width, view.height) == (w, h) else Interpolation.BILINEAR
    rgb = scaler.reformat(view, w, h, "gbrp", interpolation=flags, threads=1)
    for channel, plane in zip((1, 2, 0), _planes(rgb), strict=True):
        out[channel] = plane  # [h, w]


class Video:
    """An open video: what is in it, and any number of reads.

        with Video(path) as v:
            clip = v.read(range(0, 64, 4), 224, (0, 0, 240, 240))    # uint8 [16, 3, 224, 224]

    Args: path of a local file: str, bytes or os.PathLike; fast=False counts frames
    even where it could be spared.
    Attributes: info, a VideoInfo; times, float64 [num_frames], seconds
    of each frame after the first.
    Raises VideoError: no such file, not a video, no video stream, no frame, truncated, damaged.

    Frames are numbered in the order in which they are shown. Where the list of packets tells which
    frame is which (`_index`), a read decodes only what it must (`_plan`), and checks that the
    decoder agrees (`_run`). Any other video is decoded from its beginning and its frames are
    counted (`_count`, `_counted`): slower, and as exact.
    """

    def __init__(self, path, fast=True):
        self.path = os.fsdecode(path)
        self._container = None
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
                self._fast = fast
                if fast:
                    self._index(OPEN_FAST)
                if not self._fast:
                    self._index(OPEN)
                self._describe()
        except VideoError:
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

    # -- what is in the file -----------------------------------------------------------------------

    def _open(self, options):
        """A container and its video stream, ready to decode."""
        container = av.open("file:" + self.path, options=options, metadata_errors="replace")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(self.path, "no video stream in the file")
        if stream.codec_context is None:
            raise VideoError(self.path, "FFmpeg has no decoder for its video stream")
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all  # packets of sound are not even read
        decoder = stream.codec_context
        decoder.thread_count = 1
        decoder.thread_type = "NONE"
        # strict: where a stream doesn't say how far its frames are reordered, the decoder guesses,
        # and loses a frame if the guess is low; with strict it assumes the largest depth.
        decoder.options = {"strict": "1", "max_pixels": str(MAX_PIXELS)}
        if container.format.name not in ("mpegts", "mpeg") and decoder.name != "mpeg4":
            # Instead of making up what is damaged or missing, most often from the frame before.
            # Recordings may begin anywhere, with frames that refer to what is not there;
            # MPEG-4 has too many dialects.
            decoder.options |= {"err_detect": "explode"}
        return container, stream

    def _index(self, options):
        """List the packets in decode order. `_fast` stays True if they tell the frames: each
        holds one, at a time of its own.

        That is what mp4 and mkv ask of these codecs, but for H.264 that may hold fields,
        which often come one by one.
        """
        self.close()
        self._options = options
        self._container, self._stream = self._open(options)
        self._decoder = self._stream.codec_context
        self._codec = self._decoder.codec.canonical_name
        self._prefix = 0
        self._drop = False
        self._sets = set()  # H.264's sequence parameter sets
        if self._fast:
            self._fast = self._read_header()
            if not self._fast:
                return
        gaps = self._list_packets()
        missing = len(self._stream.index_entries) - len(self._rows) - gaps
        if missing > 0 and self._container.format.name == FAST_CONTAINERS[0]:
            raise VideoError(
                self.path,
                f"truncated, {missing} of its {missing + len(self._rows)} frames are missing",
            )
        if not self._rows:
            raise VideoError(self.path, "no frame in its video stream")
        if gaps or self._starts[:1] != [0] or any(pts is None for pts, _, _ in self._rows):
            self._fast = False
        if not self._fast:
            return
        shown = sorted((pts, n) for n, (pts, _, hidden) in enumerate(self._rows) if not hidden)
        # of each frame shown: its time, and its packet's number in `_rows`
        self._pts = [pts for pts, _ in shown]
        self._order = [n for _, n in shown]
        try:
            self._fast = all(map(_only_frames, self._sets))
        except (ValueError, LookupError):  # cut short, which decoders forgive
            self._fast = False
        if not 0 < len(shown) == len(set(self._pts)):
            self._fast = False

    def _read_header(self):
        """Whether packets of this container and codec can tell the frames. Fills `_prefix`, bytes
        of a NAL unit's length; `_drop`, whether `_droppable` knows frames that may be left out;
        and `_sets`."""
        if self._container.format.name not in FAST_CONTAINERS or self._codec not in FAST_CODECS:
            return False
        if self._codec not in ("h264", "hevc"):
            return True
        extra = self._decoder.extradata or b""
        at = 4 if self._codec == "h264" else 21
        if len(extra) <= at or extra[0] != 1:  # its NAL units are not behind lengths
            return False
        self._prefix = (extra[at] & 3) + 1
        if self._codec == "h264":
            self._drop = True
            self._sets.update(map(bytes, islice(_nals(extra[6:], 2), extra[5] & 31)))
        else:
            self._drop = extra[21] >> 3 & 7 == 1  # with one temporal layer
        return True

    def _list_packets(self):
        """How many packets are empty. Fills `_rows`, (pts, dts, hidden) of each other one;
        `_starts`, those at which decoding may begin; and `_packets`, None where they take more
        than KEEP_BYTES."""
        self._packets = []
        self._rows = []
        self._starts = []
        size = 0
        gaps = -1  # PyAV ends with an empty one
        for packet in self._container.demux(self._stream):
            if not packet.size:
                gaps += 1
                continue
            if packet.is_keyframe and self._fast:
                self._note_keyframe(packet)
            self._rows.append((packet.pts, packet.dts, packet.is_discard))
            size += packet.size
            if size > KEEP_BYTES:
                self._packets = None
            if self._packets is not None:
                self._packets.append(packet)
        return gaps

    def _note_keyframe(self, packet):
        """Adds to `_starts` and `_sets`, or finds that packets from here on don't tell the
        frames."""
        if self._codec == "h264":
            for nal in _nals(packet, self._prefix):
                if nal[0] & 31 == 7:
                    self._sets.add(bytes(nal))
        if _clean_start(packet, self._codec, self._prefix, first=not self._rows):
            self._starts.append(len(self._rows))
        elif self._codec == "hevc":  # BLA and no_output_of_prior_pics hide frames around them
            self._fast = False
        if packet.has_sidedata("new_extradata"):
            self._fast = False

    def _count(self):
        """Decode the whole video, for the number of its frames and their
        times. Returns the first frame.

        The first frames are kept for the reads, up to KEEP_BYTES / 4 at 3 bytes a pixel: a short
        video is decoded once.
        """
        self._pts = []
        kept = []
        room = KEEP_BYTES // 4
        for frame in self._decode_all():
            room -= 3 * frame.width * frame.height
            if room >= 0 or not kept:
                kept.append(frame)
            self._pts.append(frame.pts)
        if not kept:
            raise VideoError(self.path, "no frame can be decoded")
        self._kept = kept
        return kept[0]

    def _describe(self):
        """Fill `info` and `times`."""
        first = None
        if not self._fast:
            first = self._count()
        elif _may_be_turned(self._stream):
            # of the first frame shown: an edit list may hide those before it
            (run,) = self._plan([0])
            _, first = next(self._run(*run))
        self._size = self._decoder.width, self._decoder.height
        self._turn = False, False, False
        rotation = 0
        if first is not None:
            self._size = first.width, first.height
            self._turn = _turn(first)
            if any(self._turn):
                rotation = -first.rotation % 360
        width, height = self._size
        if self._turn[0]:
            width, height = height, width
        n = len(self._pts)
        tick = float(self._stream.time_base)
        # as the header says
        fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        pts = np.array(self._pts, np.float64)  # [num_frames], NaN for None
        if not (np.diff(pts) >= 0).all() and n == len(self._rows):
            # AVI says only when packets are decoded, which is as far apart
            pts = np.array([dts for _, dts, _ in self._rows], np.float64)  # [num_frames]
        known = (np.diff(pts) >= 0).all() and pts[-1] > pts[0]
        self.times = (pts - pts[0]) * tick if known else np.arange(n) / fps  # [num_frames]
        # the header is not right, or the rate varies
        if known and abs((n - 1) / fps - self.times[-1]) > 2 * tick:
            fps = float((n - 1) / self.times[-1])
        duration = float(self.times[-1] + 1 / fps)
        self.info = VideoInfo(width, height, fps, n, duration, rotation, self._codec)

    # -- reading -----------------------------------------------------------------------------------

    def at(self, seconds):
        """Indices of the frames on the screen at `seconds` after the first
        frame, [T] floats -> [T] ints.

        Times before the first frame and up to HOLD after the end show the first and the
        last. VideoError further out.
        """
        late = np.max(seconds, initial=0) - self.info.duration
        if late > HOLD:
            raise VideoError(
                self.path,
                f"has no frame at {late + self.info.duration:.1f} s, it ends {late:.1f} s before",
            )
        # A thousandth of a second on: a time that means a frame's own must not fall
        # before it by a rounding error.
        shown = np.searchsorted(self.times, np.add(seconds, 1e-3), "right")
        return np.maximum(shown - 1, 0).tolist()

    def clamp(self, second):
        """`second`, or the end of the video if that is earlier."""
        return min(second, self.info.duration)

    def read(self, frames, size, box=None):
        """Frames of the video, cropped and scaled, in RGB.

        Args: frames, indices in the order shown, 0 to num_frames - 1, in any order, repeats
            allowed;
            size of the output in pixels, an int for a square or (h, w);
            box, (x, y, w, h) in pixels of the upright frame; the whole frame if None. Where
            chroma is subsampled, even numbers are faster (`_convert`).
        Returns: uint8 [T, 3, h, w], in the order of `frames`.
        Raises: VideoError if an index is out of range, or a frame is missing, damaged, decoded from
            a damaged one, or of another size or rotation than `info` says;
            ValueError if the box is not inside the frame, the size not positive, or the video
            closed.
        """
        return self.read_views([(frames, size, box)])[0]

    def read_views(self, views):
        """Several clips of the video from one decode pass: a further view of a
        frame costs its conversion only.

        Args: views, a list of (frames, size, box) as `read` takes them. Returns:
        a list of uint8 [T, 3, h, w].
        """
        if self._container is None:
            raise ValueError(f"{self.path} is closed")
        wanted = defaultdict(lambda: defaultdict(list))  # {frame: {view: its places in the output}}
        jobs = []
        for n, (frames, size, box) in enumerate(views):
            h, w = size if isinstance(size, (tuple, list)) else (size, size)
            if min(h, w) < 1:
                raise ValueError(f"size {size} is not positive")
            for t, i in enumerate(frames):
                if not 0 <= i < self.info.num_frames:
                    raise VideoError(
                        self.path,
                        f"frame {i} is out of range, it has {self.info.num_frames} frames",
                    )
                wanted[int(i)][n].append(t)
            out = np.empty((len(frames), 3, h, w), np.uint8)  # [T, 3, h, w]
            jobs.append((out, *self._to_coded(out, box), VideoReformatter()))
        with _errors(self.path, "can't be decoded"):
            for i, frame in self._frames(wanted):
                self._check_frame(i, frame)
                for n, (t, *repeats) in wanted[i].items():
                    _, coded, area, scaler = jobs[n]
                    _convert(coded[t], frame, area, scaler)
                    coded[repeats] = coded[t]  # [3, h, w]
        return [torch.from_numpy(out) for out, *_ in jobs]

    def _to_coded(self, out, box):
        """Output [T, 3, h, w] and box (x, y, w, h) of upright frames, turned back to the coded
        ones: a view of the output, and a box."""
        width, height = self.info[:2]
        x, y, w, h = (0, 0, width, height) if box is None else map(int, box)
        if not (w > 0 and h > 0 and 0 <= x <= width - w and 0 <= y <= height - h):
            raise ValueError(
                f"box {(x, y, w, h)} is not inside the {width}x{height} frame of {self.path}"
            )
        transpose, flip_x, flip_y = self._turn
        if flip_x:
            x = width - x - w
            out = out[..., ::-1]  # [T, 3, h, w]
        if flip_y:
            y = height - y - h
            out = out[..., ::-1, :]  # [T, 3, h, w]
        if transpose:
            return out.swapaxes(2, 3), (y, x, h, w)  # [T, 3, w, h]
        return out, (x, y, w, h)

    def _frames(self, wanted):
        """Yields (index, frame) of each wanted frame. The fast way: plan, and decode no more than
        that."""
        if self._fast:
            try:
                for run in self._plan(wanted):
                    yield from self._run(*run)
                return
            except VideoError:
                # damaged; or the file is not what its packets said, which counting its frames tells
                other = Video(self.path, fast=False)
                if (other.info[:2], other.info.num_frames) != (self.info[:2], self.info.num_frames):
                    raise
                self.close()
                self.__dict__ = other.__dict__
        yield from self._counted(wanted)

    def _plan(self, wanted):
        """The runs that `_run` decodes for the wanted frames, [(first packet,
        last packet, {pts: index})].

        A run goes from a clean start to a wanted frame, and on to the next one unless the clean
        start before that is still to come.
        """
        wants = []
        for i in wanted:
            at = bisect_right(self._starts, self._order[i]) - 1
            # A frame behind a keyframe in the file but shown before it (open GOP) refers to frames
            # before that keyframe: start one earlier.
            while at and self._rows[self._starts[at]][0] > self._pts[i]:
                at -= 1
            wants.append((self._starts[at], self._order[i], i))
        runs = []
        for start, position, i in sorted(wants):
            if not runs or start > runs[-1][1]:
                runs.append([start, position, {}])
            run = runs[-1]
            run[1] = max(run[1], position)
            run[2][self._pts[i]] = i
        return runs

    def _run(self, start, last, want):
        """Decode packets start .. last; yields (index, frame) of the frames in want, {pts: index}.

        Every packet that goes in must come out as its frame, in the order of the times and
        undamaged: a frame that is missing or broken spoils those that refer to it.
        """
        self._decoder.flush_buffers()
        begin = self._rows[start][0] if start else float("-inf")
        expected = set(want)
        latest = float("-inf")
        for n, packet in enumerate(chain(self._read(start, last + 1), [None]), start):
            if packet is not None:
                pts, _, hidden = self._rows[n]
                if self._drop and pts not in want and _droppable(packet, self._codec, self._prefix):
                    continue
                if pts >= begin and not hidden:
                    expected.add(pts)
            for frame in self._decode(packet):
                if frame.pts in expected and frame.pts > latest and not frame.is_corrupt:
                    latest = frame.pts
                    expected.remove(latest)
                    if latest in want:
                        yield want[latest], frame
                elif frame.pts is None or frame.pts >= begin:
                    raise VideoError(
                        self.path,
                        "damaged: a frame is corrupt, or not where it should be; re-encode it",
                    )
        if expected:
            raise VideoError(
                self.path, f"damaged: {len(expected)} frames don't come out; re-encode it"
            )

    def _decode(self, packet):
        try:
            return self._decoder.decode(packet)
        except av.FFmpegError as error:
            raise VideoError(
                self.path, f"damaged: {error.strerror}; re-encode it or get it again"
            ) from error

    def _read(self, start, stop):
        """Packets start .. stop - 1 in decode order: from memory, or of a large
        video from the file again."""
        if self._packets is not None:
            yield from self._packets[start:stop]
            return
        container, stream = self._open(self._options)
        with container:
            pts, dts, _ = self._rows[start]
            if start:
                container.seek(pts if dts is None else dts, stream=stream)
            packets = (packet for packet in container.demux(stream) if packet.size)
            found = dropwhile(lambda packet: (packet.pts, packet.dts) != (pts, dts), packets)
            yield from islice(found, stop - start)

    def _check_frame(self, i, frame):
        """VideoError where frame i is of another size, or turned otherwise, than `info` says."""
        if (frame.width, frame.height) != self._size or _turn(frame) != self._turn:
            raise VideoError(
                self.path, f"frame {i} has another size or rotation than its header says"
            )

    def _counted(self, wanted):
        """The slow way: decode from the first frame and count. Yields
        (index, frame) of each wanted frame."""
        last = max(wanted, default=-1)
        frames = self._kept if last < len(self._kept) else self._decode_all()
        spoilt = False
        for i, frame in enumerate(islice(frames, last + 1)):
            spoilt = frame.is_corrupt or (spoilt and not frame.key_frame)
            if i in wanted:
                if spoilt:
                    raise VideoError(
                        self.path,
                        f"damaged: frame {i}, or a frame that it may refer to, is corrupt",
                    )
                yield i, frame

    def _decode_all(self):
        """Every frame of the video, in the order shown."""
        self._decoder.flush_buffers()
        started = False
        for packet in chain(self._read(0, len(self._rows)), [None]):
            started = started or packet is None or packet.is_keyframe
            try:
                yield from self._decode(packet)
            except VideoError:
                if started:  # from here on the count would not be certain
                    raise  # before, it is a recording that begins between two keyframes


def probe(path):
    """VideoInfo of a video file; nothing is decoded where its packets are proof
    enough. Raises VideoError."""
    with Video(path) as video:
        return video.info


def read_clip(path, frames, size, box=None):
    """Frames of a video file, cropped and scaled, in RGB: uint8 [T, 3, h, w]. Arguments
    and errors of `Video.read`."""
    with Video(path) as video:
        return video.read(frames, size, box)


def read_clip_decode_then_crop(path, frames, size, box=None):
    """The plain loader that AVION starts from (Fig. 8a): decode all up to the
    last frame, then crop and scale.

    Arguments and result as of `read_clip`, but that it scales otherwise (torch's antialiased
    bilinear) and doesn't undo mirroring. It stands here for the paper's ablation, and as the
    reference of the tests.
    """
    clip = {}
    with av.open("file:" + os.fsdecode(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.options = {"strict": "1"}
        for i, frame in enumerate(islice(container.decode(stream), max(frames) + 1)):
            if i in frames:
                turn = frame.rotation // 90
                clip[i] = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, 3]
    clip = torch.stack([clip[i] for i in frames])  # [T, H, W, 3]
    clip = clip.permute(0, 3, 1, 2).rot90(turn, (2, 3))  # [T, 3, H, W]
    x, y, w, h = box or (0, 0, clip.shape[3], clip.shape[2])
    clip = clip[:, :, y : y + h, x : x + w]
    return F.interpolate(clip, size, mode="bilinear", antialias=True)  # [T, 3, h, w]


class WholeFrames(Video):
    """A Video as the plain loader reads it: whole frames first, then crop and scale
    (AVION, Fig. 8a)."""

    def read_views(self, views):
        with _errors(self.path, "can't be decoded"):
            # uint8 [T, 3, h, w] each
            return [read_clip_decode_then_crop(self.path, *view) for view in views]


# --------------------------------------------------------------------------------------------------
# Long videos in chunks
# --------------------------------------------------------------------------------------------------
# A folder of short files, cut by `data.py chunk` or by others, is read as if it were the one long
# video (AVION, Sec. 4.3). All but the docstring of Chunks may be skipped by who has whole videos.
# To lift: Chunks with Video; open_video tells the two apart.


def _times_in_whole(chunk):
    """Seconds in the whole video that `data.py chunk` wrote into a
    chunk; None in a chunk of others.

    float64 [num_frames + 2]: of each frame; of the frame that follows the last of them,
    or else the end; of the end.
    """
    written = chunk._container.metadata.get(CHUNK_TIMES)
    if written is None:
        return None
    with _errors(chunk.path, f"its {CHUNK_TIMES} can't be read"):
        times = np.frombuffer(bytes.fromhex(written), "<f8")
    if len(times) != chunk.info.num_frames + 2:
        told = f"has {chunk.info.num_frames} frames, but the times of {len(times) - 2}"
        raise VideoError(chunk.path, f"{told}: it was changed after it was cut; cut it again")
    return times


ONLY_TIMES = "is a folder of chunks, which only lists with times can read; list its files"


class Chunks:
    """A long video in pieces, folder/<start second>.mp4 (AVION, Sec. 4.3), read as if it were one.

    `info`, `at`, `clamp`, `read_views` as of `Video`; but a frame is what `at` returns,
    (chunk, frame), and `info` is one chunk's. Only the chunks that a clip touches are opened. A
    clip across a boundary is one clip still, with one box. Raises VideoError: no such folder, no
    chunk in it; a chunk that is missing, short or damaged.

    Chunks that `data.py chunk` cut hold the times of their frames in the whole video, and `at`
    shows the frame that the whole video's does. Chunks of others don't: that the first frame of
    15.mp4 is on the screen from second 15 on is taken for granted, and that its other frames
    follow at the file's own times.
    """

    def __init__(self, path, reader=Video):
        self.path = os.fsdecode(path)
        self._reader = reader
        self._chunks = {}
        found = []
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise VideoError(self.path, f"can't be listed ({error.strerror})") from error
        for name in names:
            start = name.partition(".")[0]
            if start.isdecimal():
                found.append((int(start), name))
            elif start[:1].isdecimal():
                raise VideoError(
                    self.path, f"not a folder of chunks, <start second>.mp4: it holds {name}"
                )
        if not found:
            raise VideoError(
                self.path,
                "a folder with no chunk in it, <start second>.mp4; "
                f"of whole videos give the files, {self.path}/*.mp4",
            )
        self.starts, self.names = zip(*sorted(found), strict=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for chunk, _ in self._chunks.values():
            chunk.close()

    def _chunk(self, k):
        """Chunk k, opened once, a Video; and its times in the whole, as of `_times_in_whole`."""
        if k not in self._chunks:
            chunk = self._reader(os.path.join(self.path, self.names[k]))
            times = _times_in_whole(chunk)
            if times is None:
                end = chunk.info.duration
                times = self.starts[k] + np.append(chunk.times, [end, end])
            self._chunks[k] = chunk, times
        return self._chunks[k]

    @property
    def times(self):
        """VideoError: what samples over a whole video's frames can't read chunks."""
        raise VideoError(self.path, ONLY_TIMES)

    @property
    def info(self):
        """VideoInfo of a chunk: the frame's size is that of all; number of frames and
        duration are the chunk's."""
        chunk, _ = self._chunk(next(iter(self._chunks), 0))
        return chunk.info

    def clamp(self, second):
        """`second`, or the end of the last chunk where that is earlier."""
        last = len(self.names) - 1
        if second <= self.starts[last]:
            return second
        _, times = self._chunk(last)
        return min(second, float(times[-1]))

    def at(self, seconds):
        """(chunk, frame) of what is on the screen at `seconds`, [T] floats -> [T];
        VideoError where no chunk has it."""
        return [self._at(second) for second in map(float, seconds)]

    def _at(self, second):
        now = second + 1e-3  # as in `Video.at`
        # a start is its first frame's time, rounded
        k = max(bisect_right(self.starts, now + 1e-3) - 1, 0)
        _, times = self._chunk(k)
        while k and times[0] > now:  # its first frame comes later
            k -= 1
            _, times = self._chunk(k)
        following, end = times[-2:]
        times = times[:-2]
        # Its last frame stays until another follows in the whole video; where none does, or nothing
        # is known of it, as long as in `Video.at`.
        missing = now >= following if following < end else second - end > HOLD
        if missing or (now < times[0] and times[0] > 0):
            near = self.names[k]
            raise VideoError(
                self.path,
                f"no chunk holds second {second:.2f}: one is missing, or {near} is too short",
            )
        return k, max(int(np.searchsorted(times, now, "right")) - 1, 0)

    def read_views(self, views):
        """Views as `Video.read_views` takes them, with frames of `at` -> a list of uint8
        [T, 3, h, w]. VideoError where frames are numbers, which a folder's don't have."""
        if any(np.ndim(places) != 2 for places, _, _ in views):
            raise VideoError(self.path, ONLY_TIMES)
        parts = defaultdict(list)  # {chunk: [(view, its places in the clip, its frames)]}
        for n, (places, _, _) in enumerate(views):
            for k in sorted({k for k, _ in places}):
                here = [t for t, place in enumerate(places) if place[0] == k]
                parts[k].append((n, here, [places[t][1] for t in here]))
        clips = [None] * len(views)
        for k, part in parts.items():
            chunk, _ = self._chunk(k)
            read = chunk.read_views([(frames, *views[n][1:]) for n, _, frames in part])
            for (n, here, _), piece in zip(part, read, strict=True):
                if clips[n] is None:
                    clips[n] = piece.new_empty(len(views[n][0]), *piece.shape[1:])  # [T, 3, h, w]
                clips[n][here] = piece
        return clips


def place_of(path):
    """Where a list's video is: `path`, or the folder of its chunks, which `data.py chunk` has end
    in .mp4 whatever the video's name ends in (EK-100's in .MP4)."""
    folder = os.path.splitext(path)[0] + ".mp4"
    return folder if not os.path.exists(path) and os.path.isdir(folder) else path


def open_video(path, reader=Video):
    """A Video, or Chunks where path is their folder, or only that is there (`place_of`). reader:
    Video, or a subclass that reads otherwise."""
    path = place_of(path)
    return Chunks(path, reader) if os.path.isdir(path) else reader(path)


# --------------------------------------------------------------------------------------------------
# The loader
# --------------------------------------------------------------------------------------------------
# A dataset decodes a sample; collate and join make micro-batches of samples; make_loader has
# processes do so ahead of the steps, in an order that a step's number gives. What watches over
# these processes may be skipped, from `_start_worker` on: it turns one that hangs or dies into a
# message. To lift: ClipDataset, global_batches, make_loader and what they name, with make_key,
# uniform, permutation and UserError of common; training_batches and test_batches are for trainers
# with these flags.

# seconds that a loader process may spend on one video before the run stops and names it
LOADER_PATIENCE = 300.0
# A loader process decodes at most so many clips before it hands them over, and 4 such pieces ahead.
# What waits in memory is then bounded by the number of processes, not by the micro-batch, and the
# first one comes soon. The bytes hold 16 clips of 16 frames of 224 x 224.
PIECE_CLIPS = 16
PIECE_BYTES = 40 << 20
PIECES_AHEAD = 4
MORE_ROOM = (
    f"Clips wait in shared memory, {PIECES_AHEAD} times {PIECE_CLIPS} for each of --workers: "
    "take fewer workers, or more of it (docker run --shm-size=8g)"
)


class Batch(NamedTuple):
    """A micro-batch: what a step needs, and what could not be read on the way to it.

    With several views a sample: view by view, so that clips 2i and 2i + 1, which `mix`
    mixes, are of different videos.
    """

    clips: torch.Tensor  # uint8 [B, T, C, H, W]
    labels: torch.Tensor  # int64 [B]
    # int64 [B], of (seed, epoch, index, view): all later draws for these clips hash from them
    keys: torch.Tensor
    index: torch.Tensor  # int64 [B], place in the list; it and the keys stay on the CPU
    failures: list  # one line a video that could not be read
    waited: float = 0.0  # seconds that the trainer waited for the loader processes

    def to(self, device):
        """Copy to the device; from pinned memory the copy overlaps with what the GPU is doing."""
        move = lambda x: x.to(device, non_blocking=True)
        return self._replace(clips=move(self.clips), labels=move(self.labels))


@dataclass(eq=False)
class ClipDataset(torch.utils.data.Dataset):
    """Clips of videos (VideoList or Captions), decoded at `size`.

    replace: an unreadable video's place is taken by another, drawn from the sample's own key
    (training). Otherwise the sample is left out of its batch (evaluation). Both are reported in
    Batch.failures; nothing is repeated or black.
    """

    videos: object  # VideoList, Captions, or what has len(), video(index) and labels
    # (video, index, view, key) -> (frames, box): what to read of an open Video or Chunks;
    # ValueError if it is too short
    plan: Callable
    size: int  # or (h, w)
    seed: int
    replace: bool
    # clips of a video that one decode serves (repeated sampling; test views), each with its own key
    views: int = 1
    frames: int = 16  # of a clip, for `pieces`; what is read is the plan's business
    reader: type = Video  # of open_video
    watch = None  # what the processes of its loader are at, one loader at a time

    def __len__(self):
        return len(self.videos)

    def pieces(self, batch):
        """Cut a micro-batch's list of (epoch, index) into lists of about equal length, of
        PIECE_CLIPS clips and PIECE_BYTES at most; a sample's views stay together."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        clips = min(PIECE_CLIPS, PIECE_BYTES // (self.frames * 3 * height * width))
        count = -(-len(batch) // max(1, clips // self.views))
        cuts = [i * len(batch) // count for i in range(count + 1)]
        return [batch[start:stop] for start, stop in pairwise(cuts)]

    def __getitem__(self, item):
        """(epoch, index) -> (V clips uint8 [T, C, H, W] or None, label, keys int64 [V], index,
        failures). Label and index are of what was read; the keys stay those of the sample."""
        epoch, index = item
        keys = make_key(self.seed, epoch, index, torch.arange(self.views))  # [V]
        clips = None
        failures = []
        for attempt in range(10 if self.replace else 1):
            if attempt:
                index = int(uniform(keys[0], f"replace.{attempt}") * len(self))
            self._report(index, busy=True)
            path = self.videos.video(index)
            try:
                with open_video(path, self.reader) as video:
                    try:
                        plans = self.plans(video, index, keys)
                    except ValueError as error:  # a clip that this video is too short for
                        raise VideoError(path, str(error)) from error
                    clips = video.read_views([(frames, self.size, box) for frames, box in plans])
                break
            except VideoError as error:
                failures.append(str(error))
        self._report(index, busy=False)
        return clips, int(self.videos.labels[index]), keys, index, failures

    def _report(self, index, busy):
        """Tell the trainer which video this loader process is at, and since when; done
        with it: minus the second."""
        if self.watch is not None:
            since = time.monotonic() if busy else -time.monotonic()
            worker = torch.utils.data.get_worker_info().id
            self.watch[worker, 1:] = torch.tensor([index, since], dtype=torch.float64)

    def plans(self, video, index, keys):
        """`plan` of each view of a sample, keys int64 [V]. Views that depend on each
        other: a subclass says how."""
        return [self.plan(video, index, view, key) for view, key in enumerate(keys)]


def collate(samples):
    """Samples of ClipDataset as a Batch, view by view; the unreadable ones are left out.

    In a loader process it is put into shared memory here. The thread that sends it would do so
    too, but where there is no room it loses the batch, and the trainer waits for it; an error
    in here reaches the trainer.
    """
    failures = []
    read = []
    for *sample, reasons in samples:
        failures += reasons
        if sample[0] is not None:
            read.append(sample)
    if not read:
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(nothing, nothing, nothing, nothing, failures)
    clips, labels, keys, index = zip(*read, strict=True)
    views = len(keys[0])
    by_view = chain.from_iterable(zip(*clips, strict=True))
    tensors = [
        torch.stack(list(by_view)),  # [V S, T, C, H, W]
        torch.tensor(labels).repeat(views),  # [V S]
        torch.stack(keys, dim=1).flatten(),  # [V S]
        torch.tensor(index).repeat(views),  # [V S]
    ]
    if torch.utils.data.get_worker_info() is not None:
        for tensor in tensors:
            tensor.share_memory_()
    return Batch(*tensors, failures)


def join(pieces, views, device):
    """The micro-batch of which collate made `pieces`, on the device, view by view; put together
    there, because a GPU copies faster than the host."""
    failures = []
    for piece in pieces:
        failures += piece.failures
    read = [piece.to(device) for piece in pieces if len(piece.labels)]
    if len(read) < 2:
        only = read[0] if read else pieces[0]
        return only._replace(failures=failures)
    columns = []
    for parts in zip(*(piece[:4] for piece in read), strict=True):
        parts = [part.unflatten(0, (views, -1)) for part in parts]  # [V, S of the piece, ...] each
        columns.append(torch.cat(parts, 1).flatten(0, 1))  # [V S, ...]
    return Batch(*columns, failures)


def global_batches(n, batch_size, micro_batch, seed, start, stop, rank=0, world=1):
    """The (epoch, index) lists of one rank's micro-batches, from step `start` to step `stop`,
    through all epochs, of n entries; both sizes count entries, and batch_size is that of all ranks.

    Step s of an epoch takes entries s * batch ... of a permutation of (seed, epoch); a rank
    takes its slice of them and cuts it into micro-batches. So the same clips meet in a step
    at any number of ranks, micro-batches and workers, and there is no position to save but
    the step. What an epoch has left over at its end is left for the next shuffle.
    """
    per_rank = batch_size // world
    per_epoch = n // batch_size
    shuffled = None
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if shuffled != epoch:
            order = permutation(make_key(seed, epoch), "shuffle", n)
            shuffled = epoch
        first = i * batch_size + rank * per_rank
        for micro in order[first : first + per_rank].split(micro_batch):
            yield [(epoch, index) for index in micro.tolist()]


def every_sample(n, batch_size, rank=0, world=1):
    """The (epoch, index) lists of one rank that together, over ranks, hold
    each entry once (evaluation)."""
    mine = [(0, index) for index in range(rank, n, world)]
    return [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]


def make_loader(dataset, batches, workers, device, augment=None):
    """An iterator of the micro-batches that the lists of (epoch, index) in `batches` ask for, on
    the device, in their order. To be called in the main thread: it sets a signal's handler.

    `workers` processes, begun by this call, decode ahead, with one thread each; they live as long
    as the iterator: in training, the run. One that dies, or is at a video for more than
    LOADER_PATIENCE, ends the run with a UserError that names the video; so do, without a name, a
    full shared memory, through which clips come, and a batch that nobody is at work on.
    augment(clips on the device, keys) -> clips; on a GPU this is done for the next batch while a
    step computes.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    before = set(multiprocessing.active_children())
    try:
        dataset.watch = None
        if workers:
            # theirs too: they inherit it, and it goes with this process, however they end
            get_temp_dir()
            # Is there room for the queues' locks? They fail with more words.
            torch.empty(workers << 16, dtype=torch.uint8).share_memory_()
            # its process, index, since when
            dataset.watch = torch.zeros(workers, 3, dtype=torch.float64).share_memory_()
            dataset.watch[:, 2] = time.monotonic()
        cut = dataset.pieces if workers else lambda batch: [batch]
        batches, ahead = tee(batches)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=chain.from_iterable(map(cut, ahead)),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=partial(_start_worker, dataset.watch),
            pin_memory=device.type == "cuda",
            prefetch_factor=PIECES_AHEAD if workers else None,
        )
        host = iter(loader)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"can't start {workers} loader processes ({_last_line(error)}). {MORE_ROOM}"
        ) from None
    finally:
        _workers.update(set(multiprocessing.active_children()) - before)
    # PyTorch's handler would raise in the middle of whatever the trainer does when a
    # worker dies; `_watched` finds out.
    signal.signal(signal.SIGCHLD, handler)

    def prepare(pieces, waited):
        batch = join(pieces, dataset.views, device)._replace(waited=waited)
        if augment is None or not len(batch.labels):
            return batch
        return batch._replace(clips=augment(batch.clips, batch.keys))

    found = starmap(prepare, _watched(host, dataset, map(cut, batches)))
    return _ahead(found, device) if device.type == "cuda" else found


def _ahead(batches, device):
    """Yields batches on a CUDA device, each made, by its copies and its augmentation, on a stream
    of its own while the step before computes."""
    stream = torch.cuda.Stream(device)
    ready = None
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            following = batch, stream.record_event()
        if ready:
            batch, made = ready
            current = torch.cuda.current_stream(device)
            made.wait(current)
            for tensor in batch[:2]:  # clips, labels
                if tensor.is_cuda:
                    tensor.record_stream(current)  # its memory is in use there from now on
            yield batch
        if following[0] is None:
            return
        ready = following


def training_batches(cfg, ctx, dataset, batch_size, micro_batch, start, stop, augment=None):
    """This rank's micro-batches, on its device, of steps `start` to `stop`; sizes in clips, see
    global_batches. augment: see make_loader. UserError where `start` lies behind `stop`."""
    if start > stop:
        raise UserError(
            f"the checkpoint is of step {start}, and this run has {stop}: "
            "is its --train-list shorter now?"
        )
    views = dataset.views  # clips of a video, which stay together
    order = global_batches(
        len(dataset),
        batch_size // views,
        micro_batch // views,
        dataset.seed,
        start,
        stop,
        ctx.rank,
        ctx.world,
    )
    return make_loader(dataset, order, cfg.workers, ctx.device, augment)


def test_batches(cfg, ctx, dataset, failures, shared=True):
    """Yields batches, on the device, that hold each readable video once, view by view, at most
    --micro-batch clips at a time, or one video's. What can't be read goes to `failures`.

    shared: all ranks have the same videos, and each takes its part of
    them; else a rank has its own.
    """
    clips = cfg.micro_batch or cfg.batch_size // ctx.world
    rank = ctx.rank if shared else 0
    world = ctx.world if shared else 1
    order = every_sample(len(dataset), max(1, clips // dataset.views), rank, world)
    for batch in make_loader(dataset, order, cfg.workers, ctx.device):
        failures.new += batch.failures
        if len(batch.labels):
            yield batch


def _start_worker(watch, number):
    """Sign in; and leave a first signal, which goes to the whole process group, to the
    trainer: a loader process that died of it would end the step that the trainer means to
    finish. A second one is obeyed."""
    watch[number] = torch.tensor([os.getpid(), 0, -time.monotonic()], dtype=torch.float64)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
    # The socket through which batches go is made with the first, by the thread that sends them; so
    # that an error reaches the trainer, send it something here.
    ForkingPickler.dumps(torch.empty(1).share_memory_())


def _watched(host, dataset, batches):
    """Yields (the pieces of each of `batches`, a list of them, from a DataLoader's iterator; the
    seconds that they took) while its workers are alive and at work. (Should it end before them, its
    StopIteration is a RuntimeError in here, as in any generator, and no evaluation gets shorter
    unnoticed.)

    A thread looks after the workers, because the trainer may wait for an answer of one that hangs;
    and ends them where there is trouble, because that ends the wait.
    """
    asked = math.inf
    trouble = ""
    over = threading.Event()

    def look():
        nonlocal trouble
        while not trouble and not over.wait(min(5.0, LOADER_PATIENCE)):
            trouble = _trouble(dataset, asked)
        if trouble:
            _end_workers()

    if dataset.watch is not None:
        threading.Thread(target=look, daemon=True).start()
    try:
        for batch in batches:
            asked = time.monotonic()
            pieces = [next(host) for _ in batch]
            waited = time.monotonic() - asked
            asked = math.inf
            yield pieces, waited
    except Exception as error:
        time.sleep(0.2)  # a process may be about to end whose connection has just ended
        trouble = trouble or _trouble(dataset, asked)
        last = _last_line(error)  # of a worker's traceback
        if "shared memory" in last or "No space left" in last:
            trouble = f"shared memory or the temporary folder is full ({last}). {MORE_ROOM}"
        _end_workers()
        if not trouble:
            raise
        raise UserError(f"{trouble}; the same command goes on from the last checkpoint") from None
    finally:
        over.set()


def _trouble(dataset, asked):
    """Why a batch doesn't come that the trainer asked for at this second; "" while the
    loader processes are at work."""
    if dataset.watch is None or asked == math.inf:
        return ""
    alive = {child.pid for child in multiprocessing.active_children()}
    now = time.monotonic()
    notes = dataset.watch.tolist()
    for pid, index, since in notes:
        dead = pid and pid not in alive
        if dead or (since > 0 and now - since > LOADER_PATIENCE):
            doing = "died; it was at" if dead else f"has been busy for {LOADER_PATIENCE:g} s with"
            where = dataset.videos.video(int(index)) if pid else "its own start"
            return (
                f"a loader process {doing} {where}: take the video off the list, "
                "or look for a full memory or a disk that doesn't answer"
            )
    times = [since for _, _, since in notes]
    idle = now - max(asked, -min(times))
    if idle > LOADER_PATIENCE / 10 and max(times) <= 0:
        return (
            f"a batch was lost: the loader processes have been idle for {idle:.0f} s, "
            "and it didn't come. Look at errors above this one, for a full temporary folder, "
            "and at the number of open files (ulimit -n)"
        )
    return ""


_workers = weakref.WeakSet()  # the loader processes of all loaders


@atexit.register
def _end_workers():
    """SIGKILL, because less is not enough. At exit, multiprocessing sends its daemons a
    SIGTERM, which ours leave to the trainer, and waits for them without end; atexit calls
    its last entry first, so this comes before that. And a process that hangs inside a system
    call hears no other signal."""
    for worker in list(_workers):
        worker.kill()


def _last_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------
# What a trained model is asked beside its metric: features and predictions. `call` is what the
# model says of a Batch, a row a video.


@torch.no_grad()
def each_video(cfg, ctx, dataset, call, failures):
    """Yields (index int64 [S], call(batch) [S, ...]), S videos at a time, of this rank's part."""
    for batch in test_batches(cfg, ctx, dataset, failures):
        with ctx.autocast():
            output = call(batch)
        yield batch.index[: len(output)], output


def write_features(cfg, ctx, dataset, call, width):
    """--task features: the run folder's features.npy, float32 [videos, width], in the list's order;
    NaN for videos that could not be read. call(batch) -> [S, width]."""
    path = Path(cfg.out) / "features.npy"
    shape = len(dataset), width
    if ctx.rank == 0:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new_array(path, shape, np.float32, np.nan)
    ctx.barrier()
    rows = np.lib.format.open_memmap(path, "r+")  # [videos, width]
    failures = Failures(len(dataset), cfg.max_bad)
    for index, vectors in each_video(cfg, ctx, dataset, call, failures):
        rows[index.numpy()] = vectors.float().cpu().numpy()
    rows.flush()
    unread = failures.collect(ctx, 0)
    if ctx.rank == 0:
        missing = f"; NaN for {len(unread)}: {'; '.join(unread)}" if unread else ""
        print(f"{path}: {shape[0]} x {shape[1]}{missing}")


def print_predictions(cfg, ctx, dataset, call, classes):
    """--task predict: print the five likeliest classes of each video. call(batch) -> probabilities
    [S, classes]. UserError names what could not be read."""
    failures = Failures(len(dataset), 1.0)
    for index, shares in each_video(cfg, ctx, dataset, call, failures):
        shares, order = shares.sort(-1, descending=True)
        for i, share, best in zip(index.tolist(), shares.tolist(), order.tolist(), strict=True):
            words = (f"{classes[c]} {100 * p:.1f} %" for c, p in zip(best[:5], share, strict=False))
            print(f"{dataset.videos.video(i)}: {', '.join(words)}")
    if failures.new:
        unread = "; ".join(failures.new)
        if re.search(r"\.(csv|txt|jsonl?): ", unread):
            unread += "; --input takes videos, one or several, and no list of them"
        raise UserError(unread)


# --------------------------------------------------------------------------------------------------
# Augmentation on the device
# --------------------------------------------------------------------------------------------------
# Clips are changed in batches, the same way in all frames of a clip, by draws from the clip's key.
# The operations of RandAugment may be skipped, from `_each` to `_by_operation`. To lift: any
# function without an underscore and what it names, with uniform and make_key of common.
#
# Nothing here makes the host wait for the GPU. What decides which kernels run (the operations of
# RandAugment, the box to erase) is drawn on the host, from the keys as the loader gives them: on
# the CPU. So a clip pays only for what was drawn for it, and gets the same bits in any micro-batch.
# In VideoMAE's fine-tuning the order is rand_augment, crop, flip, erase, mix. DECISION
# (crop first): here the decoder crops, which is what makes it fast; so rand_augment counts the
# crop's pixels, and grey comes in at the crop's edges.


def to_device(values, device):
    """A small tensor or list on the device, without the host's waiting: from pinned
    memory, unless it is on the device already."""
    values = torch.as_tensor(values)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def flip(clips, keys, p=0.5):
    """Mirror a clip left-right with probability p: [B, T, C, H, W] -> the same.
    keys: int64 [B], anywhere."""
    chosen = to_device(uniform(keys, "flip") < p, clips.device)  # [B]
    return torch.where(chosen[:, None, None, None, None], clips.flip(-1), clips)


# PIL's operations, because the recipes' accuracies were reached with them: they round down after
# every one, and their frame statistics are each frame's own. x: uint8 [n, T, C, H, W] -> the same,
# equal to PIL's result in every bit (`_affine`: but for one level in a few pixels of a thousand).
# values: what a clip's magnitude says, a row a clip.


def _each(values, x):
    """One number a clip, [n, 1], in the shape and type in which it broadcasts over float pixels
    of x."""
    return values.float().view(-1, *[1] * (x.dim() - 1))  # [n, 1, 1, 1, 1]


def _blend(base, x, factor):
    """x made more (factor > 1) or less (< 1) different from base. factor: a number, or float32
    [n, 1, 1, 1, 1]."""
    # in place: one copy in float
    return x.float().sub_(base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def _grey(x):
    """Luma (ITU-R 601) in fixed point, int32 [n, T, 1, H, W]."""
    r, g, b = x.int().split(1, -3)  # [n, T, 1, H, W] each
    luma = r.mul(19595).add_(g, alpha=38470).add_(b, alpha=7471)
    return luma.add_(1 << 15).bitwise_right_shift_(16)


def _mean_grey(x):
    """The mean luma of each frame, rounded, [n, T, 1, 1, 1]."""
    n = x.shape[-2] * x.shape[-1]
    return (_grey(x).sum((-2, -1), keepdim=True) + n // 2) // n


def _smooth(x):
    """3x3 mean with a weight of 5 in the middle, of 13, in float32, which holds these sums exactly;
    the frame's border stays."""
    x = x.float()
    out = x.clone()
    inner = out[..., 1:-1, 1:-1]  # [n, T, C, H - 2, W - 2], a view
    total = F.avg_pool2d(x.flatten(0, 2), 3, stride=1, divisor_override=1).view(inner.shape)
    inner.copy_(total.add_(inner, alpha=4).add_(6).div_(13, rounding_mode="floor"))
    return out


def _colour(x, values):
    return _blend(_grey(x), x, _each(values, x))


def _contrast(x, values):
    return _blend(_mean_grey(x), x, _each(values, x))


def _sharpness(x, values):
    return _blend(_smooth(x), x, _each(values, x))


def _autocontrast(x, values):
    """Stretch each colour of each frame to 0 .. 255."""
    low, high = x.flatten(-2).aminmax(dim=-1, keepdim=True)  # [n, T, C, 1]
    low = low[..., None].double()  # [n, T, C, 1, 1]
    high = high[..., None].double()
    # 255 / tensor would multiply by the inverse
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (x * scale).sub_(low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def _equalize(x, values):
    """Spread each colour of each frame so that all levels occur about equally often."""
    level = x.flatten(-2).long()  # [n, T, C, H W]
    count = level.new_zeros(*level.shape[:-1], 256)  # [n, T, C, 256]
    count.scatter_add_(-1, level, level.new_ones(1).expand_as(level))
    brightest = count.gather(-1, level.amax(-1, keepdim=True))  # [n, T, C, 1]
    step = (count.sum(-1, keepdim=True) - brightest) // 255  # [n, T, C, 1]
    table = (step // 2 + count.cumsum(-1) - count) // step.clamp(min=1)  # [n, T, C, 256]
    levels = torch.arange(256, device=x.device)
    table = torch.where(step > 0, table.clamp(max=255), levels).to(torch.uint8)  # [n, T, C, 256]
    return table.gather(-1, level).view(x.shape)


def _look_up(x, table):
    """Each level by what the clip's table [n, 256] has for it."""
    return table.to(torch.uint8).gather(1, x.flatten(1).long()).view(x.shape)


def _bicubic(matrix, H, W):
    """For each pixel (x, y) of n frames the 16 around (a x + b y + c, d x + e y + f),
    and what each of them weighs.

    matrix: a to f, float64 [n, 6]. Returns: index, int32 [n H W, 16], into the n frames' pixels;
    weight, float32 [n H W, 16]; inside, bool [n, H, W], whether the place is in the frame. The
    weights are PIL's when it transforms, Keys' with a = -1; when it resizes, a is -0.5. grid_sample
    has -0.75, which is up to 17 levels off on the tests' pictures.
    """
    device = matrix.device
    n = len(matrix)
    arange = partial(torch.arange, device=device, dtype=torch.float64)
    # of x and y
    by_x, by_y, by_1 = matrix.view(n, 2, 3).permute(2, 1, 0)[..., None, None]  # [2, n, 1, 1] each
    at = by_x * arange(0.5, W) + by_y * arange(0.5, H)[:, None] + by_1  # [2, n, H, W]
    size = torch.stack([matrix.new_full((1, 1, 1), side) for side in (W, H)])  # [2, 1, 1, 1]
    inside = ((at >= 0) & (at < size)).all(0)  # [n, H, W]
    at -= 0.5
    first = at.floor()  # [2, n, H, W]
    tap = arange(-1, 3)  # [4]: four pixels in each direction, from the one before
    t = ((at - first)[..., None] - tap).abs_()  # [2, n, H, W, 4], their distances, in [0, 2]
    near = (t - 2).mul_(t).mul_(t).add_(1)  # t^3 - 2 t^2 + 1
    far = (5 - t).mul_(t).sub_(8).mul_(t).add_(4)  # -t^3 + 5 t^2 - 8 t + 4
    weight = torch.where(t < 1, near, far).float()  # [2, n, H, W, 4]
    place = (first[..., None] + tap).clamp_(min=0)  # [2, n, H, W, 4]
    column, row = torch.minimum(place, (size - 1)[..., None]).int()  # [n, H, W, 4] each
    # [n], where a frame's pixels begin
    clip = torch.arange(0, n * H * W, H * W, device=device, dtype=torch.int32)
    row = row * W + clip[:, None, None, None]  # [n, H, W, 4]
    index = (row[..., None] + column[..., None, :]).view(-1, 16)  # [n H W, 16]
    weight = (weight[1, ..., None] * weight[0, ..., None, :]).view(-1, 16)  # [n H W, 16]
    return index, weight, inside


def _affine(x, matrix):
    """Each pixel (x, y) from (a x + b y + c, d x + e y + f), bicubically; grey from outside the
    frame. matrix: a to f, float64 [n, 6].

    An output pixel is a weighted sum of 16 input pixels, with the same weights for all its T C
    values: embedding_bag, which takes half of grid_sample's time on a CPU.
    """
    n, T, C, H, W = x.shape
    index, weight, inside = _bicubic(matrix, H, W)
    pixels = x.permute(0, 3, 4, 1, 2)  # [n, H, W, T, C]
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    pixels = pixels.view(-1, T * C)  # [n H W, T C]
    out = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)  # [n H W, T C]
    # 1e-3 makes good for what float32 lost, where the exact sum is a whole
    # number and would be rounded down.
    out = out.add_(1e-3).clamp_(0, 255).to(torch.uint8)
    out = out.view(n, H, W, T, C).permute(0, 3, 4, 1, 2)  # [n, T, C, H, W]
    return torch.where(inside[:, None, None], out, 128)  # [n, T, C, H, W]


def _rotation(degrees, W, H):
    """The matrix that turns counter-clockwise about the frame's centre."""
    c = math.cos(math.radians(degrees))
    s = math.sin(math.radians(degrees))
    return c, -s, W / 2 - c * W / 2 + s * H / 2, s, c, H / 2 - s * W / 2 - c * H / 2


def _black_out(x, box):
    """Black from row `top` to `bottom` and column `left` to `right` of each of the frames, of
    `height` rows, of which x has one below the other; box: these five, [n, 5]."""
    top, bottom, left, right, height = box.T[..., None, None]  # [n, 1, 1] each
    row = torch.arange(x.shape[-2], device=x.device)[:, None] % height  # [n, T H, 1]
    column = torch.arange(x.shape[-1], device=x.device)  # [W]
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # [n, T H, W]
    return x.masked_fill(inside[:, None, None], 0)


def _to_device_at_once(parts, device):
    return to_device(torch.cat(parts), device).split([len(part) for part in parts])


def _by_operation(clips, plans):
    """Apply to clip i the operations of plans[i], one after the other: (function,
    its values for this clip) each, which this takes off the list.

    An operation is called once for many clips, because a GPU takes as long to begin one as to do
    it: for all that have come to it in their plans, the one first to which most have come.
    `_affine` has more kernels than others, and waits until four times as many have.
    """
    calls = []
    while any(plans):
        came = Counter(plan[0][0] for plan in plans if plan)
        if _affine in came:
            came[_affine] /= 4
        function = max(came, key=came.get)
        chosen = [i for i, plan in enumerate(plans) if plan and plan[0][0] is function]
        values = [torch.as_tensor(plans[i].pop(0)[1], dtype=torch.float64) for i in chosen]
        calls.append((function, torch.tensor(chosen), torch.stack(values)))  # [n], [n, values]
    out = clips.clone()
    if not calls:
        return out
    # What all calls need goes to the device in two copies.
    rows = _to_device_at_once([chosen for _, chosen, _ in calls], clips.device)
    numbers = _to_device_at_once([values.flatten() for *_, values in calls], clips.device)
    for (function, _, values), row, number in zip(calls, rows, numbers, strict=True):
        out.index_copy_(0, row, function(out.index_select(0, row), number.view(values.shape)))
    return out


LEVELS = torch.arange(256)


def _timm_factor(v, *_):
    return [1 + 0.9 * v]


def _scenic_factor(v, *_):
    return [0.1 + 1.8 * v]


def _inverted_from(threshold):
    return torch.where(LEVELS < threshold, LEVELS, 255 - LEVELS)


def _dark_raised_by(addition):
    return torch.where(LEVELS < 128, (LEVELS + addition).clamp(max=255), LEVELS)


# timm's operations that grow with the magnitude ("inc1"): the function, and its values for v,
# magnitude / 10, in 0 .. 1, with a random sign, and frames of w x h pixels. Many are the same for
# every pixel: a table, made of all the levels. 0 bits left of a colour, at magnitude 10, are black,
# as with the PIL of VideoMAE's time; newer ones raise an error.
ANY_MAGNITUDE = {
    "AutoContrast": (_autocontrast, lambda v, w, h: ()),
    "Equalize": (_equalize, lambda v, w, h: ()),
    "Invert": (_look_up, lambda v, w, h: 255 - LEVELS),
}
RAND_AUGMENT = {
    **ANY_MAGNITUDE,
    "Rotate": (_affine, lambda v, w, h: _rotation(30 * v, w, h)),
    "Posterize": (_look_up, lambda v, w, h: LEVELS & (256 - (16 << int(4 * abs(v))))),
    "Solarize": (_look_up, lambda v, w, h: _inverted_from(256 - int(256 * abs(v)))),
    "SolarizeAdd": (_look_up, lambda v, w, h: _dark_raised_by(int(110 * abs(v)))),
    "Color": (_colour, _timm_factor),
    "Contrast": (_contrast, _timm_factor),
    "Brightness": (_look_up, lambda v, w, h: _blend(0, LEVELS, 1 + 0.9 * v)),
    "Sharpness": (_sharpness, _timm_factor),
    "ShearX": (_affine, lambda v, w, h: (1, 0.3 * v, 0, 0, 1, 0)),
    "ShearY": (_affine, lambda v, w, h: (1, 0, 0, 0.3 * v, 1, 0)),
    "TranslateX": (_affine, lambda v, w, h: (1, 0, 0.45 * v * w, 0, 1, 0)),
    "TranslateY": (_affine, lambda v, w, h: (1, 0, 0, 0, 1, 0.45 * v * h)),
}


def rand_augment(clips, keys, magnitude=7, layers=4, deviation=0.5):
    """RandAugment (Cubuk et al. 2020) as timm's string rand-m7-n4-mstd0.5-inc1 has it, VideoMAE's
    fine-tuning.

    Args: clips, uint8 [B, T, 3, H, W]; keys, int64 [B], on the CPU (a GPU's would have to be
    waited for).
    Returns: uint8 [B, T, 3, H, W].

    `layers` times: one of RAND_AUGMENT, any as likely, is applied with probability 0.5, at a
    magnitude drawn from N(magnitude, deviation) and kept in 0 .. 10.
    DECISION (fill): grey, 128. timm fills with the mean colour where it is told it;
    VideoMAE's fine-tuning doesn't.
    DECISION (Turbo): "RandAug (9, 0.5)" in its Table 6 is read as rand-m9-mstd0.5-inc1, MAE's and
    DeiT's string of that short form, in which timm's default is 2 layers.
    """
    draws = uniform(keys, "rand_augment", 4 * layers).unflatten(-1, (layers, 4))  # [B, layers, 4]
    levels = magnitude + deviation * torch.special.ndtri(draws[..., 2])  # [B, layers]
    levels = levels.clamp(0, 10) / 10
    H, W = clips.shape[-2:]
    operations = list(RAND_AUGMENT.values())
    plans = []
    for draw, level in zip(draws.tolist(), levels.tolist(), strict=True):  # a clip's
        plan = []
        for (which, chance, _, sign), v in zip(draw, level, strict=True):
            function, values = operations[int(which * len(operations))]
            if chance < 0.5:
                plan.append((function, values(v if sign < 0.5 else -v, W, H)))
        plans.append(plan)
    return _by_operation(clips, plans)


# scenic's operations, in its order; v: magnitude / 10, here above 1 too, with no random sign. They
# are of TensorFlow's official models, slips included, which ViViT was trained with: the threshold
# of Solarize is a byte and wraps around (at magnitude 20 all is inverted); Posterize keeps int(4 v)
# bits (at 20 all 8); Contrast moves away from a grey of pixels / 256, on any real clip white. A
# clip's T frames, one below the other, are one of w x h pixels here: what they count over a frame
# they count over the clip, and Sharpness mixes the rows where two frames meet.
SCENIC_AUGMENT = {
    **ANY_MAGNITUDE,
    "Posterize": (_look_up, lambda v, w, h: LEVELS & (256 - (256 >> int(4 * v)))),
    "Solarize": (_look_up, lambda v, w, h: _inverted_from(int(256 * v) % 256)),
    "Color": (_colour, _scenic_factor),
    "Contrast": (_look_up, lambda v, w, h: _blend(min(255, w * h // 256), LEVELS, 0.1 + 1.8 * v)),
    "Brightness": (_look_up, lambda v, w, h: _blend(0, LEVELS, 0.1 + 1.8 * v)),
    "Sharpness": (_sharpness, _scenic_factor),
    "Cutout": None,  # needs a place: see below
    "SolarizeAdd": (_look_up, lambda v, w, h: _dark_raised_by(int(110 * v))),
}


def scenic_rand_augment(clips, keys, magnitude, layers=2):
    """RandAugment as scenic has it for video (github.com/google-research/scenic, video_ops.py;
    ViViT): colour and cutout only, `layers` times one of SCENIC_AUGMENT or, as likely as each of
    them, none.

    Args: clips, uint8 [B, T, 3, H, W]; keys, int64 [B], on the CPU; magnitude, 0 to 20.
    Returns: uint8 as clips.

    All frames get the same. Cutout blackens a square of 8 * magnitude pixels, whatever the clip's
    size, around a point anywhere in the frame; what falls outside is lost. Within 3 levels of
    scenic's, which counts in float32.
    """
    draws = uniform(keys, "rand_augment", 3 * layers).unflatten(-1, (layers, 3))  # [B, layers, 3]
    names = [*SCENIC_AUGMENT, "nothing"]
    T, _, H, W = clips.shape[1:]
    v = magnitude / 10
    half = int(4 * magnitude)
    plans = []
    for draw in draws.tolist():  # a clip's
        plan = []
        for which, down, right in draw:
            name = names[int(which * len(names))]
            if name == "Cutout":
                y = int(down * H)
                x = int(right * W)
                plan.append((_black_out, (y - half, y + half, x - half, x + half, H)))
            elif name != "nothing":
                function, values = SCENIC_AUGMENT[name]
                plan.append((function, values(v, W, T * H)))
        plans.append(plan)
    tall = clips.transpose(1, 2).flatten(2, 3)[:, None]  # [B, 1, 3, T H, W]
    out = _by_operation(tall, plans)[:, 0]  # [B, 3, T H, W]
    return out.unflatten(2, (T, H)).transpose(1, 2).contiguous()  # [B, T, 3, H, W]


def _turn_hue(x, turns):
    """Turn the hue of uint8 [N, 3, H, W] by `turns` of the colour circle, through HSV and back."""
    rgb = x.float()
    r, g, b = rgb.split(1, -3)  # [N, 1, H, W] each
    top = rgb.amax(-3, keepdim=True)
    chroma = top - rgb.amin(-3, keepdim=True)
    hue = torch.where(top == g, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(top == r, g - b, hue)
    hue = hue / chroma.clamp(min=1) + 6 * turns  # [N, 1, H, W], in sixths of the circle
    del rgb, r, g, b
    far = torch.cat([hue + n for n in (5, 3, 1)], -3).remainder_(6)  # [N, 3, H, W]
    share = torch.minimum(far, 4 - far, out=far).clamp_(0, 1)
    return share.mul_(chroma).neg_().add_(top).add_(0.5).to(torch.uint8)


def colour_jitter(clips, keys, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.0):
    """torchvision's ColorJitter: factors uniform in [1 - x, 1 + x] (not below 0),
    turns of the hue in [-hue, hue].

    uint8 [B, T, 3, H, W] -> the same; keys: int64 [B], anywhere. DECISION (order): always that
    of the arguments; torchvision draws it. Every clip has every operation, so that they are
    done for the whole batch at once: in quarters of its frames, because the hue of a frame
    takes 12 times the frame's bytes.
    """

    def factor(draw, most):  # [N, 1, 1, 1]
        return max(0, 1 - most) + (min(1, most) + most) * draw

    u = to_device(uniform(keys, "colour_jitter", 4), clips.device)  # [B, 4]
    u = u.repeat_interleave(clips.shape[1], 0)[..., None, None, None]  # [B T, 4, 1, 1, 1]
    frames = clips.flatten(0, 1)  # [B T, 3, H, W]
    out = []
    for x, part in zip(frames.chunk(4), u.chunk(4), strict=True):
        if brightness:
            x = _blend(0, x, factor(part[:, 0], brightness))
        if contrast:
            x = _blend(_mean_grey(x), x, factor(part[:, 1], contrast))
        if saturation:
            x = _blend(_grey(x), x, factor(part[:, 2], saturation))
        if hue:
            x = _turn_hue(x, hue * (2 * part[:, 3] - 1))
        out.append(x)
    return torch.cat(out).view(clips.shape)  # [B, T, 3, H, W]


def _erased_box(draws, H, W):
    """(y, x, h, w) by the first of some draws that fits into the frame; None where none does."""
    for size, shape, top, left in draws:
        area = H * W * (0.02 + size * (1 / 3 - 0.02))
        ratio = 0.3 ** (1 - 2 * shape)
        h = round(math.sqrt(area * ratio))
        w = round(math.sqrt(area / ratio))
        if h < H and w < W:
            return int(top * (H - h + 1)), int(left * (W - w + 1)), h, w
    return None


def erase(clips, keys, p=0.25, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Random erasing (Zhong et al. 2020), pixel mode, "cube": with probability p,
    noise in one box of all frames.

    Args: clips, uint8 [B, T, 3, H, W]; keys, int64 [B], on the CPU. Returns: uint8 [B, T, 3, H, W].

    The box has 2 to 33 % of the frame's area and a height of 0.3 to 3.3 widths, log-uniform; ten
    tries to fit it in, as in timm's RandomErasing (VideoMAE's `_erase_cube`, whose box it is, has
    100: in a square a miss is rarer than 1 in 10^20). Both fill normalised pixels with N(0, 1).
    Ours are normalised later, so the noise is mapped back to pixels, mean + std N(0, 1), and what
    falls outside 0 .. 255, 3 %, is cut off.
    """
    chosen = (uniform(keys, "erase") < p).nonzero().flatten().tolist()
    draws = uniform(keys, "erase.box", 40).unflatten(-1, (10, 4)).tolist()
    T, C, H, W = clips.shape[1:]
    out = clips.clone(memory_format=torch.contiguous_format)
    boxes = []
    for i in chosen:
        box = _erased_box(draws[i], H, W)
        if box:
            y, x, h, w = box
            boxes.append((T * C * h * w, int(keys[i]), h, w, (i * T * C * H + y) * W + x))
    if not boxes:
        return out
    # The noise of all boxes is made at once: N values, one box after the other.
    total = sum(size for size, *_ in boxes)
    boxes = to_device(boxes, clips.device)  # int64 [boxes, 5]
    sizes = boxes[:, 0]
    own = torch.repeat_interleave(sizes, output_size=total)  # [N], the box that a value is in
    before = (sizes.cumsum(0) - sizes)[own]  # [N], values of the boxes before
    place = torch.arange(total, device=clips.device) - before  # [N], in the box
    _, key, h, w, corner = boxes[own].T  # [N] each
    frame = place // (h * w)  # [N], each colour's counts as one
    row = place // w % h  # [N]
    column = place % w  # [N]
    noise = torch.special.ndtri(uniform(make_key(key, place), "erase.noise"))  # [N]
    mean = to_device(mean, clips.device)[frame % C]  # [N]
    std = to_device(std, clips.device)[frame % C]  # [N]
    pixels = (255 * (noise * std + mean) + 0.5).clamp_(0, 255).to(torch.uint8)  # [N]
    out.view(-1).scatter_(0, corner + (frame * H + row) * W + column, pixels)
    return out


def soft_labels(labels, classes, smoothing):
    """One-hot labels with `smoothing` of each spread evenly over all classes:
    int64 [B] -> float32 [B, classes]."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(clips, targets, step_key, mixup, cutmix):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), one of them and one
    lambda a step, half the time each.

    clips [B, T, C, H, W] (any dtype) and soft targets float [B, classes] -> mixed clips
    (float32 in mixup), targets. Clip 2i is mixed with 2i + 1 and the other way round, so that B
    must be even; step_key, (seed, step), is common to all micro-batches and ranks. mixup and cutmix
    are the Beta distribution's parameters; 0 turns one off.
    """
    if not (mixup or cutmix):
        return clips, targets
    key = make_key(*step_key, "mix").item() & 2**64 - 1
    # made anew from the step's key: no state is kept
    rng = np.random.Generator(np.random.Philox(key=key))
    use_cutmix = rng.random() < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = cutmix if use_cutmix else mixup
    lam = rng.beta(alpha, alpha)
    swap = lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # clip 2i <-> clip 2i + 1
    if use_cutmix:
        centre_x = rng.random()
        centre_y = rng.random()
        H, W = clips.shape[-2:]
        h = int(H * math.sqrt(1 - lam))
        w = int(W * math.sqrt(1 - lam))
        top = int(centre_y * H) - (h + 1) // 2
        left = int(centre_x * W) - (w + 1) // 2
        rows = slice(max(top, 0), min(top + h, H))
        columns = slice(max(left, 0), min(left + w, W))
        mixed = clips.clone()
        mixed[..., rows, columns] = swap(clips[..., rows, columns])
        clips = mixed
        # the area that was really replaced
        lam = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (H * W)
    else:
        mixed = clips.to(torch.float32, copy=True)  # [B, T, C, H, W]
        clips = mixed.lerp_(swap(clips).float(), 1 - lam)
    return clips, targets.lerp(swap(targets), 1 - lam)


def normalize(patches, mean, std):
    """0-255 pixels, colours last and fastest, to (x / 255 - mean) / std in
    float32: [..., P] -> [..., P]."""

    def filled(colours):  # [P]; nothing is copied from the host
        values = [torch.full((), x, device=patches.device) for x in colours]
        return torch.stack(values).repeat(patches.shape[-1] // 3)

    return (patches.float() / 255 - filled(mean)) / filled(std)


def pixel_target(patches, kind):
    """What the decoder predicts of 0-255 patches [B, R, P], in float32 [B, R, P].

    "normalized": each patch, each colour by its own mean and (unbiased) deviation over the
    patch's pixels, as VideoMAE: it rewards texture and motion edges over brightness.
    "pixels": as the encoder sees them.
    """
    if kind == "pixels":
        return normalize(patches, IMAGENET_MEAN, IMAGENET_STD)
    # On 0-255 pixels, whose sums are exact, and in place: of a whole batch's masked
    # patches each copy takes time.
    x = patches.to(torch.float32, copy=True).unflatten(-1, (-1, 3))  # [B, R, P/3, 3]
    x -= x.mean(2, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)  # [B, R, 1, 3]
    deviation = norm / math.sqrt(x.shape[2] - 1)
    return x.div_(deviation + 255e-6).flatten(2)  # [B, R, P]


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
# What a masked autoencoder was shown and what it made of it, as a strip and as an animation for
# any browser. The layout may be skipped, and the writing of files. To lift: write_panels;
# `_encoder`, which writes videos too.


def write_reconstruction(path, patches, visible, masked, prediction, target, patch, grid, fps):
    """Write a masked autoencoder's pictures (write_panels): a clip below the
    other, panels in this order:

    original; what the encoder saw (masked patches grey); the model's reconstruction. A
    normalised-target model can't know a masked patch's mean and deviation: its own panel uses
    those of the clip's visible pixels, and a fourth panel, framed red, borrows the true ones of
    each patch from the original.

    patches: 0-255 [B, N, P]; visible, masked: int64 [B, K], [B, R]; prediction
    [B, R, P] of `target` (pixel_target).
    """
    patches = patches.float()  # [B, N, P]
    prediction = prediction.float().unflatten(-1, (-1, 3))  # [B, R, P/3, 3]
    places = masked[..., None].expand(-1, -1, patches.shape[-1])  # [B, R, P]
    painted = lambda pixels: patches.scatter(1, places, pixels.flatten(2))  # [B, N, P]
    panels = [patches, painted(torch.full_like(prediction, 128))]
    if target == "normalized":
        seen = gather_tokens(patches, visible).unflatten(-1, (-1, 3))  # [B, K, P/3, 3]
        hidden = gather_tokens(patches, masked).unflatten(-1, (-1, 3))  # [B, R, P/3, 3]
        mean = seen.mean((1, 2), keepdim=True)  # [B, 1, 1, 3]
        std = seen.std(2, keepdim=True).mean((1, 2), keepdim=True)  # [B, 1, 1, 3]
        true_mean = hidden.mean(2, keepdim=True)  # [B, R, 1, 3]
        true_std = hidden.std(2, keepdim=True)  # [B, R, 1, 3]
        panels.append(painted(prediction * std + mean))
        panels.append(painted(prediction * true_std + true_mean))
    else:
        mean = 255 * torch.tensor(IMAGENET_MEAN).to(patches)  # [3]
        std = 255 * torch.tensor(IMAGENET_STD).to(patches)  # [3]
        panels.append(painted(prediction * std + mean))
    # [B, T, C, H, W] each
    panels = [unpatchify(panel.clamp(0, 255).byte(), patch, grid).cpu() for panel in panels]
    write_panels(path, panels, fps, marked=3)


def write_panels(path, panels, fps, marked=None):
    """Write a strip picture, path (.png), and beside it <name>_animated.png
    (APNG: any browser plays it).

    panels: uint8 [B, T, C, H, W] each. The strip has a row for each clip and panel, clip by clip,
    and a column for each of up to 8 frames; the animation has the panels of a clip side by
    side. Panel `marked` gets a red frame.
    """
    path = Path(path)
    T = panels[0].shape[1]
    framed = [F.pad(panel, [2] * 4, value=255) for panel in panels]  # [B, T, C, H + 4, W + 4]
    if marked is not None and marked < len(framed):
        panel = framed[marked]
        edge = torch.ones(panel.shape[-2:], dtype=torch.bool)  # [H + 4, W + 4]
        edge[2:-2, 2:-2] = False
        panel[..., edge] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None]
    video = torch.stack(framed, 1)  # [B, panels, T, C, H, W]
    strip = video[:, :, :: -(-T // 8)].permute(0, 1, 4, 2, 5, 3)  # [B, panels, H, T, W, C]
    _write_images(path, [strip.flatten(3, 4).flatten(0, 2)], fps)  # [B panels H, T W, C]
    movie = video.permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)  # [T, B H, panels W, C]
    _write_images(path.with_stem(path.stem + "_animated"), list(movie), fps)


@contextmanager
def _encoder(path, codec, rate, width, height, pixels="yuv420p", coding=None, **opening):
    """Yields (stream, write) of a new file, of videos or pictures; write(av.VideoFrame) encodes
    one. With one thread. coding: options of the codec; opening: arguments of av.open."""
    with av.open(str(path), "w", **opening) as file:
        stream = file.add_stream(codec, rate=rate, options=coding)
        stream.width = width
        stream.height = height
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1
        yield stream, lambda frame: file.mux(stream.encode(frame))
        file.mux(stream.encode())  # what waits in the encoder


def _write_images(path, images, fps):
    """Write uint8 [H, W, 3] images as one APNG, which is a plain PNG where it is one image;
    whole or not at all."""
    opening = {"format": "apng", "options": {"plays": "0"}}
    height, width = images[0].shape[:2]
    rate = Fraction(fps).limit_denominator(1000)
    with (
        replacing(path) as temporary,
        _encoder(temporary, "apng", rate, width, height, "rgb24", **opening) as (_, write),
    ):
        for image in images:
            write(av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24"))


# --------------------------------------------------------------------------------------------------
# Toy videos
# --------------------------------------------------------------------------------------------------
# Small H.264 files, the same pixels for everyone, in which appearance never tells the label, only
# motion does. The drawing may be skipped; what the four sets are stands in `make_toy` and
# `_toy_script`. To lift: make_toy.
#
# The state of an object is a point on a 4-torus, (x, y, angle, log size), each coordinate in
# loops, [0, 1): what leaves the picture on the right comes back on the left, what has grown to its
# largest starts again as its smallest. A motion is a constant velocity along one axis, and the
# start is uniform. A uniform point that moves is uniform again, so every frame, the first and the
# last included, has the same distribution whatever the motion; shape, colour and background are
# drawn without looking at it.

TOY_VERSION = 6  # a new number remakes every set
TOY_SIDE = 64  # pixels
# Speeds are loops a second. Per sampled frame an object moves 3 to 5 pixels or turns 16 to
# 24 degrees in `actions` (16 frames at 5 a second), about as much in `narrated` (8 frames a
# caption) and 1.5 times that in `long` (32 frames a video). At half of this a small model needs
# more than 1,000 steps before it sees any motion. `pairs`: as `actions`, of 16 frames over 6 s; at
# 5 frames a second, so that decoding costs less than training on them.
TOY_SETS = {
    "actions": {"fps": 10, "speed": (0.22, 0.34), "counts": {"train": 1600, "val": 320}},
    "pairs": {"fps": 5, "speed": (0.11, 0.17), "counts": {"train": 1600, "val": 320}},
    "long": {"fps": 8, "speed": (0.08, 0.12), "counts": {"train": 480, "val": 120}},
    "narrated": {"fps": 8, "speed": (0.16, 0.26), "counts": {"train": 240, "val": 48}},
}
# name: (how a caption puts it, direction along (x, y, angle, log size)); y points down
TOY_MOTIONS = {
    "left": ("moves left", (-1, 0, 0, 0)),
    "right": ("moves right", (1, 0, 0, 0)),
    "up": ("moves up", (0, -1, 0, 0)),
    "down": ("moves down", (0, 1, 0, 0)),
    "clockwise": ("turns clockwise", (0, 0, 1, 0)),
    "counter-clockwise": ("turns counter-clockwise", (0, 0, -1, 0)),
    "grow": ("grows", (0, 0, 0, 1)),
    "shrink": ("shrinks", (0, 0, 0, -1)),
}
TOY_SHAPES = {"triangle": 3, "square": 4, "pentagon": 5}  # corners
# bright, so that every one stands out from the dim sky; none near white, the marked corner's colour
TOY_COLOURS = {
    "red": (0.95, 0.2, 0.2),
    "orange": (1.0, 0.6, 0.1),
    "yellow": (0.9, 0.9, 0.2),
    "green": (0.25, 0.8, 0.25),
    "cyan": (0.2, 0.85, 0.9),
    "blue": (0.3, 0.45, 1.0),
    "purple": (0.65, 0.3, 0.9),
    "pink": (1.0, 0.5, 0.75),
}
TOY_ACTORS = list(product(TOY_COLOURS, TOY_SHAPES))
TOY_RADIUS = 13.0, 26.0  # pixels from the centre to a corner, smallest and largest
# An activity of `long` is three motions in order. Each order is there both ways, so that
# which motions a video shows tells one pair of activities from another, and only their order
# tells the two of a pair apart.
TOY_RECIPES = [
    ("left", "grow", "down"),
    ("right", "clockwise", "up"),
    ("shrink", "up", "left"),
    ("counter-clockwise", "down", "grow"),
]
TOY_RECIPES += [recipe[::-1] for recipe in TOY_RECIPES]
# A label of `pairs` is a motion and its successor in a ring. Each motion is in two labels: who sees
# one of the two only is right half of the time, however well. The change is anywhere from 1.9 s to
# 5.6 s, so that 6 s show both.
TOY_RING = ["left", "grow", "up", "clockwise", "right", "shrink", "down", "counter-clockwise"]
# what narrators say that no picture shows
TOY_CHAT = (
    "welcome back everyone",
    "thank you for watching",
    "this took me all day",
    "it is easier than it looks",
    "let me know what you think",
    "we come to that later",
)


def _toy_rng(*key):
    """A generator of its own for each key, so that no draw depends on what was drawn
    before, or by which worker."""
    return np.random.default_rng(list(repr(key).encode()))


def _toy_deal(cards, number, *key):
    """Card `number` of endless shuffled decks: each deck holds every card once, and no
    pattern shows in the number."""
    deck, place = divmod(number, len(cards))
    order = _toy_rng("deck", deck, *key).permutation(len(cards))
    return cards[order[place]]


def _toy_sky(rng):
    """A still, dim background [H, W, 3] in [0, 1]: one gradient that all videos share,
    a tint, weak coarse blobs."""
    grid = np.linspace(0, 3, TOY_SIDE)
    # [H, 4] bilinear weights of a 4 x 4 grid
    up = np.maximum(0, 1 - np.abs(grid[:, None] - np.arange(4)))
    colours = rng.uniform(0, 0.12, (4, 4, 3))
    blobs = np.einsum("ya,xb,abc->yxc", up, up, colours, optimize=True)  # [H, W, 3]
    gradient = 0.05 + 0.15 * (1 - grid / 3)[:, None, None]  # [H, 1, 1]
    return (gradient + rng.uniform(0, 0.2, 3) + blobs).astype(np.float32)


def _toy_draw(frames, state, colour, shape):
    """Paints a regular polygon with one white corner, which shows rotation, over
    frames [T, H, W, 3], in place.

    state: [T, 4], (x, y, angle, log size) in loops. Edges are smooth over one pixel.
    """
    x, y, angle, size = state.T.astype(np.float32)[:, :, None, None]  # [T, 1, 1] each
    angle = 2 * np.pi * angle
    radius = TOY_RADIUS[0] * (TOY_RADIUS[1] / TOY_RADIUS[0]) ** size
    pixel = np.arange(TOY_SIDE, dtype=np.float32)
    half = TOY_SIDE / 2
    dx = (pixel - x * TOY_SIDE + half) % TOY_SIDE - half  # [T, 1, W] the short way around the torus
    dy = ((pixel - y * TOY_SIDE + half) % TOY_SIDE - half).transpose(0, 2, 1)  # [T, H, 1]
    sides = TOY_SHAPES[shape]
    normals = [angle + (k + 0.5) * 2 * np.pi / sides for k in range(sides)]
    # [T, H, W] distance along the nearest side's normal
    outward = np.cos(normals[0]) * dx + np.sin(normals[0]) * dy
    for normal in normals[1:]:
        np.maximum(outward, np.cos(normal) * dx + np.sin(normal) * dy, out=outward)
    cover = np.clip(radius * np.float32(np.cos(np.pi / sides)) - outward + 0.5, 0, 1)[..., None]
    white = np.clip(np.cos(angle) * dx + np.sin(angle) * dy - 0.15 * radius + 0.5, 0, 1)[..., None]
    colour = np.float32(TOY_COLOURS[colour])
    frames += cover * (colour + white * (1 - colour) - frames)


def _toy_film(rng, which, scenes):
    """Renders scenes (motion or None, actor or None, number of frames) -> uint8 [T, H, W, 3].

    None as motion is rest; None as actor an empty sky, after which the next actor appears anywhere.
    """
    fps = TOY_SETS[which]["fps"]
    slowest, fastest = TOY_SETS[which]["speed"]
    sky = _toy_sky(rng)
    state = rng.random(4)
    film = []
    for motion, actor, n in scenes:
        direction = TOY_MOTIONS[motion][1] if motion else (0, 0, 0, 0)
        step = rng.uniform(slowest, fastest) / fps * np.array(direction)
        path = state + np.arange(n)[:, None] * step  # [T, 4]
        for part in np.split(path, range(16, n, 16)):
            # few enough frames to stay in the processor's cache
            frames = np.repeat(sky[None], len(part), 0)
            if actor:
                _toy_draw(frames, part % 1, *actor)
            film.append((frames * 255 + 0.5).astype(np.uint8))
        state = path[-1] + step if actor else rng.random(4)
    return np.concatenate(film)


def _toy_write(path, frames, fps):
    """Writes frames, uint8 [T, H, W, 3], as H.264 with x264's default group
    of pictures and B-frames."""
    # Without mbtree=0, x264 reads memory that it hasn't written where a frame is 4 macroblocks
    # wide, and the same frames give other bytes each time: 26 of 64 videos changed with what
    # malloc had left in memory, 0 with it. It also saves bits; crf 32 takes them back at the
    # same error.
    coding = {"preset": "faster", "mbtree": "0", "crf": "32"}
    height, width = frames.shape[1:3]
    scaler = VideoReformatter()
    with _encoder(path, "libx264", fps, width, height, coding=coding) as (_, write):
        for image in frames:
            rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
            write(scaler.reformat(rgb, format="yuv420p", threads=1))


def _toy_frames(rng, low, high, fps):
    """A random number of frames that last low to high seconds."""
    return int(rng.integers(round(low * fps), round(high * fps) + 1))


def _toy_script(which, seed, split, index):
    """(what the set's list says of a video, its scenes), of any set. Of `actions`, one motion for
    4 s, of `pairs`, two in 7.6 s, and of `long`, three with rests between them, the list has the
    motions' names; of `narrated` captions (`_toy_story`)."""
    if which == "narrated":
        return _toy_story(seed, split, index)
    rng = _toy_rng(seed, which, split, index, "script")
    fps = TOY_SETS[which]["fps"]
    actor = TOY_ACTORS[rng.integers(len(TOY_ACTORS))]
    if which == "actions":
        motion = _toy_deal(list(TOY_MOTIONS), index, seed, split)
        scenes = [(motion, actor, 4 * fps)]
    elif which == "pairs":
        first = _toy_deal(TOY_RING, index, seed, split)
        n = _toy_frames(rng, 1.9, 5.6, fps)
        following = TOY_RING[(TOY_RING.index(first) + 1) % 8]
        scenes = [(first, actor, n), (following, actor, 38 - n)]
    else:
        scenes = [(None, actor, _toy_frames(rng, 1.5, 3, fps))]
        for motion in _toy_deal(TOY_RECIPES, index, seed, split):
            scenes.append((motion, actor, _toy_frames(rng, 5, 9, fps)))
            scenes.append((None, actor, _toy_frames(rng, 1.5, 3, fps)))
    return "+".join(motion for motion, *_ in scenes if motion), scenes


def _toy_caption(motion, colour, shape):
    """What a narrator says: `a red square moves left`."""
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} {TOY_MOTIONS[motion][0]}"


def _toy_story(seed, split, index):
    """(captions, scenes) of a video of `narrated`; a caption is (start
    second, end second, text, visible).

    Two actors show four motions each, so the same thing does different things; 24 videos show
    every actor with every motion once. Two captions more show nothing: one is chat, one tells
    of an actor who isn't there.
    """
    rng = _toy_rng(seed, split, index, "story")
    fps = TOY_SETS["narrated"]["fps"]
    motions = list(TOY_MOTIONS)
    actors = [_toy_deal(TOY_ACTORS, 2 * index + k, seed, split) for k in (0, 1)]
    turn = 2 * index // len(TOY_ACTORS)  # how often the deck of actors was dealt before
    shown = []
    for actor in actors:
        for k in range(4):
            shown.append((_toy_deal(motions, 4 * turn + k, seed, split, actor), actor))
    absent = [actor for actor in TOY_ACTORS if actor not in actors]
    unseen = str(rng.choice(motions)), absent[rng.integers(len(absent))]
    chat = None, None
    lines = [*shown, unseen, chat]
    captions = []
    scenes = []
    now = 0  # in frames
    for i in rng.permutation(len(lines)):
        motion, actor = lines[i]
        visible = bool(i < len(shown))
        text = _toy_caption(motion, *actor) if actor else str(rng.choice(TOY_CHAT))
        gap = _toy_frames(rng, 0.5, 1.5, fps)
        n = _toy_frames(rng, 2.5, 4.5, fps)
        scenes.append((None, None, gap))
        scenes.append((motion, actor, n) if visible else (None, None, n))
        captions.append(((now + gap) / fps, (now + gap + n) / fps, text, visible))
        now += gap + n
    # to a whole second: no chunk of a frame or two
    scenes.append((None, None, fps - now % fps))
    return captions, scenes


def _toy_video(folder, which, seed, split, index):
    """Makes one video of a set in folder; returns its lines of the split's list."""
    name = f"{split}_{index:05d}"
    fps = TOY_SETS[which]["fps"]
    told, scenes = _toy_script(which, seed, split, index)
    frames = _toy_film(_toy_rng(seed, which, split, index), which, scenes)
    _toy_write(folder / "videos" / f"{name}.mp4", frames, fps)
    if which != "narrated":
        return f"videos/{name}.mp4,{told}\n"
    chunks = folder / "chunks" / f"{name}.mp4"
    chunks.mkdir(parents=True)
    for start in range(0, len(frames) // fps, 5):
        _toy_write(chunks / f"{start}.mp4", frames[start * fps : (start + 5) * fps], fps)
    lines = []
    for start, end, text, visible in told:
        row = {"video": name, "start": start, "end": end, "text": text, "visible": visible}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


@contextmanager
def _only_maker(path):
    """Holds a lock file: a second process waits. The kernel frees it when its
    holder ends, however it ends."""
    with open(path, "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_toy(root, which, seed=0, counts=None, workers=None):
    """Makes a set of toy videos in root/which, unless it is there as
    asked for; returns that folder.

    actions   one of 8 motions a video: `train.csv`, `val.csv` of
              `videos/<split>_<index>.mp4,<motion>`
    pairs     7.6 s, one of 8 pairs of motions, one after the other; each motion is in two pairs:
              lists of that form
    long      20 to 40 s, one of 8 ordered recipes of motions with rests: lists of that form
    narrated  captions with times: `train.jsonl`, `val.jsonl` of {video, start, end, text,
              visible}, in seconds; `videos/<video>.mp4` whole and
              `chunks/<video>.mp4/<start second>.mp4` in pieces of 5 s

    counts: videos of each split. The same seed gives the same pixels for any number of workers,
    which are threads, because the work is outside Python's lock and threads leave nothing behind
    when killed. The set is made in a temporary folder and renamed when complete, so a set that is
    there is whole. A set of another version, seed or counts is replaced; a folder that is no toy
    set raises FileExistsError. ValueError: unknown set.
    """
    if which not in TOY_SETS:
        raise ValueError(f"unknown toy set {which!r}; choose from {', '.join(TOY_SETS)}")
    root = Path(root)
    target = root / which
    counts = dict(counts or TOY_SETS[which]["counts"])
    wanted = {"version": TOY_VERSION, "set": which, "seed": seed, "counts": counts}
    if _made(target / "version.json") == wanted:
        return target  # without the lock, which a read-only disk can't hold
    root.mkdir(parents=True, exist_ok=True)
    with _only_maker(root / f".{which}.lock"):
        made = _made(target / "version.json")
        if made == wanted:  # by the process that had the lock before
            return target
        if made is None and target.exists():
            raise FileExistsError(
                f"{target} is there and is no toy set: choose another folder, or remove it"
            )
        room = root / f".{which}.tmp"
        # of a process that was killed: nobody else is at work here
        shutil.rmtree(room, ignore_errors=True)
        _toy_fill(room / "new", which, seed, counts, workers)
        (room / "new" / "version.json").write_text(json.dumps(wanted))
        if made is not None:
            target.rename(room / "old")
        (room / "new").rename(target)
        shutil.rmtree(room, ignore_errors=True)
    return target


def _made(record):
    """What a folder's record says it was made of, or None where there is none."""
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def _toy_fill(folder, which, seed, counts, workers):
    """Makes all videos of a set and its lists in an empty folder, with a
    progress bar on a terminal."""
    (folder / "videos").mkdir(parents=True)
    suffix = "jsonl" if which == "narrated" else "csv"
    doing = f"making toy videos in {folder.parents[1] / which}"
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for split, count in counts.items():
            made = pool.map(partial(_toy_video, folder, which, seed, split), range(count))
            lines = tqdm(made, f"{doing}, {split}", count, unit="video", disable=None)
            (folder / f"{split}.{suffix}").write_text("".join(lines))


# --------------------------------------------------------------------------------------------------
# Lists of published data sets
# --------------------------------------------------------------------------------------------------
# Annotations as their authors publish them become lists for VideoList; FORMATS has a line for each
# data set, a reader of its source and a converter of an entry. The data sets that you don't have
# may be skipped. To lift: list_videos.

# Readers: a source, as published, to (place, entry) pairs; the place is for messages.


def _entries(source, *_):
    entries = json.loads(Path(source).read_text("utf-8-sig"))
    if isinstance(entries, dict):  # COIN
        entries = [{"id": name, **entry} for name, entry in entries["database"].items()]
    for n, entry in enumerate(entries, 1):
        yield f"{source}, entry {n}", entry


def _videos(source, _, skipped):
    """Videos below a folder, by their suffixes. skipped gets, at the end, a note on
    each kind of what was left out.

    Links are followed after all that lies in the folder itself, and each folder is
    visited once, by whatever names."""
    source = os.fspath(source)
    waiting = [source]
    visited = set()
    videoless = set()
    left_out = defaultdict(list)

    def skip(kind, path):
        left_out[kind].append(path.replace("\n", "\\n"))

    def unreadable(error):
        if error.filename == source:
            raise error
        skip("unreadable folder", os.path.relpath(error.filename, source))

    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0), onerror=unreadable):
            real = os.path.realpath(folder)
            if real in visited:
                skip("folder visited by another name", os.path.relpath(folder, source))
                folders.clear()
                continue
            visited.add(real)
            folders.sort()
            if folder == source:
                videoless.update(folders)
            waiting += filter(os.path.islink, [os.path.join(folder, name) for name in folders])
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), source)
                if name.startswith("."):
                    skip("hidden", path)
                elif not _named_video(name):
                    skip(os.path.splitext(name)[1].lower() or "without a suffix", path)
                else:
                    videoless.discard(path.split(os.sep)[0])
                    yield source, path
    for name in sorted(videoless):
        skip("folder without a video", name)
    for kind, paths in sorted(left_out.items(), key=lambda item: -len(item[1])):
        more = " ..." if len(paths) > 3 else ""
        skipped.append(f"{len(paths)} {kind} ({', '.join(paths[:3])}{more})")


def _split_files(source, fold, _):
    end = f"_test_split{fold}.txt"
    for path in sorted(Path(source).glob(f"*{end}")):
        name = path.name.removesuffix(end)
        for place, line in full_lines(path):
            yield place, (name, line)


# Converters: an entry, and the published numbers of the classes, to (path, label), and where the
# source holds all splits, whether the video is in the training list; None: in neither. What a bad
# entry raises, `list_videos` explains.


def _ucf101(line, classes, fold):
    path, *number = line.split()  # lists of test videos give no number
    label = classes[path.split("/")[-2]]
    if number and int(number[0]) != label + 1:
        raise Unlike(f"classInd.txt gives its class number {label + 1}")
    return path, label


def _hmdb51(entry, classes, fold):
    name, line = entry
    video, use = line.split()
    return f"{name}/{video}", name, {"1": True, "2": False, "0": None}[use]


def _kinetics(line, classes, fold):
    label, video, start, end, *_ = next(csv.reader([line]))
    if (label, video) == ("label", "youtube_id"):  # the header
        return video, label, None
    folder = label.replace(" ", "_")
    return f"{folder}/{video}_{int(float(start)):06d}_{int(float(end)):06d}.mp4", label


def _ssv2(entry, classes, fold):
    label = entry["template"].replace("[", "").replace("]", "")
    return f"{entry['id']}.webm", classes[label]


def _moments(line, classes, fold):
    path, *_ = next(csv.reader([line]))
    return path, classes[path.split("/")[-2]]


def _coin(entry, classes, fold):
    training = {"training": True, "testing": False}[entry["subset"]]
    return f"{entry['id']}.mp4", int(entry["recipe_type"]), training


def _breakfast(path, classes, fold):
    name = r"P(\d\d)_([a-z]+)(_ch\d)?\.\w+"
    person, activity, camera = re.fullmatch(name, os.path.basename(path)).groups()
    if camera == "_ch1":  # of a stereo camera the first eye alone is used: 1,712 videos
        return path, activity, None
    # persons 3-15, 16-28, 29-41 and 42-54 are the four folds
    held_out = (int(person) - 3) // 13 + 1
    return path, activity, held_out != fold


def _folders(path, classes, fold):
    label, _ = path.split(os.sep, 1)
    return path, label


class Format(NamedTuple):
    """How a data set is published."""

    source: str  # what SOURCE is
    example: str  # an entry of it
    read: object  # a reader
    convert: object  # a converter
    classes: str = None  # the file of the classes' numbers, published beside SOURCE
    splits: int = 0  # how many splits SOURCE holds


SSV2 = Format(
    "something-something-v2-train.json",
    '{"id": "78687", "template": "Holding [something]", ...}',
    _entries,
    _ssv2,
    "something-something-v2-labels.json",
)
# by the names that `data.py list` takes
FORMATS = {
    "ucf101": Format(
        "trainlist01.txt", "Archery/v_Archery_g01_c01.avi 3", full_lines, _ucf101, "classInd.txt"
    ),
    "hmdb51": Format(
        "the folder of *_test_split1.txt", "name.avi 1", _split_files, _hmdb51, splits=3
    ),
    "kinetics": Format("train.csv", "testifying,---QUuC4vJs,84,94,train", full_lines, _kinetics),
    "ssv2": SSV2,
    "something-else": SSV2._replace(source="train.json"),
    "moments": Format(
        "trainingSet.csv",
        "clapping/abc.mp4,clapping,4,0",
        full_lines,
        _moments,
        "moments_categories.txt",
    ),
    "coin": Format(
        "COIN.json",
        '"xZecGPPhbHE": {"subset": "training", "recipe_type": 131}',
        _entries,
        _coin,
        splits=1,
    ),
    "breakfast": Format(
        "the folder of P03 ... P54", "P03/cam01/P03_coffee.avi", _videos, _breakfast, splits=4
    ),
    "folders": Format("the folder that holds class folders", "<class>/<video>", _videos, _folders),
}


def _class_numbers(path):
    """{name: number from 0} in classInd.txt (`1 Archery`), moments_categories.txt
    (`clapping,4`) or SSv2's labels."""
    if os.fspath(path).endswith(".json"):
        published = json.loads(Path(path).read_text("utf-8-sig"))
        return {name: int(number) for name, number in published.items()}
    numbers = {}
    for _, line in full_lines(path):
        first, name, last = re.fullmatch(r"(?:(\d+)\s+)?(.+?)(?:,\s*(\d+))?", line).groups()
        numbers[name] = int(first) - 1 if first else int(last)
    return numbers


def list_videos(form, source, split=None, fold=1, labels=None, skipped=None):
    """(path, label) of each video in a published source that FORMATS names.
    UserError: a mistake, with its place.

    Labels are the published numbers, from 0, where there are any; else names, and
    `VideoList` sorts the training list's. So every list of a data set has the same classes.
    split: train, or val or test, which mean the same. skipped, a list, gets notes on the
    files of a folder that are left out.
    """
    known = FORMATS[form]
    fits = bool(known.splits) == bool(split) and 1 <= fold <= max(known.splits, 1)
    if not fits or (labels and not known.classes):
        _refuse_flags(form)
    names = labels or (known.classes and os.path.join(os.path.dirname(source), known.classes))
    if names and not os.path.exists(names):
        why = f"No such file; --labels names the file published as {known.classes}"
        raise UserError(f"{names}: {why}")
    skipped = [] if skipped is None else skipped
    place = names
    wanted = known.classes
    entry = ""
    classes = {}
    listed = []
    try:
        if names:
            classes = _class_numbers(names)
        place = source
        wanted = f"{known.source}, with entries as `{known.example}`"
        if names:
            wanted += f", of classes in {names}"
        for place, entry in known.read(source, fold, skipped):
            path, label, *training = known.convert(entry, classes, fold)
            if label in ("", None) or path != path.strip() or len(path.splitlines()) > 1:
                raise Unlike("no label, or a name that a list can't hold")
            if not training or training[0] == (split == "train"):
                listed.append((path, label))
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    except MALFORMED as error:
        raise UserError(
            f"{place}: not as published: {entry!r:.80}{_why(error)}; for {form} give {wanted}"
        ) from None
    if not listed:
        raise UserError(f"{source}: no such video in it{_but(skipped)}; for {form} give {wanted}")
    return listed


def _refuse_flags(form):
    splits = FORMATS[form].splits
    takes = "no --split and --fold: SOURCE is one"
    if splits:
        takes = f"--split train or val, and --fold 1 to {splits}"
    without = "" if FORMATS[form].classes else ", and no --labels"
    raise UserError(f"{form} takes {takes}{without}")


def _but(skipped):
    """The notes of `_videos` for a message."""
    return f" (skipped {'; '.join(skipped)})" if skipped else ""


# --------------------------------------------------------------------------------------------------
# Checking videos, and how fast they are read
# --------------------------------------------------------------------------------------------------
# Every video of a list is opened before a run, and a core's clips a second are measured or
# estimated, for a choice of --workers. All of it may be skipped: no step calls it. To
# lift: check_list, reading_speed.


def _in_threads(work, jobs, workers, total, **bar):
    """Calls work(job, tick) for all jobs, with a bar that tick(amount) moves.
    Returns their VideoErrors, sorted.

    Threads suffice, as in `make_toy`: FFmpeg works outside Python's lock. One damaged video is one
    VideoError; any other error, and Ctrl-C, stops the other threads at their next tick.
    """
    jobs = iter(jobs)  # which the threads share
    workers = workers or os.cpu_count()
    failures = []
    stop = threading.Event()
    with tqdm(total=total, disable=None, **bar) as progress, ThreadPoolExecutor(workers) as pool:

        def tick(amount=0):
            if stop.is_set():
                raise InterruptedError
            progress.update(amount)

        def run():
            for job in jobs:
                try:
                    work(job, tick)
                except VideoError as error:
                    failures.append(error)

        try:
            for thread in as_completed([pool.submit(run) for _ in range(workers)]):
                thread.result()
        finally:
            stop.set()
    return sorted(failures, key=str)


def _try_to_write(path):
    """UserError where a file can't be written, before the work that it is for; one
    that is there stays as it is."""
    there = os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    if not there:
        os.unlink(path)


def _check(video, full=False):
    """Read a few frames of a Video, the last among them, or all. VideoError: not fit for
    training."""
    n = video.info.num_frames
    video.read(range(n) if full else sorted({0, n // 3, 2 * n // 3, n - 1}), 16)


def check_list(path, root="", full=False, workers=None, out=None, good=None):
    """Check each video of a list; write those that can't be read, `path: reason`, to out (default:
    <path>.bad), and the list without them to good. Returns (number of videos, [VideoError]).
    UserError where these can't be written, first.
    """
    videos = VideoList(path, root)
    out = out or f"{path}.bad"
    files = [str(file) for file in (path, out, good) if file]
    if len(set(map(os.path.realpath, files))) < len(files):
        raise UserError(
            f"{' and '.join(files)}: the list, --out and --good must be different files"
        )
    for file in files[1:]:
        _try_to_write(file)
    names = list(dict.fromkeys(map(videos.video, range(len(videos)))))

    def work(name, tick):
        try:
            with Video(name) as video:
                _check(video, full)
        finally:
            tick(1)

    failures = _in_threads(work, names, workers, len(names), desc="checking", unit="video")
    Path(out).write_text("".join(f"{error}\n" for error in failures), "utf-8")
    if good:
        lost = {error.path for error in failures}
        lines = full_lines(path)  # those that VideoList numbers
        kept = [line for i, (_, line) in enumerate(lines) if videos.video(i) not in lost]
        Path(good).write_text("".join(f"{line}\n" for line in kept), "utf-8", "surrogateescape")
    return len(names), failures


# CPU milliseconds of one core for a clip of 224 x 224, stride 4 (64 frames and more: 2): of the
# first clip of a decode, of each further one, and of the first from 720p. H.264 films of 10 s,
# 340 x 256 and 960 x 720, by x264's defaults, of noise that moves; each clip's best of 4 to 8, the
# mean of 8 clips; two cores of a shared Xeon, both busy. An idle core reads up to twice as many,
# and a camera's film takes up to twice as long.
# frames: first, further, first of 720p
READING_MS = {
    2: (17, 4, 90),
    4: (18, 5, 90),
    8: (22, 5, 110),
    16: (27, 9, 150),
    32: (46, 15, 190),
    64: (58, 26, 260),
    128: (97, 30, 330),
}


def core_clips(frames, decoded=1):
    """Clips a second that one core reads, of videos of a short side of 256 pixels and of
    720, estimates by READING_MS.

    decoded: clips of one decode (--repeated)."""
    lengths = list(READING_MS)
    columns = zip(*READING_MS.values(), strict=True)
    first, further, large = [float(np.interp(frames, lengths, column)) for column in columns]
    more = (decoded - 1) * further
    return 1000 * decoded / (first + more), 1000 * decoded / (large + more)


def print_cores(phases):
    """Print how many cores keep an H100 busy, for --plan. phases: (frames, GMACs of a training step
    on one clip, clips of one decode) of each phase of training."""
    cells = []
    for frames, gmacs, decoded in phases:
        rate = gpu_clips(gmacs)
        small, large = (math.ceil(rate / core) for core in core_clips(frames, decoded))
        if gmacs > 1:  # else it is a toy, on which a GPU does little but start kernels
            cells.append(f"{small} ({large}) for {rate:.0f} clips/s of {frames} frames")
    if cells:
        print(
            f"loader    cores that an H100 needs to read 256p (720p), estimates: {'; '.join(cells)}"
        )
        print(f"          with fewer: {LOADER_ADVICE}; {LIST_SPEED}")


def reading_speed(path, root="", frames=16, size=224, stride=4, count=32):
    """(clips a second of a core's time, clips a second by the clock, why videos can't
    be read) of a list's videos.

    At most `count` of them, evenly over the list, a clip each, in this process. By the clock, what
    the disk takes and what other processes take counts too.
    """
    videos = VideoList(path, root)

    def plan(video, index, view, key):
        chosen = stride_frames(video.info, frames, stride, uniform(key, "start").item())
        return chosen, random_resized_box(video.info, key)

    dataset = ClipDataset(videos, plan, size, seed=0, replace=False)
    chosen = sorted(set(np.linspace(0, len(videos) - 1, count).astype(int).tolist()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    read = 0
    busy = 0.0
    passed = 0.0
    failures = []
    for index in tqdm(chosen, desc="reading", unit="video", disable=None):
        core = time.process_time()
        clock = time.perf_counter()
        clips, *_, reasons = dataset[0, index]
        if clips is None:
            failures += reasons
            continue
        read += 1
        busy += time.process_time() - core
        passed += time.perf_counter() - clock
    torch.set_num_threads(threads)
    if not read:
        raise UserError(
            f"{path}: none of {len(chosen)} videos could be read; the first: {failures[0]}"
        )
    return read / busy, read / passed, failures


# --------------------------------------------------------------------------------------------------
# Cutting chunks
# --------------------------------------------------------------------------------------------------
# Long videos are cut into pieces that are cheap to decode anywhere (AVION, Sec. 4.3). Everything
# below the table of ENCODINGS may be skipped: it is there so that a chunk shows what the whole
# video shows, and so that a killed run goes on. To lift: ENCODINGS, for ffmpeg.
#
# What a chunk costs to read, at the luma PSNR of x264's defaults (38.5 to 43.3 dB): CPU time of one
# thread for a clip of 4 frames in a random second. `python tests/bench_chunk.py` on three videos of
# 15 s (animation, sports; short side 256 to 288), geometric means, one run on two busy
# x86-64 cores. decode: of an open video; read: with opening it, and scaling to 224. Encoding takes
# the same time in all of them.                                                    times faster
#                                                                           bytes  decode    read
#   x264     the defaults: keyint=250, 3 B-frames, some of them referred to  1.00     1.0     1.0
#            keyint=60: less to decode before a clip                         1.07     1.6     1.5
#            cabac=0: symbols that are parsed faster                         1.15     1.5     1.4
#            no-deblock                                                      1.07     1.1     1.1
#            flat: 7 B-frames that nothing refers to: `Video` omits them     1.13     1.9     1.7
#            flat, keyint=60                                                 1.22     2.8     2.3
#   fast     flat, cabac=0, keyint=120                                       1.33     4.4     3.0
#            flat, cabac=0, keyint=60                                        1.38     4.8     3.2
#   fastest  flat, cabac=0, keyint=60, no-deblock                            1.46     5.6     3.6
# name: libx264's options; crf has the quality of x264's default
ENCODINGS = {
    "fast": {"crf": "21.5", "x264-params": "bframes=7:b-pyramid=none:b-adapt=0:cabac=0:keyint=120"},
    "fastest": {
        "crf": "21.5",
        "x264-params": "bframes=7:b-pyramid=none:b-adapt=0:cabac=0:keyint=60:no-deblock=1",
    },
    "x264": {"crf": "23"},
}
TAGS = "colorspace", "color_range", "color_primaries", "color_trc"


def largest_chunk(batch_size, mbps, disk, step):
    """Seconds of the longest chunk that a disk delivers in time (AVION, Eq. 3: B rho
    T <= S_r Delta), where a step of `step` seconds reads batch_size chunks of mbps Mb/s
    from a disk of `disk` MB/s."""
    return disk * 8 * step / (batch_size * mbps)


def _in_order(video):
    """Yields (index, frame) of every frame, once each, from one pass over the video."""
    n = 0
    with _errors(video.path, "can't be decoded"):
        for i, frame in video._frames(range(video.info.num_frames)):
            if i == n:  # else it began again, because its packets were not what they said
                yield i, frame
                n += 1
    if n < video.info.num_frames:
        raise VideoError(
            video.path, f"damaged: {n} of its {video.info.num_frames} frames come out in order"
        )


def _upright(frame, w, h, turn, scaler):
    """A decoded frame turned, scaled to w x h and in yuv420p; colour matrix and range stay
    what they are, as tagged."""
    if turn[0]:
        w, h = h, w
    small = scaler.reformat(frame, w, h, "yuv420p", interpolation=Interpolation.BICUBIC, threads=1)
    if not any(turn):
        return small
    turns = compress(("transpose", "hflip", "vflip"), turn)
    return _filtered(small, [*turns, "sidedata=mode=delete"])  # its display matrix is done with


def _write_chunk(path, video, frames, pts, times, short_side, coding, tick):
    """Encode (index, frame) pairs of a video as one file.

    pts: of all its frames and of its end, in time-base units; times: what
    `_times_in_whole` shall read.
    """
    shorter = min(video.info[:2])
    short = min(short_side, shorter)
    sides = []
    for side in video.info[:2]:
        even = 2 * round(side * short / shorter / 2)
        sides.append(max(2, min(even, side // 2 * 2)))
    unit = video._stream.time_base
    rate = Fraction(video.info.fps).limit_denominator(1001)
    scaler = VideoReformatter()
    first = None
    opening = {"format": "mp4", "options": {"movflags": "use_metadata_tags"}}
    with _encoder(f"file:{path}", "libx264", rate, *sides, coding=coding, **opening) as encoder:
        stream, write = encoder
        stream.container.metadata[CHUNK_TIMES] = times.astype("<f8").tobytes().hex()
        stream.codec_context.time_base = unit
        for i, frame in frames:
            tick()
            video._check_frame(i, frame)
            picture = _upright(frame, *sides, video._turn, scaler)
            if first is None:
                first = pts[i]
                for tag in TAGS:
                    setattr(stream.codec_context, tag, getattr(picture, tag))
                # RGB, which no YUV can be; swscale takes the matrix of BT.601
                if not picture.colorspace:
                    stream.codec_context.colorspace = 6
            picture.pict_type = 0  # the encoder's choice, not the source's
            picture.pts = pts[i] - first
            picture.duration = pts[i + 1] - pts[i]
            picture.time_base = unit
            write(picture)


def _whole(path, times):
    """True if a chunk has these frames, by its packets alone, and can be decoded."""
    try:
        with Video(path) as video:
            _check(video)
            return bool(video._fast) and np.array_equal(_times_in_whole(video), times)
    except VideoError:
        return False


def _chunk_pts(times, unit):
    """Seconds as whole numbers of time-base units, a list: no two frames at the same time."""
    count = np.arange(len(times))
    pts = np.rint(times / float(unit)).astype(np.int64)
    return (np.maximum.accumulate(pts - count) + count).tolist()


def _chunk_video(job, tick, seconds, short_side, coding):
    """Cut one video, job = (path, folder of its chunks, bytes). The folder has another
    name until all are there."""
    source, folder, size = job
    if folder.exists():
        tick(size)
        return
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        with Video(source) as video:
            end = video.info.duration
            times = np.append(video.times, end)  # [n + 1]
            pts = _chunk_pts(times, video._stream.time_base)
            # 1e-6: 14.9999999 means 15
            starts = [int((t + 1e-6) // seconds) * seconds for t in video.times]
            for start, frames in groupby(_in_order(video), lambda item: starts[item[0]]):
                path = part / f"{start}.mp4"
                first = starts.index(start)
                count = starts.count(start)
                times_here = np.append(times[first : first + count + 1], end)
                if _whole(path, times_here):  # from a run that was ended
                    for _ in frames:
                        tick()
                else:
                    # a full disk is not the video's fault: a UserError, which ends the run
                    with _errors(source, "can't be encoded", ""), replacing(path) as new:
                        _write_chunk(new, video, frames, pts, times_here, short_side, coding, tick)
                        if not _whole(new, times_here):
                            why = f"its chunk at {start} s does not read back as it was written"
                            raise VideoError(source, why)
                tick(size * count // video.info.num_frames)
    except VideoError:
        shutil.rmtree(part)
        raise
    part.rename(folder)


def _chunk_jobs(source, target, skipped):
    """(path, folder of its chunks, bytes) of each video below source."""
    if os.path.commonpath(map(os.path.realpath, (source, target))) == os.path.realpath(source):
        raise UserError(
            f"{target} is in {source}: give a folder outside it, "
            "or the chunks would be cut next time"
        )
    folders = {}
    jobs = []
    for _, name in _videos(source, None, skipped):
        path = os.path.join(source, name)
        folder = (target / name).with_suffix(".mp4")
        if folder in folders:
            raise UserError(
                f"{folders[folder]} and {path} would have the same chunks, {folder}: rename one"
            )
        folders[folder] = path
        size = os.path.getsize(path) if os.path.exists(path) else 0
        jobs.append((path, folder, size))
    if not jobs:
        raise UserError(f"{source}: no video in it (.mp4, .mkv, .webm, .avi ...){_but(skipped)}")
    return jobs


def _keep_settings(target, settings):
    """Writes chunks.json; UserError where the folder has chunks of other settings, or no chunks."""
    record = target / "chunks.json"
    made = _made(record)
    if made == settings:
        return
    if made:
        flags = " ".join(f"--{flag} {value}" for flag, value in made.items())
        raise UserError(
            f"{target} holds chunks made with {flags}: use the same flags, or another folder"
        )
    if set(os.listdir(target)) - {".lock", "chunks.json.tmp"}:
        raise UserError(f"{target} holds something else: use another folder")
    with replacing(record) as temporary:
        temporary.write_text(json.dumps(settings))


def chunk_videos(
    source,
    target,
    seconds=15,
    short_side=288,
    encoding="fast",
    crf=None,
    workers=None,
    skipped=None,
):
    """Cut the videos below a folder into chunks: source/a/b.avi -> target/a/b.mp4/<start
    second>.mp4 (AVION, Sec. 4.3).

    A chunk holds the frames at start <= t < start + seconds, t from the first frame: upright,
    scaled down to short_side, without sound, at their own times. A video's folder is there when all
    of its chunks are, read back. The same call continues where a killed one was; one with other
    settings is a UserError. Returns (number of videos, [VideoError]). skipped, a list, gets notes
    on the files that are left out.
    """
    target = Path(target)
    jobs = _chunk_jobs(source, target, [] if skipped is None else skipped)
    coding = dict(ENCODINGS[encoding])
    if crf:
        coding["crf"] = f"{crf:g}"
    settings = {
        "seconds": seconds,
        "short-side": short_side,
        "encoding": encoding,
        "crf": coding["crf"],
    }
    target.mkdir(parents=True, exist_ok=True)
    with _only_maker(target / ".lock"):
        _keep_settings(target, settings)
        work = lambda job, tick: _chunk_video(job, tick, seconds, short_side, coding)
        total = sum(size for *_, size in jobs)
        bar = {"desc": "chunking", "unit": "B", "unit_scale": True}
        failures = _in_threads(work, jobs, workers, total, **bar)
    return len(jobs), failures


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
# Each tool adds its arguments to the parser, and runs with the parsed ones. It returns whether its
# exit status is 1: some videos are bad. To lift a tool, take the function that it calls: nothing
# above this line reads the command line.


def _tool(commands, name, run, what, more=""):
    """Adds a command of data.py, to be run(parsed arguments); returns what adds its arguments."""
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what}\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser.add_argument


def _add_toy(commands):
    sets = "actions/, pairs/, long/ and narrated/"
    add = _tool(commands, "toy", _run_toy, f"make the toy videos: {sets} under DIR")
    add("root", metavar="DIR")


def _run_toy(args):
    for which in TOY_SETS:
        print(make_toy(args.root, which))


def _add_list(commands):
    more = "FORMAT, SOURCE, an entry:"
    for name, form in FORMATS.items():
        more += f"\n  {name:15} {form.source:35} {form.example}"
    add = _tool(commands, "list", _run_list, "print the list of a data set as published", more)
    add("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    add("source", metavar="SOURCE")
    splits = "of hmdb51, coin and breakfast; val and test are the same"
    add("--split", choices=("train", "val", "test"), help=splits)
    folds = "which of hmdb51's 3 and breakfast's 4 splits (default: 1)"
    add("--fold", type=int, default=1, help=folds)
    labels = "index of classes, where it is not beside SOURCE under its published name"
    add("--labels", metavar="FILE", help=labels)


def _run_list(args):
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    skipped = []
    listed = list_videos(args.format, args.source, args.split, args.fold, args.labels, skipped)
    csv.writer(sys.stdout, lineterminator="\n").writerows(listed)
    _print_skipped(skipped)


def _print_skipped(skipped):
    if skipped:
        print(f"skipped {'; '.join(skipped)}", file=sys.stderr)


def _add_check(commands):
    add = _tool(
        commands,
        "check",
        _run_check,
        "open every video of LIST and decode some frames",
        "Exit status 1 when some are bad; with --good, which leaves them out, when all are.\n"
        "To go on with the others: data.py check LIST --good GOOD, train on GOOD",
    )
    add("list", metavar="LIST")
    root = "folder that the paths of LIST are relative to"
    add("--data-root", default="", metavar="DIR", help=root)
    add("--full", action="store_true", help="decode every frame")
    out = "where to write the bad ones, `path: reason` (default: LIST.bad)"
    add("--out", metavar="FILE", help=out)
    add("--good", metavar="FILE", help="where to write LIST without them")
    add("--workers", type=int, help="threads (default: as many as the machine has)")
    speed = "measure instead how many clips a second one core reads, of clips of:"
    add("--speed", action="store_true", help=speed)
    add("--frames", type=int, default=16, help="frames (default: %(default)s)")
    add("--stride", type=int, default=4, help="frames from one to the next (default: %(default)s)")
    add("--size", type=int, default=224, help="pixels, height and width (default: %(default)s)")


def _run_check(args):
    if args.speed:
        return _run_speed(args)
    out = args.out or f"{args.list}.bad"
    n, bad = check_list(args.list, args.data_root, args.full, args.workers, out, args.good)
    print(f"{n - len(bad)} of {n} videos are good; {len(bad)} are not, see {out}")
    for error in bad[:10]:
        print(error)
    if len(bad) > 10:
        print(f"and {len(bad) - 10} more")
    return bool(bad) and not (args.good and len(bad) < n)


def _run_speed(args):
    """What `check --speed` says of a list, beside what an H100 takes."""
    core, clock, failures = reading_speed(
        args.list, args.data_root, args.frames, args.size, args.stride
    )
    left_out = f", without {len(failures)} that can't be read ({failures[0]})" if failures else ""
    print(
        f"a core reads {core:.1f} clips/s of {args.frames} frames, {args.stride} apart, "
        f"{args.size} x {args.size}{left_out}"
    )
    print(f"by the clock {clock:.1f}, with what the disk takes, and other processes")
    # GMACs of a clip's forward pass: AVION's ViT-B on 4 frames, VideoMAE-B on 16 with 90 % masked.
    low = gpu_clips(3 * 78.5)
    high = gpu_clips(3 * 33.8)
    print(
        f"an H100 trains {low:.0f} (AVION's ViT-B) to {high:.0f} clips/s (VideoMAE-B), "
        f"an estimate: it needs {math.ceil(low / core)} to {math.ceil(high / core)} such cores; "
        "--plan of a script counts it for a recipe"
    )
    print(f"with fewer: {LOADER_ADVICE}")


def _add_chunk(commands):
    add = _tool(
        commands,
        "chunk",
        _run_chunk,
        "cut the videos below SRC into chunks, DST/<path>.mp4/<start second>.mp4",
        "The same command again goes on where it stopped. "
        "Exit status 1 when some could not be cut.",
    )
    add("source", metavar="SRC", nargs="?")
    add("target", metavar="DST", nargs="?")
    add("--seconds", type=int, default=15, help="length of a chunk (default: %(default)s)")
    add("--short-side", type=int, default=288, help="pixels, at most (default: %(default)s)")
    encoding = "trades bytes for decoding time (default: %(default)s)"
    add("--encoding", choices=ENCODINGS, default="fast", help=encoding)
    add("--crf", type=float, help="lower is better and larger (default: the quality of x264's 23)")
    add("--workers", type=int, help="threads, a video each (default: as many as the machine has)")
    plan = "print the longest chunk that the disk allows (AVION, Eq. 3), from:"
    add("--plan", action="store_true", help=plan)
    add("--batch-size", type=int, default=1024, help="clips a step (default: %(default)s)")
    add("--mbps", type=float, default=1, help="Mb a second of video (default: %(default)s)")
    disk = "MB a second that it reads (default: %(default)s, a SATA SSD)"
    add("--disk", type=float, default=500, help=disk)
    step = "time of a training step (default: %(default)s)"
    add("--step-seconds", type=float, default=4, help=step)


def _run_chunk(args):
    if args.plan:
        values = args.batch_size, args.mbps, args.disk, args.step_seconds
        print("AVION, Eq. 3, {} clips of {} Mb/s from {} MB/s in {} s:".format(*values), end=" ")
        print(f"chunks of up to {largest_chunk(*values):.1f} s")
        return False
    skipped = []
    n, bad = chunk_videos(
        args.source,
        args.target,
        args.seconds,
        args.short_side,
        args.encoding,
        args.crf,
        args.workers,
        skipped,
    )
    print(*bad, f"{n - len(bad)} of {n} videos are in {args.target}", sep="\n")
    _print_skipped(skipped)
    return bool(bad)


def main():
    parser = argparse.ArgumentParser(description="Tools around video data.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for add_tool in (_add_toy, _add_list, _add_check, _add_chunk):
        add_tool(commands)
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.command == "chunk" and not args.plan and not (args.source and args.target):
        parser.error("chunk needs SRC and DST, or --plan")
    try:
        some_are_bad = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        raise UserError(f"{error.filename or args.command}: {error.strerror or error}") from None
    if some_are_bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
