"""Toy videos: real H.264, the same for everyone, whole or absent, and without a label in any single frame."""

import functools
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

import data

SMALL = {"actions": {"train": 16, "val": 8}, "pairs": {"train": 2, "val": 1}, "long": {"train": 2, "val": 1},
         "narrated": {"train": 1, "val": 2}}  # fmt: skip
FORK = multiprocessing.get_context(
    "fork"
)  # starts at once, where a new interpreter would import torch


def decode(path):
    """uint8 [T, H, W, 3] and the type of each frame, by PyAV alone."""
    with av.open(str(path)) as video:
        assert video.streams.video[0].codec_context.name == "h264"
        frames = list(video.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [
        av.video.frame.PictureType(f.pict_type).name for f in frames
    ]


def files(folder):
    """{relative path: bytes} of all files of a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """{name: folder} of the sets, small, made by two workers."""
    root = tmp_path_factory.mktemp("small")
    return {which: data.make_toy(root, which, counts=SMALL[which], workers=2) for which in SMALL}


# ----------------------------------------------------------------------------------------------------------------------
# What is made
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["actions", "pairs", "long"])
def test_lists_name_every_video_and_its_label(small, which):
    recipes = (
        data.TOY_RECIPES
        if which == "long"
        else itertools.pairwise([*data.TOY_RING, data.TOY_RING[0]])
    )
    kinds = (
        list(data.TOY_MOTIONS) if which == "actions" else ["+".join(recipe) for recipe in recipes]
    )
    listed = []
    for split, count in SMALL[which].items():
        rows = [
            line.split(",") for line in (small[which] / f"{split}.csv").read_text().splitlines()
        ]
        assert [path for path, _ in rows] == [f"videos/{split}_{i:05d}.mp4" for i in range(count)]
        assert [label for _, label in rows] == [
            data._toy_script(which, 0, split, i)[0] for i in range(count)
        ]
        assert {label for _, label in rows} <= set(kinds)
        listed += [path for path, _ in rows]
    assert sorted(f"videos/{p.name}" for p in (small[which] / "videos").iterdir()) == sorted(listed)


def test_labels_are_balanced_and_file_numbers_do_not_tell_them():
    for which, kinds in (("actions", 8), ("pairs", 8), ("long", 8)):
        for split, count in data.TOY_SETS[which]["counts"].items():
            labels = [data._toy_script(which, 0, split, i)[0] for i in range(count)]
            assert set(Counter(labels).values()) == {count // kinds}
            for period in (
                2,
                4,
                8,
            ):  # the commonest label at each place of a period: 1 / 8 of the places and noise
                places = [Counter(labels[k::period]).most_common(1)[0][1] for k in range(period)]
                assert sum(places) / count < 0.3


@pytest.mark.parametrize("which", SMALL)
def test_videos_are_h264_with_b_frames_and_show_what_was_drawn(small, which):
    for path in sorted((small[which] / "videos").iterdir())[:3]:
        split, index = path.stem.split("_")[0], int(path.stem.split("_")[1])
        _, scenes = data._toy_script(which, 0, split, index)
        drawn = data._toy_film(data._toy_rng(0, which, split, index), which, scenes)
        shown, types = decode(path)
        assert shown.shape == drawn.shape == (sum(n for _, _, n in scenes), 64, 64, 3)
        assert types[0] == "I" and types.count("B") >= len(types) // 10 and "P" in types
        error = np.sqrt(
            np.mean((shown.astype(float) - drawn) ** 2, (1, 2, 3))
        )  # colours have half the resolution
        assert error.max() < 16 and error.mean() < 10
        info = data.probe(path)
        assert (info.num_frames, info.fps, info.codec) == (
            len(drawn),
            data.TOY_SETS[which]["fps"],
            "h264",
        )
    clip = data.read_clip(path, [0, len(drawn) // 2], 64)
    assert (
        np.abs(clip.permute(0, 2, 3, 1).numpy().astype(float) - drawn[[0, len(drawn) // 2]]).mean()
        < 5
    )


def test_motion_is_what_the_label_says():
    """An independent reading: where the object's pixels are, their number, and where its white corner points."""
    frames = {}
    for i in range(8):
        label, _ = data._toy_script("actions", 0, "train", i)
        start = np.array([0.5, 0.5, 0.1, 0.3])
        step = 0.01 * np.array(data.TOY_MOTIONS[label][1])
        frames[label] = np.zeros((2, 64, 64, 3), np.float32)
        data._toy_draw(frames[label], np.stack([start, start + step * 10]), "red", "pentagon")
    inside = {k: v.max(-1) > 0.5 for k, v in frames.items()}
    centre = {
        k: np.stack([np.argwhere(f).mean(0)[::-1] for f in v]) for k, v in inside.items()
    }  # (x, y)
    moved = {k: v[1] - v[0] for k, v in centre.items()}
    for label, want in {
        "left": (-6.4, 0),
        "right": (6.4, 0),
        "up": (0, -6.4),
        "down": (0, 6.4),
    }.items():
        assert moved[label] == pytest.approx(want, abs=0.3)
    for label, factor in {"grow": 2**0.1, "shrink": 0.5**0.1, "left": 1, "clockwise": 1}.items():
        assert np.sqrt(inside[label][1].sum() / inside[label][0].sum()) == pytest.approx(
            factor, abs=0.03
        )
    for label, turn in {"clockwise": 36, "counter-clockwise": -36, "up": 0, "grow": 0}.items():
        corner = [
            np.argwhere(f[..., 2] > 0.7).mean(0)[::-1] - c
            for f, c in zip(frames[label], centre[label])
        ]
        angles = [
            np.degrees(np.arctan2(y, x)) for x, y in corner
        ]  # y points down: clockwise is positive
        assert (angles[1] - angles[0] + 180) % 360 - 180 == pytest.approx(turn, abs=3)


# ----------------------------------------------------------------------------------------------------------------------
# Appearance never tells
# ----------------------------------------------------------------------------------------------------------------------


class Biased:
    """The mistake that a generator without wrap-around makes: what will move left starts on the right."""

    def __init__(self, rng, motion):
        self.rng, self.shift = rng, 0.3 * np.array(data.TOY_MOTIONS[motion][1])

    def random(self, n):
        return (0.5 - self.shift + 0.3 * (self.rng.random(n) - 0.5)) % 1

    def __getattr__(self, name):
        return getattr(self.rng, name)


def watch(monkeypatch, which, count, biased=False):
    """Of `count` videos: labels [count], states, [T, 4] each, and a function that draws the frames at given times."""
    labels, actors, states = [], [], []
    with monkeypatch.context() as patch:
        patch.setattr(data, "TOY_SIDE", 1)  # the same draws, and next to no pixels
        patch.setattr(data, "_toy_draw", lambda frames, state, *actor: states[-1].append(state))
        for i in range(count):
            label, scenes = data._toy_script(which, 0, "train", i)
            rng = data._toy_rng(0, which, "train", i)
            labels.append(label), actors.append(scenes[0][1]), states.append([])
            data._toy_film(Biased(rng, label) if biased else rng, which, scenes)
            states[-1] = np.concatenate(states[-1])

    @functools.cache
    def sky(i):
        return data._toy_sky(data._toy_rng(0, which, "train", i))

    def draw(times):
        """[count, 768]: the frame at times[i] of video i, 16 x 16 pixels of it."""
        pixels = []
        for i, t in enumerate(times):
            image = sky(i)[None].copy()
            data._toy_draw(image, states[i][t : t + 1], *actors[i])
            pixels.append(image.reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel())
        return np.array(pixels)

    names = sorted(set(labels))
    return np.array([names.index(label) for label in labels]), states, draw


def probe_accuracy(features, labels, ridge):
    """Held-out accuracy, on the last third, of ridge regression from features to one-hot labels."""
    features = np.c_[
        (features - features.mean(0)) / (features.std(0) + 1e-6), np.ones(len(features))
    ]
    n = len(labels) * 2 // 3
    a, b = features[:n], np.eye(labels.max() + 1)[labels[:n]]
    weights = np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ b)
    return np.mean(np.argmax(features[n:] @ weights, 1) == labels[n:])


def state_features(states):
    """sin and cos of every coordinate, and their products: what a position, an angle or a size could tell."""
    waves = np.concatenate([np.sin(2 * np.pi * states), np.cos(2 * np.pi * states)], 1)
    pairs = [waves[:, i] * waves[:, j] for i, j in itertools.combinations(range(8), 2)]
    return np.c_[waves, np.stack(pairs, 1)]


@pytest.mark.parametrize("which", ["actions", "pairs", "long"])
def test_no_single_frame_tells_the_label(monkeypatch, which):
    labels, states, draw = watch(monkeypatch, which, 1500)
    limit = 1 / 8 + 4 * np.sqrt(1 / 8 * 7 / 8 / 500)  # four standard errors above chance
    for times in ([0] * 1500, [len(s) // 2 for s in states], [len(s) - 1 for s in states]):
        now = np.array([s[t] for s, t in zip(states, times)])  # [1500, 4]
        assert probe_accuracy(state_features(now), labels, 1.0) < limit
        assert probe_accuracy(draw(times), labels, 300.0) < limit
        for k in range(8):  # each label sees every place, angle and size as often as any other
            assert np.abs(np.exp(2j * np.pi * now[labels == k]).mean(0)).max() < 4 / np.sqrt(
                (labels == k).sum()
            )


def test_the_probe_finds_a_label_that_leaks(monkeypatch):
    labels, states, draw = watch(monkeypatch, "actions", 1500, biased=True)
    assert probe_accuracy(state_features(np.array([s[0] for s in states])), labels, 1.0) > 0.9
    assert probe_accuracy(draw([0] * 1500), labels, 300.0) > 0.4


# ----------------------------------------------------------------------------------------------------------------------
# Long and narrated
# ----------------------------------------------------------------------------------------------------------------------


def test_activities_differ_in_order_only_in_pairs():
    assert len(data.TOY_RECIPES) == len(set(data.TOY_RECIPES)) == 8
    assert {len(set(recipe)) for recipe in data.TOY_RECIPES} == {3}
    assert set(Counter(frozenset(recipe) for recipe in data.TOY_RECIPES).values()) == {2}
    assert set(itertools.chain(*data.TOY_RECIPES)) == set(data.TOY_MOTIONS)
    fps, count = data.TOY_SETS["long"]["fps"], sum(data.TOY_SETS["long"]["counts"].values())
    for i in range(count):
        label, scenes = data._toy_script("long", 0, "train", i)
        motions = [motion for motion, _, _ in scenes]
        assert motions[::2] == [None] * 4 and "+".join(motions[1::2]) == label
        assert len({actor for _, actor, _ in scenes}) == 1
        assert 20 <= sum(n for _, _, n in scenes) / fps <= 40


def test_each_motion_is_in_two_pairs():
    """38 frames of one actor, the first motion in 10 to 28 of them; a motion opens one pair and ends another."""
    assert sorted(data.TOY_RING) == sorted(data.TOY_MOTIONS)
    seen, changes = set(), []
    for i in range(300):
        label, scenes = data._toy_script("pairs", 0, "train", i)
        (first, actor, n), (second, other, rest) = scenes
        assert label == f"{first}+{second}" and actor == other and n + rest == 38
        seen, changes = seen | {(first, second)}, [*changes, n]
    assert {min(changes), max(changes)} == {10, 28} and 18 < np.mean(changes) < 20
    for k in (0, 1):
        assert sorted(pair[k] for pair in seen) == sorted(data.TOY_MOTIONS)
    assert len(seen) == 8 and not any(first == second for first, second in seen)


def test_captions_are_true_when_visible_and_never_overlap():
    fps = data.TOY_SETS["narrated"]["fps"]
    for split, count in data.TOY_SETS["narrated"]["counts"].items():
        for i in range(count):
            captions, scenes = data._toy_story(0, split, i)
            timeline = [(motion, actor) for motion, actor, n in scenes for _ in range(n)]
            seconds = len(timeline) / fps
            assert seconds == int(seconds) and 30 <= seconds <= 70
            times = [t for start, end, _, _ in captions for t in (start, end)]
            assert times == sorted(times) and times[0] > 0 and times[-1] <= seconds
            shown = [text for _, _, text, visible in captions if visible]
            assert len(shown) == len(set(shown)) == 8
            silent = set(range(len(timeline)))
            for start, end, text, visible in captions:
                span = range(int(start * fps), int(end * fps))
                silent -= set(span)
                ((motion, actor),) = {timeline[t] for t in span}
                if visible:
                    assert (
                        text.split(" ", 1)[1]
                        == f"{actor[0]} {actor[1]} {data.TOY_MOTIONS[motion][0]}"
                    )
                    assert text.startswith("an " if actor[0] == "orange" else "a ")
                else:
                    absent = " ".join(
                        text.split(" ", 3)[1:3]
                    )  # colour and shape, or two words of chat
                    assert actor is None and absent not in " ".join(shown)
            assert {timeline[t] for t in silent} == {(None, None)}


def test_narrated_validation_has_every_caption_and_says_the_same_of_two_motions():
    texts, hard = Counter(), 0
    for i in range(data.TOY_SETS["narrated"]["counts"]["val"]):
        shown = [
            text.split(" ", 3) for _, _, text, visible in data._toy_story(0, "val", i)[0] if visible
        ]
        texts.update(" ".join(t) for t in shown)
        hard += len(shown) - len({tuple(t[1:3]) for t in shown})
    assert len(texts) == len(data.TOY_ACTORS) * len(data.TOY_MOTIONS) == 192 and set(
        texts.values()
    ) == {2}
    assert hard == 48 * 6  # of 8 captions, 2 subjects: the motion must tell them apart


def test_annotations_and_chunks_of_narrated_videos(small):
    folder, fps = small["narrated"], data.TOY_SETS["narrated"]["fps"]
    for split, count in SMALL["narrated"].items():
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        want = [
            (f"{split}_{i:05d}", *caption)
            for i in range(count)
            for caption in data._toy_story(0, split, i)[0]
        ]
        assert [
            tuple(row[k] for k in ("video", "start", "end", "text", "visible")) for row in rows
        ] == want
        for video in {row["video"] for row in rows}:
            whole, _ = decode(folder / "videos" / f"{video}.mp4")
            pieces = {
                int(p.stem): decode(p)[0] for p in (folder / "chunks" / f"{video}.mp4").iterdir()
            }
            assert sorted(pieces) == list(range(0, len(whole) // fps, 5))
            assert {len(pieces[s]) for s in sorted(pieces)[:-1]} == {5 * fps} and len(
                pieces[max(pieces)]
            ) >= fps
            joined = np.concatenate([pieces[s] for s in sorted(pieces)])
            assert joined.shape == whole.shape and np.abs(joined.astype(float) - whole).mean() < 3
            empty = whole[0].astype(float)  # the first scene is an empty sky
            for row in (row for row in rows if row["video"] == video):
                span = whole[int(row["start"] * fps) : int(row["end"] * fps)]
                change = np.abs(span - empty).max((1, 2, 3))  # [T]
                assert (change > 90).all() if row["visible"] else (change < 40).all()


# ----------------------------------------------------------------------------------------------------------------------
# The same for everyone, whole or absent
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", SMALL)
def test_the_same_files_for_any_number_of_workers_and_others_for_another_seed(
    small, tmp_path, which
):
    counts = {"train": 2, "val": 1}
    alone = files(data.make_toy(tmp_path / "alone", which, counts=counts, workers=1))
    both = files(small[which])
    assert {path for path in alone if path.endswith(".mp4")} & set(both)
    assert all(
        both[path] == alone[path] for path in alone if path.endswith(".mp4") and path in both
    )
    other = files(data.make_toy(tmp_path / "other", which, counts=counts, seed=1, workers=1))
    assert not any(
        other[path] == alone[path] for path in alone if path.startswith("videos") and path in other
    )


def test_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        data, "_toy_fill", lambda *args, fill=data._toy_fill: (made.append(args), fill(*args))
    )
    few = {"train": 2, "val": 1}
    folder = data.make_toy(tmp_path, "actions", counts=few)
    assert folder == tmp_path / "actions" and len(made) == 1
    before = files(folder)
    assert (
        data.make_toy(str(tmp_path), "actions", counts=few, workers=1) == folder and len(made) == 1
    )
    data.make_toy(tmp_path, "actions", counts=few, seed=1)
    assert len(made) == 2 and files(folder) != before
    data.make_toy(tmp_path, "actions", counts={"train": 1, "val": 1}, seed=1)
    assert len(made) == 3 and len(list((folder / "videos").iterdir())) == 2
    monkeypatch.setattr(data, "TOY_VERSION", data.TOY_VERSION + 1)
    data.make_toy(tmp_path, "actions", counts={"train": 1, "val": 1}, seed=1)
    assert len(made) == 4
    monkeypatch.undo()
    data.make_toy(tmp_path, "actions", counts=few)
    assert files(folder) == before
    assert sorted(os.listdir(tmp_path)) == [".actions.lock", "actions"]


def test_what_is_no_toy_set_is_left_alone(tmp_path):
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no toy set"):
        data.make_toy(tmp_path, "long")
    assert files(tmp_path / "long") == {"thesis.txt": b"mine"}
    with pytest.raises(ValueError, match="choose from actions, pairs, long, narrated"):
        data.make_toy(tmp_path, "short")


def test_an_error_in_a_worker_is_raised_and_leaves_no_set(tmp_path, monkeypatch):
    tried = []

    def full(path, *_):
        tried.append(path)
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(data, "_toy_write", full)
        with pytest.raises(OSError, match="No space left"):
            data.make_toy(tmp_path, "actions", workers=2)
    assert not (tmp_path / "actions").exists() and len(tried) < 200  # of 1,920
    data.make_toy(tmp_path, "actions", counts={"train": 1})
    assert sorted(os.listdir(tmp_path)) == [".actions.lock", "actions"]


def killed(target, *args):
    """Runs target(*args) in a child that kills itself, or is killed by it."""
    child = FORK.Process(target=target, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_killed_while_making(small, tmp_path, seconds):
    child = FORK.Process(
        target=data.make_toy, args=(tmp_path, "actions")
    )  # 1,920 videos: takes seconds
    child.start()
    while not (seconds == 0 or (tmp_path / ".actions.tmp" / "new" / "videos").is_dir()):
        time.sleep(0.005)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert not (tmp_path / "actions").exists()
    assert files(data.make_toy(tmp_path, "actions", counts=SMALL["actions"])) == files(
        small["actions"]
    )
    assert sorted(os.listdir(tmp_path)) == [".actions.lock", "actions"]


@pytest.mark.parametrize("rename", [1, 2])
def test_killed_between_renames(small, tmp_path, rename):
    """With an old set in place: at the first rename the old one is there still, at the second none is."""
    data.make_toy(tmp_path, "actions", counts={"train": 1, "val": 1})

    def make():
        calls, move = itertools.count(1), Path.rename
        Path.rename = lambda *args: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == rename else move(*args)
        )
        data.make_toy(tmp_path, "actions", counts=SMALL["actions"])

    killed(make)
    assert (tmp_path / "actions").exists() == (rename == 1)
    assert files(data.make_toy(tmp_path, "actions", counts=SMALL["actions"])) == files(
        small["actions"]
    )
    assert sorted(os.listdir(tmp_path)) == [".actions.lock", "actions"]


def test_several_processes_at_once_make_it_once(small, tmp_path):
    made = FORK.Value("i", 0)

    def make(fill=data._toy_fill):
        def counted(*args):
            made.value += 1
            fill(*args)

        data._toy_fill = counted
        data.make_toy(tmp_path, "actions", counts=SMALL["actions"])

    children = [FORK.Process(target=make) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4 and made.value == 1
    assert files(tmp_path / "actions") == files(small["actions"])
