"""Turbo Training with Token Dropout (Han, Xie, Zisserman, BMVC 2022), in one file.

Video is redundant, so a ViT can be trained on a random few of a clip's tokens. Each step drops the share m of the
tokens before anything is computed for them, does its task from the rest, and beside it reconstructs the share r <= m of
the tokens that were dropped: a partial masked autoencoder, whose light decoder keeps the encoder honest about what it
did not see. At m = 0.75, r = 0.25 a step costs a quarter of the usual one; at test nothing is dropped. The tasks:
action classification, video-language training, and long video, which then fits end to end.

    paper                                   here
    Sec. 3.2, operations (1), (2), (3)      token_dropout
    Sec. 3.1, z = ViT([v_CLS, v_1 ...])     Turbo.encode
    Sec. 3.2, Partial Masked Autoencoder    Turbo.decode
    the MAE target (VideoMAE's)             pixel_target
    Eq. 1                                   turbo_loss
    Eq. 2                                   nce_loss
    Sec. 3.2, language model, frozen        encode_sentences (--task encode_text)
    Sec. 4.1, 16 frames at 5 fps            sample_clip
    Sec. 4.2, clip and sentence             sample_pair, Pairs
    Sec. 4.3, first and last 20 %           sample_clip (--sampling span)
    Sec. 4.3, ten samplings at test         evaluate (--test-clips)
    Sec. 5.2, R@1 on HTM-Align              recall_at_1, evaluate_alignment
    Sec. 4.2, 5.1.1, start from VideoMAE    init_weights (--init videomae.pth)
    Tables 2, 5, start from HTM-AA          init_weights (--init runs/turbo-htm_aa/last.pt)
    Table 1 left, GFLOPs; Figure 2          TABLE_1, count_gmacs, saved_megabytes (--plan)
    Table 1 right, m at inference           evaluate (--eval-mask-ratios)
    Table 6                                 Config (defaults), RECIPES

    row of the paper                        flags
    Table 1 left, 0 (no MAE)                --recipe ucf101 --init videomae.pth --mask-ratio 0 --recon-ratio 0
    Table 1 left, 75, 25; Figure 3          --recipe ucf101 --init videomae.pth --mask-ratio 0.75 --recon-ratio 0.25
    Table 1 right, of that run              --recipe ucf101 --task eval --eval-mask-ratios 0.75,0.5,0
    Table 2, from VideoMAE, UCF101          --recipe ucf101 --init videomae.pth
    Table 2, from HTM-AA, HMDB51            --recipe hmdb51 --init vl.pt
    Table 3, 50, 50                         --recipe htm_aa --init videomae.pth --mask-ratio 0.5 --recon-ratio 0.5
    Table 4, ours                           --recipe htm_aa --init videomae.pth
    Table 5 A, Breakfast                    --recipe breakfast --init videomae.pth
    Table 5 B, Breakfast                    --recipe breakfast --init vl.pt --frames 16 --mask-ratio .5 --recon-ratio .5
    Table 5 C, COIN                         --recipe coin --init vl.pt
    Table 5 D, COIN                         --recipe coin --init vl.pt --frames 64 --mask-ratio .875 --recon-ratio .125
    Figure 2, 75, 25                        --recipe ucf101 --mask-ratio 0.75 --recon-ratio 0.25 --plan

Beside them each row has its lists and an --out of its own. videomae.pth is VideoMAE's ViT-B, pretrained on Kinetics-400;
vl.pt is last.pt of Table 4's run. Figure 3 and Table 3 draw runs' log.jsonl.
Faithful: m, r, losses and their weights, encoder, optimiser, schedule, sampling, as the paper states them.
DECISIONS where the paper is silent or contradicts itself; each line that one shapes is tagged:
    decoder     Table 6 states 8 layers x 512. Table 1's GFLOPs come out only with VideoMAE-B's own 4 x 384 (0.12 %;
                8 x 512 misses by up to 117 %, and would not save memory at m = 0.5). Default: 4 x 384; --decoder 8x512.
    mask        per-token random: with tubes Table 1's last rows miss by 1-2 %.
    CLS         VideoMAE has none. Here: learned, no position, not shown to the decoder (Sec. 3.2 counts N_i + N_r).
                All tokens attend to it; with cls_token emptied, [1, 0, D], features and loss are VideoMAE's.
    target      normalised per patch and channel, as VideoMAE; the toy recipes predict raw pixels (--target).
    embedding   dropped patches are not embedded. The paper's GFLOPs embed all of them: --plan shows both.
    lr          "base learning rate 1e-3" is read as VideoMAE's rule, lr = base * batch / 256, at the paper's batches.
    positions   32 and 64 frames continue the 1-D table of 16, which numbers the tokens: nothing is interpolated.
    short       a video shorter than 16 frames at 5 fps is spread over, not padded; one of under 16 frames is refused.
    RandAug     "(9, 0.5)" is read as timm's rand-m9-mstd0.5-inc1: two operations, each with probability 0.5. Crops and
                flips are VideoMAE's; its random erasing and layer-wise rates are not in Table 6, and not here.
    mixed       mixup and cutmix: what is reconstructed is the mixed clip, as the encoder sees no other.
    split       UCF101 and HMDB51: the first. Breakfast: three of the usual four folds of its people train.
    views       Sec. 4.1 names no test views: one clip and crop. VideoMAE's: --test-clips 5 --test-crops 3.
    repeat      repeated sampling: one decode gives 4 clips, each with its own frames, crop and, in video-language
                training, sentence: four different ones where the video has them, as in TAN. "Batch size of 16 videos"
                (Sec. 4.3) is read as 16 x 4 clips; an epoch has each video once. Batch sizes count clips.
    cosine      Eq. 2 is written with bare products. Here: unit vectors and temperature 0.07, as in the authors' TAN.
    MLP         "2-layer MLP": width -> width -> 256 with GELU, for video and for text.
    sentence    the language model's first output token, as Sec. 3.2 says; the model is microsoft/mpnet-base.
    same        pairs with the same sentence are not each other's negatives.
    when        a sentence of HTM-AA has one time: its 3.2 s clip begins in the 3.2 s before that, as in TAN.
What --init takes over: the encoder, by name; decoder and heads where they are of the same size; it says what it left.
Missing of the paper's tables: the rows of other methods (Tables 2, 4, 5). Data and weights, from their authors: UCF101
(crcv.ucf.edu/data/UCF101.php), HMDB51 and Breakfast (serre-lab.clps.brown.edu), COIN (coin-dataset.github.io), HTM-AA and
HTM-Align (robots.ox.ac.uk/~htd/tan), VideoMAE (github.com/MCG-NJU/VideoMAE). `python data.py list` makes the lists.

    python turbo.py                     # toy videos, made on first use: 2 CPU cores, some minutes
    python turbo.py --recipe toy_vl     # video-language; --recipe toy_long: 32 frames of long video
    torchrun --nproc_per_node=8 turbo.py --recipe ucf101 --init videomae.pth --train-list train.csv --val-list val.csv

Shapes: B clips, T frames, C colours, N tokens, K kept (visible) and R reconstructed ones, D width, P pixel values,
E width of the joint space of video and text, S seconds or sentences.
"""

import copy
import itertools
import json
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: on the CPU the loader needs their cores

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
import data
from common import Block, Decoder, UserError, gather_tokens, opt, parse, patchify, permutation, uniform
from data import pixel_target

# Width, depth and heads of the encoder; layers x width of its decoder, in heads of 64: VideoMAE's, but that its files of
# ViT-L have 12 layers (--decoder 12x512).
MODELS = {
    "vit_toy": {"width": 128, "depth": 4, "heads": 2, "decoder": "2x64"},
    "vit_s": {"width": 384, "depth": 12, "heads": 6, "decoder": "4x192"},
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "decoder": "4x384"},  # DECISION (decoder): not Table 6's 8x512
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "decoder": "4x512"},
}

# A recipe replaces defaults of Config, which are Table 6's column "Act. Classification" on UCF101.
PLAIN = {"drop_path": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "rand_augment": 0.0, "flip": False}
TOY = PLAIN | {  # left is not right: no flips
    "train_list": "toy/actions/train.csv", "val_list": "toy/actions/val.csv", "data_root": "toy/actions",
    "train_clips": 1600, "num_classes": 8, "model": "vit_toy", "size": 64, "recon_ratio": 0.25,
    # In minutes a small model would not learn the normalised target, and not in which order things happen.
    "target": "pixels", "position_scale": 5.0,
    "epochs": 15, "warmup_epochs": 1.0, "eval_every": 5.0, "lr": 1e-3, "clip_grad": 1.0, "crop": "centre",
    "workers": 2, "log_every": 50, "gpus": 1,
}  # fmt: skip
LONG = {"sampling": "span", "test_clips": 10, "frames": 32, "mask_ratio": 0.75, "recon_ratio": 0.25, "batch_size": 64,
        "repeated": 4, "lr": 3e-4 * 64 / 256}  # fmt: skip  # DECISION (lr), (repeat); Table 5 C
# The paper names one card, for video-language training: an A40 of 48 GB. --plan counts 8 GPUs for the other recipes.
RECIPES = {
    "toy": TOY,
    "toy_vl": TOY | {
        "train_list": "toy/narrated/train.jsonl", "val_list": "toy/narrated/val.jsonl",
        "data_root": "toy/narrated/videos", "train_clips": 240, "num_classes": 0, "objective": "align",
        "text_model": "hashing", "frames": 8, "fps": 3.0, "eval_fps": 3.0, "batch_size": 64, "repeated": 4,
        "epochs": 60, "warmup_epochs": 4.0, "eval_every": 20.0,
    },
    "toy_long": TOY | {
        "train_list": "toy/long/train.csv", "val_list": "toy/long/val.csv", "data_root": "toy/long",
        "train_clips": 480, "sampling": "span", "frames": 32, "mask_ratio": 0.75, "test_clips": 3,
        "epochs": 50, "warmup_epochs": 2.0, "eval_every": 10.0,
    },
    "ucf101": {"train_clips": 9537, "num_classes": 101, "lr": 1e-3 * 16 / 256},  # DECISION (lr)
    "hmdb51": {"train_clips": 3570, "num_classes": 51, "lr": 1e-3 * 16 / 256},  # DECISION (split)
    "htm_aa": PLAIN | {  # Table 6, "V-L Training"; Table 4
        "objective": "align", "train_clips": 250_000, "mask_ratio": 0.75, "recon_ratio": 0.25, "batch_size": 32,
        "repeated": 4, "epochs": 5, "warmup_epochs": 0.5, "lr": 1e-4 * 32 / 256, "crop": "multi-scale",
        "eval_fps": 16.0, "eval_every": 0.1, "save_minutes": 30.0,
        "gpus": 1, "gpu_gb": ("24", "48", "80"),
    },
    "breakfast": LONG | {"train_clips": 1284, "num_classes": 10},  # of 1,712
    "coin": LONG | {"train_clips": 9030, "num_classes": 180, "epochs": 50, "warmup_epochs": 5.0},
}  # fmt: skip
FROM_VIDEOMAE = ("ucf101", "hmdb51", "htm_aa", "breakfast", "coin")  # by itself, or by way of htm_aa (Tables 2 and 5)


@dataclass
class Config:
    recipe: str = opt("toy", "a column of the paper's table of hyper-parameters: see RECIPES")
    task: str = opt("train", "what to do with it", ["train", "eval", "predict", "features", "encode_text"], free=True)
    train_list: str = opt("", "training videos: `path label` or `path,label` a line; or captions (README)", free=True)
    val_list: str = opt("", "validation videos, or captions", free=True)
    data_root: str = opt("", "folder that the lists' paths are relative to", free=True)
    input: tuple = opt((), "videos for --task predict", free=True)
    out: str = opt("", "run folder; empty: runs/turbo-<recipe>", free=True)
    init: str = opt(
        "", "weights to start from: ours, VideoMAE's .pth or hub folder; random (eval ...: ours, or best.pt)"
    )
    resume: str = opt("auto", "auto: continue the run folder's last.pt if it is there; or a checkpoint", free=True)
    overwrite: bool = opt(False, "start anew in a run folder that holds another run", free=True)
    plan: bool = opt(False, "print what would run (cost, memory, steps) without data or GPU, and exit", free=True)
    gpus: int = opt(8, "GPUs that --plan counts memory for (the paper's)", free=True)
    gpu_gb: tuple = opt(("24", "80"), "GB of the cards that --plan fits micro-batches into", free=True)

    model: str = opt("vit_b", "encoder size", choices=list(MODELS))
    decoder: str = opt("", "layers x width of the decoder, such as 8x512; empty: the model's own")
    frames: int = opt(16, "frames a clip (Sec. 4.1)")
    fps: float = opt(5.0, "frames a second of a clip (Sec. 4.1)")
    size: int = opt(224, "height and width of a clip, in pixels (Sec. 4.1)")
    objective: str = opt("classify", "classify: Eq. 1; align: video and text, Eq. 2", ["classify", "align"])
    sampling: str = opt("clip", "clip: at --fps; span: --frames over the whole video (Sec. 4.3)", ["clip", "span"])
    repeated: int = opt(1, "clips of a video in a batch, from one decode (Table 6: repeated sampling)")
    test_clips: int = opt(1, "clips of a video at test, averaged as probabilities (Sec. 4.3: 10)")  # DECISION (views)
    test_crops: int = opt(1, "crops of each of them, along the long side (1 or 3)")
    num_classes: int = opt(0, "number of classes; 0: as many as the training list has")
    mask_ratio: float = opt(0.5, "m, the share of tokens dropped in training (Sec. 3.2)")
    recon_ratio: float = opt(0.5, "r <= m, the share of tokens reconstructed; 0: no decoder (Sec. 3.2)")
    eval_mask_ratios: str = opt("0", "m at test; of a classifier also several: 0,0.5,0.9 (Table 1 right)")
    target: str = opt("normalized", "what is predicted of a patch", ["normalized", "pixels"])  # DECISION (target)
    position_scale: float = opt(1.0, "factor of the encoder's sin-cos positions (1: VideoMAE's)")

    text_model: str = opt("microsoft/mpnet-base", "language model: a hub name or folder; hashing: of words (Sec. 4.2)")
    text_features: str = opt("", "folder of the sentences' features (--task encode_text); empty: run folder", free=True)
    temperature: float = opt(0.07, "divides the products of Eq. 2")  # DECISION (cosine)
    eval_fps: float = opt(0.0, "frames a second of a clip at test, if not --fps (Sec. 5.2: 16)")

    train_clips: int = opt(0, "videos in the training set, for --plan", free=True)
    epochs: int = opt(100, "passes over the training list (Table 6)")
    max_steps: int = opt(0, "number of optimizer steps instead of --epochs; 0: by epochs")
    batch_size: int = opt(16, "clips per optimizer step over all ranks (Figure 3)")
    micro_batch: int = opt(0, "clips that one process holds at once; 0: batch / ranks", free=True)
    lr: float = opt(1e-3, "peak learning rate at this batch, as used")
    min_lr: float = opt(1e-6, "learning rate at the end of the cosine (VideoMAE)")
    warmup_epochs: float = opt(10.0, "epochs of linear warm-up (Table 6)")
    weight_decay: float = opt(0.05, "AdamW's weight decay (Table 6)")
    clip_grad: float = opt(0.0, "largest gradient norm; 0: not clipped (VideoMAE)")
    drop_path: float = opt(0.1, "stochastic depth of the last block, rising linearly (Table 6)")
    label_smoothing: float = opt(0.1, "share of a label spread over all classes (Table 6)")
    mixup: float = opt(0.8, "Beta parameter of mixup; 0: off (Table 6)")
    cutmix: float = opt(1.0, "Beta parameter of cutmix; 0: off (Table 6)")
    rand_augment: float = opt(9.0, "magnitude of RandAugment; 0: off (Table 6)")  # DECISION (RandAug)
    crop: str = opt("resized", "random crop in training (VideoMAE; Table 6)", ["resized", "multi-scale", "centre"])
    flip: bool = opt(True, "random left-right flips in training (VideoMAE)")

    workers: int = opt(8, "loader processes a rank; 0: load in the training process", free=True)
    max_bad: float = opt(0.01, "share of an epoch's videos that may be unreadable (at least 1)", free=True)
    precision: str = opt("auto", "auto: the device's best of the others", ["auto", "fp32", "bf16", "fp16"], True)
    attention: str = opt("auto", "auto: flash where it can run, else sdpa", ["auto", "flash", "sdpa", "plain"], True)
    compile: bool | None = opt(None, "torch.compile the model; default: on CUDA", free=True)
    grad_checkpoint: bool = opt(False, "recompute blocks in backward: less memory, more time", free=True)
    seed: int = opt(0, "key of every random draw")
    eval_every: float = opt(1.0, "epochs between evaluations; the last step is always evaluated")
    log_every: int = opt(20, "steps between log records")
    tensorboard: bool = opt(False, "also write the log for TensorBoard, where it is installed", free=True)
    save_minutes: float = opt(10.0, "minutes between checkpoints, besides one an epoch", free=True)
    max_skipped: int = opt(20, "updates skipped for a non-finite loss or gradient before the run stops", free=True)


# ---- The paper's ideas -----------------------------------------------------------------------------------------------


def num_kept(n, m, r):
    """(N_vis, N_rec) of n tokens: n (1 - m) and n r, rounded down; r = m reconstructs all that is not visible."""
    visible = int(round(n * (1 - m), 6))  # round: 100 * (1 - 0.9) is 9.999...98 in floating point
    return visible, n - visible if r == m else int(round(n * r, 6))


def token_dropout(keys, n, m, r):
    """Which of n tokens a clip shows its encoder, and which it reconstructs (Sec. 3.2, operations 1-3).

    keys int64 [B]; m the mask ratio, r <= m the reconstruction ratio. Returns indices (visible [B, K], reconstructed
    [B, R]), int64, ascending, disjoint; the remaining n (m - r) tokens take no part in this step. Per-token random.
    """
    if not 0 <= r <= m < 1:
        raise ValueError(f"token dropout needs 0 <= r <= m < 1, not m = {m}, r = {r}")
    return common.random_split(keys, n, *num_kept(n, m, r))  # DECISION (mask): no tubes


def partial_mae(prediction, target):
    """L_PMAE of each clip: the mean squared error over its reconstructed tokens. [B, R, P] each -> [B]; 0 if R = 0."""
    return (prediction.float() - target).square().mean((1, 2)) if target.shape[1] else target.new_zeros(len(target))


def turbo_loss(logits, labels, prediction, target):
    """Eq. 1, a clip at a time: L = lambda_CE CE + PMAE with lambda_CE = 1 / ln(classes). -> L, CE, PMAE, each [B].

    1 / ln(classes) makes a uniform guess cost 1, what predicting the mean of a normalised patch costs the other loss.
    logits [B, classes]; labels soft, [B, classes]; prediction and target [B, R, P], R = 0 if nothing is reconstructed.
    """
    ce = -(labels * logits.float().log_softmax(-1)).sum(-1)  # [B]
    pmae = partial_mae(prediction, target)  # [B]
    return ce / math.log(logits.shape[1]) + pmae, ce, pmae


def nce_loss(video, text, sentence, temperature):
    """lambda_NCE L_NCE of Eq. 2, a pair at a time, [B]; lambda_NCE = 1 / ln(batch), so that a uniform guess costs 1.

    video, text: unit vectors [B, E] of the global batch; sentence: int64 [B], equal for equal sentences.
    """
    same = sentence[:, None] == sentence  # [B, B]  # DECISION (same)
    return common.contrastive_loss(video, text, 1 / temperature, same) / math.log(len(video))


def random_box(cfg, info, key):
    """The crop of a training clip."""
    if cfg.crop == "centre":
        return data.centre_box(info)
    return (data.multi_scale_box if cfg.crop == "multi-scale" else data.random_resized_box)(info, key)


def sample_clip(cfg, train, video, index, view, key):
    """(frames, box) of a clip: 16 frames at 5 fps (Sec. 4.1), or a few over the whole video (Sec. 4.3).

    In training start and crop are random. At test the clips of a video are evenly spaced, or drawn again (Sec. 4.3).
    """
    if train:
        box = random_box(cfg, video.info, key)
    else:
        view, crop = divmod(view, cfg.test_crops)
        box = data.crop_box(video.info, crop, cfg.test_crops)
    if cfg.sampling == "span":
        u = uniform(key, "span", 2).tolist() if train or cfg.test_clips > 1 else (0.5, 0.5)
        return data.span_frames(video, cfg.frames, u), box
    u = uniform(key, "start").item() if train else view / (cfg.test_clips - 1) if cfg.test_clips > 1 else 0.5
    return data.fps_frames(video, cfg.frames, cfg.fps, u), box  # DECISION (short): spread over a short video


class Pairs:
    """Captions as training takes them: an entry is a video, and each clip of it shows one of its sentences."""

    def __init__(self, captions):
        self.captions, self.path = captions, captions.path
        self._order = np.argsort(captions.video_of, kind="stable").astype(np.int32)  # [sentences], video by video
        edges = np.arange(len(captions.names) + 1)
        self._first = np.searchsorted(captions.video_of[self._order], edges)  # [videos + 1]
        self.labels = np.broadcast_to(np.int32(0), len(captions.names))  # none

    def __len__(self):
        return len(self.labels)

    def digest(self):
        return self.captions.digest()

    def video(self, index):
        return self.captions.video(self._order[self._first[index]])

    def sentences(self, index, key, views):
        """Which captions `views` clips of video `index` show, [views]: all different, where it has as many.

        key: the first clip's. The loader draws them (PairDataset), and by the same key the trainer again (sentences_of).
        """
        first, last = self._first[index : index + 2].tolist()
        order = first + permutation(key, "sentence", last - first).numpy()  # [sentences of the video]
        return self._order[np.resize(order, views)]  # from its beginning again, where they are fewer

    def sentences_of(self, batch, views):
        """Which captions the clips of a data.Batch show, view by view as they are: [B]."""
        samples = len(batch.index) // views
        pairs = zip(batch.index[:samples].tolist(), batch.keys[:samples], strict=True)
        drawn = [self.sentences(index, key, views) for index, key in pairs]
        return np.stack(drawn, axis=1).ravel()


class PairDataset(data.ClipDataset):
    """Training clips of Pairs, whose plan is sample_pair: each is told its sentence."""

    def plans(self, video, index, keys):
        sentences = self.videos.sentences(index, keys[0], len(keys))
        return [self.plan(video, sentence, key) for sentence, key in zip(sentences, keys, strict=True)]


def sample_pair(cfg, captions, video, i, key):
    """(frames, box) of a training clip around the time of sentence i (Sec. 4.2)."""
    u = uniform(key, "start").item()
    frames = data.moment_frames(video, captions.start[i], captions.end[i], cfg.frames, cfg.fps, u)
    return frames, random_box(cfg, video.info, key)


def recall_at_1(similarity, start, end):
    """Hits of the sentences of one video, bool [S]: is the second that fits best within the sentence's time?

    Arrays: similarity [S, seconds]; start, end [S] in seconds. HTM-Align's rule: floor(start) <= argmax <= ceil(end).
    """
    best = similarity.argmax(1)  # [S]
    return (np.floor(start) <= best) & (best <= np.ceil(end))


# ---- Captions and the frozen language model --------------------------------------------------------------------------


def read_captions(path, cfg):
    """Sentences that can be seen in their videos, as data.Captions; UserError names file and row of a mistake.

    Files as published: HTM-AA's csv (vid, timestamp, text), HTM-Align's json ({vid: [[alignable, start, end, text]]});
    and .jsonl of {video, start, end, text, visible}. A video is <id>.mp4 below --data-root, or its folder of chunks.
    Left out are the sentences without a word and those that end before they start (--max-bad).
    """
    reach, place, bad = cfg.frames / cfg.fps, path, []

    def rows():
        nonlocal place
        if path.endswith(".csv"):
            for place, row in data.read_table(path):
                at = float(row["timestamp"])
                yield row["vid"], max(0.0, at - reach), at + reach, row["text"], True  # DECISION (when)
        elif path.endswith(".json"):
            text = "".join(line for _, line in data.read_lines(path))
            for video, sentences in json.loads(text).items():
                for n, sentence in enumerate(sentences):
                    place = f"{path}, {video}, sentence {n}"
                    visible, start, end, text = sentence
                    yield video, start, end, text, visible
        else:
            for place, line in data.read_lines(path):
                if line.strip():
                    row = json.loads(line)
                    yield row["video"], row["start"], row["end"], row["text"], row.get("visible", True)

    def seen():
        for video, start, end, text, visible in rows():
            if visible and not 0 <= float(start) <= float(end) < math.inf:
                bad.append(f"{place}: its time is {start} to {end} s: the start must be before the end")
            elif visible and not re.search(r"\w", text):
                bad.append(f"{place}: its sentence has no word: {text!r}")
            elif visible:
                yield f"{video}.mp4", float(start), float(end), text

    try:
        captions = data.Captions(seen(), cfg.data_root)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not as HTM-AA, HTM-Align or a .jsonl of captions have it ({error})") from None
    captions.path, captions.left_out = path, bad
    captions.check_left_out(cfg.max_bad)
    if not len(captions):
        raise UserError(f"{path}: no sentence in it that can be seen in its video")
    return captions


def hash_words(text, width=256):
    """A sentence as a unit vector, float32 [width], without a model: words and pairs of neighbours, each at a place and
    with a sign that its hash gives (Weinberger et al. 2009). Enough to tell toy sentences apart."""
    words, vector = re.findall(r"\w+", text.lower()), np.zeros(width, np.float32)
    for term in [*words, *map(" ".join, itertools.pairwise(words))]:
        code = zlib.crc32(term.encode())
        vector[code % width] += 1 if code >> 31 else -1
    return vector / max(np.linalg.norm(vector), 1e-6)


def encode_sentences(texts, model, device):
    """Yields float16 [b, width] of consecutive sentences: the first token's output of a Hugging Face text model (the
    encoder of an encoder-decoder), or hash_words."""
    batches = ([texts[i] for i in range(k, min(k + 256, len(texts)))] for k in range(0, len(texts), 256))
    if model == "hashing":
        yield from (np.stack([hash_words(text) for text in batch]).astype(np.float16) for batch in batches)
        return
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError(f"--text-model {model} needs `pip install transformers`; hashing doesn't") from None
    try:
        tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    except Exception as error:  # no such folder or name, no network, a package that is missing: anything is raised
        raise UserError(f"--text-model {model}: {(str(error) or repr(error)).splitlines()[0]}") from error
    net = net.get_encoder() if net.config.is_encoder_decoder else getattr(net, "text_model", net)
    net = net.to(device).eval()
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    places = (getattr(net.config, "max_position_embeddings", 0) or 512) - 2  # MPNet's and RoBERTa's begin at 2
    cut = {"truncation": True, "max_length": min(128, places, tokenizer.model_max_length)}
    for batch in batches:
        tokens = tokenizer(batch, padding=True, **cut, return_tensors="pt").to(device)
        with torch.no_grad():
            part = net(**tokens).last_hidden_state[:, 0].half().cpu()  # [b, width]  # DECISION (sentence)
        # The first token of a causal model sees no other: it says nothing of the sentence.
        if not part.isfinite().all() or (len(set(batch)) > 1 and (part == part[0]).all()):
            raise UserError(f"--text-model {model}: its first output token is not finite, or the same for all")
        yield part.numpy()


def text_file(cfg, captions):
    """Where the features of a list's sentences are kept: its name tells list, model and sentences apart."""
    code = zlib.crc32(f"{cfg.text_model} {captions.texts.digest()}".encode())
    name = f"{Path(captions.path).stem}-{Path(cfg.text_model).name}-{code:08x}.text.npy"
    return Path(cfg.text_features or cfg.out or f"runs/turbo-{cfg.recipe}") / name


def write_text(cfg, ctx):
    """--task encode_text: encode each sentence of both lists once, as the language model is frozen (Sec. 4.2)."""
    if not (cfg.train_list or cfg.val_list):
        raise UserError("--task encode_text needs --train-list or --val-list")
    lists = [read_captions(path, cfg) for path in (cfg.train_list, cfg.val_list) if path]  # before hours of work on one
    for captions in lists:
        parts, total = encode_sentences(captions.texts, cfg.text_model, ctx.device), -(-len(captions) // 256)
        out, done, rows = text_file(cfg, captions), 0, None
        temporary = out.with_suffix(".tmp")  # a killed run leaves no half of a file under the name
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"")  # an error is raised here, before the language model is loaded
            for part in tqdm(parts, f"encoding {captions.path}", total, unit="batch", disable=None):
                if rows is None:
                    shape = len(captions), part.shape[1]
                    rows = common.new_array(temporary, shape, np.float16)  # [sentences, width]
                rows[done : done + len(part)], done = part, done + len(part)
            rows.flush()
            os.replace(temporary, out)
        except OSError as error:
            raise UserError(f"{out}: can't write the sentences' features ({error.strerror})") from None
        print(f"{out}: {rows.shape[0]} sentences x {rows.shape[1]}")


def open_text(cfg, captions, width=0):
    """The sentences' features, [sentences, width], memory-mapped; of hashing made on the spot where there is no file."""
    path, again = text_file(cfg, captions), f"run --task encode_text --text-model {cfg.text_model} with the same lists"
    if cfg.text_model == "hashing" and not path.exists():
        return np.concatenate([*encode_sentences(captions.texts, "hashing", None)])
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        why = f"no features of the sentences of {captions.path} by {cfg.text_model}"
        raise UserError(f"{path}: {why} ({getattr(error, 'strerror', error)}); {again}") from None
    if rows.ndim != 2 or len(rows) != len(captions) or width not in (0, rows.shape[1]):
        shape = len(captions), width or "any width"
        raise UserError(f"{path}: features of shape {rows.shape}, where {shape} are needed; {again}")
    return rows


# ---- The model -------------------------------------------------------------------------------------------------------


class Turbo(nn.Module):
    """ViT encoder on the visible tokens, classifier on its CLS, light decoder on visible + reconstructed ones (Fig. 1).

    Module names follow VideoMAE's checkpoints.
    """

    patch = (2, 16, 16)  # frames, height, width of a token (App. A)
    embed_dim = 256  # of the joint space of video and text

    def __init__(self, num_classes, model="vit_b", decoder="", frames=16, size=224, recon=True, target="normalized",
                 drop_path=0.1, attention="auto", grad_checkpoint=False, text_width=0,
                 position_scale=1.0):  # fmt: skip
        """num_classes: of the classifier; 0: none. text_width: of the sentences' features, for Eq. 2; 0: none."""
        super().__init__()
        spec = MODELS[model]
        self.width, self.target, self.grad_checkpoint = spec["width"], target, grad_checkpoint
        self.grid = (frames // self.patch[0], size // self.patch[1], size // self.patch[2])  # tokens in (t, h, w)
        self.num_tokens, pixels = math.prod(self.grid), math.prod(self.patch) * 3
        self.patch_embed = nn.Linear(pixels, self.width)  # = VideoMAE's Conv3d (common.conv_to_linear)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, self.width))  # DECISION (CLS): learned, no position
        rates = [drop_path * i / (spec["depth"] - 1) for i in range(spec["depth"])]
        self.blocks = nn.ModuleList(
            Block(self.width, spec["heads"], drop_path=rate, kind=attention, index=i) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        if num_classes:
            self.head = nn.Linear(self.width, num_classes)  # App. A: CLS into one linear layer
        if text_width:
            self.video_head, self.text_head = (
                nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self.embed_dim))  # DECISION (MLP)
                for width in (self.width, text_width)
            )
        table = position_scale * common.sinusoid_table(self.num_tokens, self.width)[None]  # [1, N, D]
        self.register_buffer("positions", table, persistent=False)  # DECISION (positions)
        if recon:
            layers, width = map(int, (decoder or spec["decoder"]).split("x"))
            self.encoder_to_decoder = nn.Linear(self.width, width, bias=False)
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.decoder = Decoder(layers, width, max(1, width // 64), pixels, attention)
            table = common.sinusoid_table(self.num_tokens, width)[None]  # [1, N, decoder width]
            self.register_buffer("decoder_positions", table, persistent=False)
        # encoder_to_decoder too, at twice VideoMAE's spread: --init replaces it, and the toy, which starts from nothing,
        # ends at 98 % with this in place of 91 %.
        self.apply(common.init_linear)
        self.patch_embed.reset_parameters()  # PyTorch's default, as VideoMAE's convolution: positions must stand out
        if num_classes:
            nn.init.normal_(self.head.weight, std=0.01)

    def encode(self, patches, visible, keys=None):
        """Final-layer tokens [B, 1 + K, D], CLS first, of the visible ones of 0-255 patches [B, N, P]; visible [B, K].

        Tokens are dropped before normalisation and embedding: what is not looked at costs nothing. `keys` turns on
        drop path.
        """
        x = self.embed(patches, visible)  # [B, 1 + K, D]
        return self.norm(common.run_blocks(self.blocks, x, keys, self.grad_checkpoint))  # [B, 1 + K, D]

    @common.region
    def embed(self, patches, visible):
        """CLS and the visible ones of patches [B, N, P] as tokens [B, 1 + K, D]."""
        # DECISION (embedding): gather first
        x = data.normalize(gather_tokens(patches, visible), data.IMAGENET_MEAN, data.IMAGENET_STD)  # [B, K, P]
        x = self.patch_embed(x)  # [B, K, D]
        x = x + gather_tokens(self.positions.to(x.dtype), visible)  # [B, K, D]
        return torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # [B, 1 + K, D]

    def decode(self, tokens, visible, recon):
        """Predicted pixels [B, R, P] of the tokens `recon` [B, R], from encoded visible tokens [B, K, D] (no CLS)."""
        x = self.fill(tokens, visible, recon)  # [B, K + R, D']
        return self.decoder(x, recon.shape[1], self.grad_checkpoint)  # [B, R, P]

    @common.region
    def fill(self, tokens, visible, recon):
        """The decoder's input: visible tokens, and for each reconstructed one the mask token: [B, K + R, D']."""
        x = self.encoder_to_decoder(tokens)  # [B, K, D']
        positions = self.decoder_positions.to(x.dtype)  # [1, N, D']
        masked = self.mask_token.to(x.dtype) + gather_tokens(positions, recon)  # [B, R, D']
        return torch.cat([x + gather_tokens(positions, visible), masked], dim=1)  # [B, K + R, D']

    def forward(self, clips, keys, m, r, text=None, reconstruct=True):
        """clips 0-255 [B, T, C, H, W], keys int64 [B] -> logits [B, classes], prediction and target [B, R, P].

        Without a classifier: unit vectors of the videos [B, E] instead of logits; with text, features [B, text width],
        a tuple of those and the texts' [B, E]. Without `reconstruct`, as with r = 0, R is 0; what is seen is the same.
        """
        patches, visible, recon, target = self.split(clips, keys, m, r, reconstruct)
        tokens = self.encode(patches, visible, keys if self.training else None)  # [B, 1 + K, D]
        if hasattr(self, "head"):
            output = self.head(tokens[:, 0])  # [B, classes]
        else:
            output = F.normalize(self.video_head(tokens[:, 0]).float(), dim=-1)  # [B, E]  # DECISION (cosine)
        if text is not None:
            output = output, self.embed_text(text)  # [B, E] each
        if target.shape[1] == 0:
            return output, target, target  # [B, 0, P]
        return output, self.decode(tokens[:, 1:], visible, recon), target

    @common.region
    def split(self, clips, keys, m, r, reconstruct):
        """-> patches [B, N, P]; which are visible [B, K], which are reconstructed [B, R]; target [B, R, P]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        visible, recon = token_dropout(keys, self.num_tokens, m, r if reconstruct else 0.0)  # [B, K], [B, R]
        if recon.shape[1] == 0:
            return patches, visible, recon, torch.zeros(len(clips), 0, patches.shape[-1], device=clips.device)
        return patches, visible, recon, pixel_target(gather_tokens(patches, recon), self.target)

    def embed_text(self, text):
        """Sentences' features [S, text width] -> unit vectors [S, E]."""
        return F.normalize(self.text_head(text).float(), dim=-1)  # [S, E]


def build(cfg, num_classes, text_width=0):
    """The model that a Config describes."""
    return Turbo(num_classes, cfg.model, cfg.decoder, cfg.frames, cfg.size, cfg.recon_ratio > 0, cfg.target,
                 cfg.drop_path, cfg.attention, cfg.grad_checkpoint, text_width, cfg.position_scale)  # fmt: skip


# ---- Evaluation and pictures -----------------------------------------------------------------------------------------


def eval_ratios(cfg):
    """The mask ratios at test."""
    return [float(m) for m in cfg.eval_mask_ratios.split(",")]


def eval_batches(videos, cfg, ctx, failures, plan=None, views=0, shared=True):
    """Batches, on the device, of the clips of each readable video, view by view; by default test clips x test crops.

    shared: every rank has the same videos and takes its part of them; else it has videos of its own.
    """
    plan, views = plan or partial(sample_clip, cfg, False), views or cfg.test_clips * cfg.test_crops
    dataset = data.ClipDataset(videos, plan, cfg.size, cfg.seed, replace=False, views=views)
    size = max(1, (cfg.micro_batch or cfg.batch_size // ctx.world) // views)
    batches = data.every_sample(len(videos), size, *((ctx.rank, ctx.world) if shared else (0, 1)))
    for batch in data.make_loader(dataset, batches, cfg.workers, ctx.device):
        failures.new += batch.failures
        if len(batch.labels):
            yield batch._replace(keys=batch.keys.to(ctx.device))


@torch.no_grad()
def evaluate(model, videos, cfg, ctx, picture=None):
    """Top-1 and top-k in % (k = 5, or all classes if fewer) at each of --eval-mask-ratios, in one pass over the videos;
    a video's probabilities are the mean over its clips. PMAE with tokens masked as in training.

    Every readable video counts once, at any number of ranks; `unread` of them could not be.
    """
    model.eval()
    failures, k, ratios = data.Failures(len(videos), cfg.max_bad), min(5, len(videos.classes)), eval_ratios(cfg)
    sums = torch.zeros(2 + 2 * len(ratios), dtype=torch.float64, device=ctx.device)  # videos, PMAE, top-1, top-k, ...
    views = cfg.test_clips * cfg.test_crops
    for batch in eval_batches(videos, cfg, ctx, failures):
        size = len(batch.labels) // views  # view by view: the first `size` clips are the first of each video
        labels, pmae, hits = batch.labels[:size], torch.zeros(size, device=ctx.device), []  # [B] each
        with ctx.autocast():
            for m in ratios:
                logits, _, _ = model(batch.clips, batch.keys, m, 0.0)  # r = 0: only the classifier runs
                shares = logits.float().softmax(-1).unflatten(0, (views, size)).mean(0)  # [B, classes]
                hit = shares.topk(k).indices == labels[:, None]  # [B, k]
                hits += [hit[:, 0], hit.any(1)]
            if cfg.recon_ratio > 0:
                _, prediction, target = model(batch.clips[:size], batch.keys[:size], cfg.mask_ratio, cfg.recon_ratio)
                pmae = partial_mae(prediction, target)  # [B]
        sums += torch.stack([torch.ones_like(pmae), pmae, *hits]).double().sum(1)
        if picture and ctx.rank == 0 and cfg.recon_ratio > 0:
            write_recon(model, batch.clips[:size][:4], batch.keys[:size][:4], cfg, picture)
            picture = None
    unread = failures.collect(ctx, 0)
    n, pmae, *hits = ctx.sum(sums).tolist()
    model.train()
    if not n:
        raise UserError(f"{videos.path}: no video could be read: {'; '.join(unread[:3])}")
    result = {}
    for i, m in enumerate(ratios):
        at = f"@{m:g}" if i else ""
        result |= {f"val_top1{at}": 100 * hits[2 * i] / n, f"val_top{k}{at}": 100 * hits[2 * i + 1] / n}
    result |= {"val_clips": int(n), "val_unread": len(unread)}
    return result | ({"val_mae": pmae / n} if cfg.recon_ratio > 0 else {})


@torch.no_grad()
def second_features(model, captions, cfg, ctx, failures, picture=None):
    """{video: unit vectors [seconds, E]} of this rank's share of the videos, one a second (Sec. 5.2)."""
    blocks, features, views = [], {}, 8  # a block: 8 seconds, of one decode
    for video in range(ctx.rank, len(captions.names), ctx.world):
        path = os.path.join(captions.root, captions.names[video])
        try:
            with data.open_video(path) as opened:
                seconds = max(1, int(opened.clamp(math.inf)))
            features[video] = torch.full((seconds, model.embed_dim), math.nan)  # [seconds, E]
            blocks += [(path, video, first, seconds) for first in range(0, seconds, views)]
        except data.VideoError as error:
            failures.new.append(str(error))

    def plan(video, index, view, key):
        _, _, first, seconds = blocks[index]
        second = min(first + view, seconds - 1)
        return data.second_frames(video, second, cfg.frames, cfg.eval_fps or cfg.fps), data.centre_box(video.info)

    listed = data.VideoList.of([path for path, *_ in blocks])
    for batch in eval_batches(listed, cfg, ctx, failures, plan, views, shared=False):
        with ctx.autocast():
            vectors, _, _ = model(batch.clips, batch.keys, eval_ratios(cfg)[0], 0.0)  # [views B, E]
        for i, vector in zip(batch.index.tolist(), vectors.unflatten(0, (views, -1)).unbind(1), strict=False):
            _, video, first, seconds = blocks[i]
            features[video][first : first + views] = vector[: seconds - first].cpu()  # [<= 8, E]
        if picture and ctx.rank == 0 and cfg.recon_ratio > 0:
            write_recon(model, batch.clips[:4], batch.keys[:4], cfg, picture)
            picture = None
    read = {video: rows for video, rows in features.items() if rows.isfinite().all()}
    if not failures.new and len(read) < len(features):
        raise UserError("the model's features of a video are not finite: its weights are broken")
    return read


@torch.no_grad()
def evaluate_alignment(model, captions, text, cfg, ctx, picture=None):
    """R@1 in % of the sentences, in which second of their video they are shown, as HTM-Align counts it (Sec. 5.2).

    text: [sentences, width]. `chance` is the R@1 of a random second. Sentences of unreadable videos don't count.
    """
    model.eval()
    failures, sums = data.Failures(len(captions.names), cfg.max_bad), torch.zeros(4, dtype=torch.float64)
    for video, rows in second_features(model, captions, cfg, ctx, failures, picture).items():
        i = np.flatnonzero(captions.video_of == video)  # [S]
        sentences = model.embed_text(torch.from_numpy(text[i]).float().to(ctx.device)).cpu()  # [S, E]
        start, end = captions.start[i], captions.end[i]
        hits = recall_at_1((sentences @ rows.T).numpy(), start, end)  # [S]
        chance = (np.minimum(np.ceil(end), len(rows) - 1) - np.floor(start) + 1).clip(0) / len(rows)  # [S]
        sums += torch.tensor([len(i), hits.sum(), chance.sum(), (start >= len(rows)).sum()])
    unread = failures.collect(ctx, 0)
    n, hits, chance, outside = ctx.sum(sums.to(ctx.device)).tolist()
    model.train()
    if not n:
        raise UserError(f"{captions.path}: no video could be read: {'; '.join(unread[:3])}")
    result = {"val_recall1": 100 * hits / n, "val_chance": 100 * chance / n, "val_clips": int(n)}
    return result | {"val_unread": len(unread), "val_outside": int(outside)}  # sentences after their video's end


def write_recon(model, clips, keys, cfg, path):
    """Write path.png and path_animated.png: what the encoder saw of clips, and every dropped patch reconstructed, more
    than it was trained on at a time where r < m (data.write_reconstruction)."""
    visible, masked = token_dropout(keys, model.num_tokens, cfg.mask_ratio, cfg.mask_ratio)  # [B, K], [B, N - K]
    _, prediction, _ = model(clips, keys, cfg.mask_ratio, cfg.mask_ratio)  # the same split: it belongs to the keys
    patches = patchify(clips, model.patch)  # [B, N, P]
    data.write_reconstruction(path, patches, visible, masked, prediction, cfg.target, model.patch, model.grid, cfg.fps)


# Table 1 left: (m, r) and the printed "GFLOPs", which are multiply-adds.
TABLE_1 = {(0.0, 0.0): 180.6, (0.5, 0.5): 99.3, (0.75, 0.75): 57.6,
           (0.75, 0.25): 45.9, (0.9, 0.9): 35.2, (0.9, 0.1): 18.3}  # fmt: skip


def count_gmacs(cfg, classes, m, r, text_width=0):
    """(GMACs of a clip's forward pass counted here, the same with all patches embedded) at mask ratios (m, r).

    The paper's GFLOPs include embedding every patch; a step needs only the visible ones. The difference is added
    explicitly: dropped tokens x pixels x width.
    """
    with torch.device("meta"):
        model = build(replace(cfg, recon_ratio=r, attention="sdpa", grad_checkpoint=False), classes, text_width)
        clips = torch.empty(1, cfg.frames, 3, cfg.size, cfg.size, dtype=torch.uint8)
        here = common.count_macs(model, clips, torch.zeros(1, dtype=torch.int64), m, r)
    dropped = model.num_tokens - num_kept(model.num_tokens, m, r)[0]
    return here, here + dropped * math.prod(model.patch) * 3 * model.width / 1e9


def training_blocks(model, tokens, m, r):
    """[(a block on the CPU, how many such, (N, D) of its input)]: what a clip of `tokens` passes in training.

    The model itself may be on the meta device.
    """
    visible, recon = num_kept(tokens, m, r)
    parts = [(model.blocks, visible + 1, model.width)]  # 1: CLS
    if r > 0:
        parts.append((model.decoder.blocks, visible + recon, model.decoder.norm.weight.numel()))
    return [(copy.deepcopy(blocks[0]).to_empty(device="cpu"), len(blocks), (n, width)) for blocks, n, width in parts]


def saved_megabytes(model, tokens, m, r):
    """MB that all blocks store for the backward pass of one clip of `tokens` in fp32, from one real block each."""
    total = 0
    for block, depth, shape in training_blocks(model, tokens, m, r):
        total += depth * common.saved_bytes(block, torch.zeros(1, *shape))
    return total / 1e6


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    classes, text_width, m, r = cfg.num_classes or 2, 0, cfg.mask_ratio, cfg.recon_ratio
    if cfg.objective == "align":
        classes, text_width = 0, 256 if cfg.text_model == "hashing" else 768  # as MPNet's
    with torch.device("meta"):
        model = build(replace(cfg, attention="sdpa", grad_checkpoint=False), classes, text_width)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(parameters.values())
    decoder = sum(n for name, n in parameters.items() if name.startswith(("decoder", "encoder_to", "mask")))
    visible, recon = num_kept(model.num_tokens, m, r)
    steps = cfg.max_steps or cfg.train_clips * cfg.repeated // cfg.batch_size * cfg.epochs
    schedule = f"{cfg.epochs} epochs of {cfg.train_clips} videos x {cfg.repeated} at batch {cfg.batch_size}"
    print(f"model     {cfg.model}: {total / 1e6:.1f} M parameters, {decoder / 1e6:.1f} M of them the decoder's")
    print(f"tokens    {visible} visible, {recon} reconstructed of {model.num_tokens} (m = {m}, r = {r})")
    print(f"schedule  {schedule}: {steps} steps, peak lr {cfg.lr:g}")

    half = cfg.precision != "fp32"
    clip = common.PIXEL_BYTES * cfg.frames * 3 * cfg.size**2
    for block, depth, shape in training_blocks(model, model.num_tokens, m, r):
        clip += common.block_bytes(block, depth, shape, half=half, grad_checkpoint=cfg.grad_checkpoint)
    group = cfg.repeated * (2 if cfg.mixup or cfg.cutmix else 1)  # as common.micro_batches has it
    state = common.state_bytes(total, half=half)
    common.print_memory(cfg, [common.Phase("training", cfg.batch_size, cfg.micro_batch, state, clip, group)])
    forward, _ = count_gmacs(cfg, classes, m, r, text_width)
    passes = 4 if cfg.grad_checkpoint else 3
    data.print_cores([(cfg.frames, passes * forward, cfg.repeated)])

    print("\nFigure 2 (drawn, without numbers): MB that the blocks alone save for backward, a clip in fp32")
    print(f"{'frames':>6} {'m = 0':>9} {f'm = {m:g}, r = {r:g}':>20} {'less':>6}")
    for frames in sorted({16, 32, 64, cfg.frames}):
        tokens = model.num_tokens // cfg.frames * frames
        whole = saved_megabytes(model, tokens, 0.0, 0.0)
        ours = saved_megabytes(model, tokens, m, r)
        print(f"{frames:6} {whole:9.0f} {ours:20.0f} {whole / ours:5.2f}x")

    print('\nGMACs of a clip, forward, beside Table 1 left (its "GFLOPs" are multiply-adds; matrix products only)')
    print(f"{'m':>5} {'r':>5} {'visible':>8} {'recon':>6} {'here':>8} {'all embedded':>13} {'paper':>7} {'cheaper':>8}")
    is_paper = (cfg.model, cfg.decoder or "4x384", cfg.frames, cfg.size, classes) == ("vit_b", "4x384", 16, 224, 101)
    base, _ = count_gmacs(cfg, classes, 0.0, 0.0, text_width)
    for row in dict.fromkeys([*TABLE_1, (m, r)]):
        (here, embedded), kept = count_gmacs(cfg, classes, *row, text_width), num_kept(model.num_tokens, *row)
        paper = f"{TABLE_1[row]:.1f}" if is_paper and row in TABLE_1 else "-"
        left = f"{row[0]:5.2f} {row[1]:5.2f} {kept[0]:8} {kept[1]:6} {here:8.2f} {embedded:13.2f} {paper:>7}"
        print(f"{left} {base / here:7.2f}x" + "  <- this run" * (row == (m, r)))
    if not is_paper:
        print(
            "paper: of ViT-B with a decoder of 4 x 384, 16 frames of 224 x 224 and 101 classes, which this run is not"
        )


# ---- The tasks -------------------------------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    common.need_init(cfg, FROM_VIDEOMAE, "VideoMAE's weights")
    common.check_gpus(cfg)
    t, h, _ = Turbo.patch
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", cfg.eval_mask_ratios):
        raise UserError(f"--eval-mask-ratios {cfg.eval_mask_ratios} is not a list of numbers such as 0,0.5,0.9")
    if not all(0 <= m < 1 for m in (cfg.mask_ratio, *eval_ratios(cfg))):
        raise UserError("--mask-ratio and --eval-mask-ratios must be in [0, 1): at 1 nothing is left to look at")
    if not 0 <= cfg.recon_ratio <= cfg.mask_ratio:
        raise UserError(f"--recon-ratio {cfg.recon_ratio} must be in [0, --mask-ratio {cfg.mask_ratio}]")
    if cfg.min_lr > cfg.lr:
        raise UserError(f"--min-lr {cfg.min_lr:g}, where the cosine ends, is above the peak, --lr {cfg.lr:g}")
    if cfg.frames < t or cfg.frames % t:
        raise UserError(f"--frames {cfg.frames} is not a multiple of the token's {t} frames")
    if cfg.size < h or cfg.size % h:
        raise UserError(f"--size {cfg.size} is not a multiple of the patch's {h} pixels")
    tokens = cfg.frames // t * (cfg.size // h) ** 2
    if not all(num_kept(tokens, m, 0)[0] for m in (cfg.mask_ratio, *eval_ratios(cfg))):
        raise UserError(f"of {tokens} tokens --mask-ratio and --eval-mask-ratios must leave at least one")
    if cfg.recon_ratio and not num_kept(tokens, cfg.mask_ratio, cfg.recon_ratio)[1]:
        raise UserError(f"--recon-ratio {cfg.recon_ratio} is none of {tokens} tokens; 0 turns the decoder off")
    layers, _, width = (cfg.decoder or MODELS[cfg.model]["decoder"]).partition("x")
    sized = layers.isdecimal() and width.isdecimal() and int(layers) and int(width)
    if not (sized and (int(width) < 64 or int(width) % 64 == 0)):
        raise UserError(f"--decoder {cfg.decoder} is not layers x width, such as 8x512, in heads of 64")
    if cfg.objective == "align":
        if cfg.batch_size < 2:
            raise UserError("--batch-size 1 leaves InfoNCE nothing to tell apart (and 1 / ln 1 infinite): at least 2")
        if cfg.mixup or cfg.cutmix or cfg.label_smoothing:
            raise UserError("--objective align has no labels to mix: --mixup 0 --cutmix 0 --label-smoothing 0")
        if len(eval_ratios(cfg)) > 1:
            raise UserError(f"--eval-mask-ratios {cfg.eval_mask_ratios}: --objective align is evaluated at one")
    for flag in ("epochs", "fps", "log_every", "eval_every", "repeated", "test_clips", "temperature"):
        if getattr(cfg, flag) <= 0:
            raise UserError(f"--{flag.replace('_', '-')} must be above 0")
    if not 0 <= cfg.rand_augment <= 10:
        raise UserError("--rand-augment must be in [0, 10]")
    if cfg.test_crops not in (1, 3):
        raise UserError("--test-crops must be 1 or 3")
    for flag in ("max_steps", "workers", "micro_batch", "mixup", "cutmix", "max_bad", "eval_fps", "lr", "min_lr",
                 "warmup_epochs", "weight_decay", "clip_grad"):  # fmt: skip
        if getattr(cfg, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} must not be negative")
    if not (0 <= cfg.drop_path < 1 and 0 <= cfg.label_smoothing < 1):
        raise UserError("--drop-path and --label-smoothing must be in [0, 1)")


def make_toys(cfg, ctx):
    """Make the toy videos where a toy recipe's lists are asked for."""
    toy = next((Path(r["data_root"]) for r in RECIPES.values() if r.get("train_list", "-") == cfg.train_list), None)
    if toy:
        if ctx.rank == 0:
            try:
                data.make_toy("toy", toy.parts[1])
            except OSError as error:
                raise UserError(f"can't make the toy videos: {error}") from None
        ctx.barrier()


def open_lists(cfg, ctx):
    """(training, validation) VideoLists, or Pairs and Captions."""
    make_toys(cfg, ctx)
    for flag, path in (("--train-list", cfg.train_list), ("--val-list", cfg.val_list)):
        if not path:
            raise UserError(f"{flag} is missing: a file of one video a line, `path label` or `path,label`; or captions")
    if cfg.objective == "align":
        videos = Pairs(read_captions(cfg.train_list, cfg))
    else:
        videos = data.VideoList(cfg.train_list, cfg.data_root, cfg.num_classes)
        if len(videos.classes) < 2:
            raise UserError(f"{cfg.train_list}: all videos are of one class; a classifier needs two")
    if len(videos) * cfg.repeated < cfg.batch_size:
        few = f"{len(videos)} videos x --repeated {cfg.repeated}"
        raise UserError(f"{cfg.train_list}: {few} are less than one --batch-size of {cfg.batch_size}")
    if cfg.objective == "align":
        val_videos = read_captions(cfg.val_list, cfg)
    else:
        val_videos = data.VideoList(cfg.val_list, cfg.data_root, classes=videos.classes)
    data.need_videos(val_videos, cfg.max_bad)
    return videos, val_videos


# What of another checkpoint is taken whole or not at all, by how the names of its weights begin.
ENCODER = ("patch_embed.", "blocks.")
OTHER_PARTS = {
    "decoder": ("mask_token", "encoder_to_decoder.", "decoder."),
    "classifier": ("head.",),
    "heads": ("video_head.", "text_head."),
}


def part_of(weights, names):
    """{name: shape} of the weights that begin so, and the number of their blocks."""
    shapes = {name: weights[name].shape for name in weights if name.startswith(names)}
    blocks = {name.split("blocks.")[1].split(".")[0] for name in shapes if "blocks." in name}
    return shapes, len(blocks)


def init_weights(path, net):
    """Start `net` from a checkpoint of ours or VideoMAE's; returns what was loaded and what not, as a line to print.

    The encoder must be of the model's size. A decoder or head of another size is not used, and named; nor is VideoMAE's
    classifier, which reads the tokens' mean where ours reads CLS. UserError where some weights of a part are missing.
    """
    weights = common.videomae_weights(common.read_weights(path))
    own = net.state_dict()
    unused = []

    def refuse_gaps(part, mine, theirs):
        gaps = [name for name in mine if name not in theirs]
        if gaps:
            raise UserError(f"{path}: {len(gaps)} weights of the {part} are not in it ({gaps[0]} ...)")

    mine, depth = part_of(own, ENCODER)
    theirs, their_depth = part_of(weights, ENCODER)
    fits = all(theirs.get(name, shape) == shape for name, shape in mine.items())
    if fits and own.keys() & weights.keys():  # otherwise load_weights names what is wrong
        if their_depth > depth:
            raise UserError(
                f"{path}: its encoder has {their_depth} blocks, the model's {depth}; is --model the file's?"
            )
        refuse_gaps("encoder", mine, theirs)

    for part, names in OTHER_PARTS.items():
        mine, depth = part_of(own, names)
        theirs, their_depth = part_of(weights, names)
        if not mine or not theirs:
            continue
        same_size = depth == their_depth and all(theirs.get(name, shape) == shape for name, shape in mine.items())
        if part == "classifier" and "fc_norm.weight" in weights:
            why = "reads the tokens' mean, not CLS"
        elif part == "decoder" and not same_size and "mask_token" in theirs:
            why = f"--decoder {their_depth}x{theirs['mask_token'][-1]} would fit it"
        elif not same_size:
            why = "of another size"
        else:
            refuse_gaps(part, mine, theirs)
            continue
        unused.append(f"; its {part} is not used: {why}")
        weights = {name: tensor for name, tensor in weights.items() if name not in theirs}
    return common.load_weights(net, weights, path) + "".join(unused)


def use(cfg, ctx):
    """--task eval, predict, features: a trained model, its shape read from its own checkpoint."""
    source = cfg.init or f"{cfg.out or 'runs/turbo-' + cfg.recipe}/best.pt"
    shape = ("model", "decoder", "frames", "fps", "size", "mask_ratio", "recon_ratio", "target", "seed", "objective",
             "sampling", "text_model", "eval_fps", "position_scale")  # fmt: skip

    def build_from(state):
        its_cfg = replace(cfg, **{key: state["config"][key] for key in shape})
        check(its_cfg)
        return its_cfg, build(its_cfg, len(state["classes"]), state["text_width"]).to(ctx.device)

    cfg, net, state = common.open_trained(source, "turbo.py", ("classes", "text_width"), build_from)
    classes = state["classes"]
    if cfg.task == "predict":
        return predict(net, cfg, ctx, classes)
    if not cfg.val_list:
        raise UserError(f"--task {cfg.task} needs --val-list")
    if cfg.task == "features":
        return write_features(net, data.VideoList(cfg.val_list, cfg.data_root, classes=classes or None), cfg, ctx)
    if cfg.objective == "align":
        captions = read_captions(cfg.val_list, cfg)
        if captions.left_out and ctx.rank == 0:
            print(captions.check_left_out(cfg.max_bad))
        result = evaluate_alignment(net, captions, open_text(cfg, captions, state["text_width"]), cfg, ctx)
    else:
        result = evaluate(net, data.VideoList(cfg.val_list, cfg.data_root, classes=classes), cfg, ctx)
    if ctx.rank == 0:
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in result.items())
        print(f"{source} on {cfg.val_list}, m = {cfg.eval_mask_ratios}: {numbers}")


@torch.no_grad()
def predict(net, cfg, ctx, classes):
    """Print the five likeliest classes of each --input video."""
    if not cfg.input:
        raise UserError("--task predict needs --input video.mp4 ...")
    if not classes:
        raise UserError("--task predict needs a classifier; of a video-language model take --task features")
    videos, failures = data.VideoList.of(cfg.input), data.Failures(len(cfg.input), 1.0)
    for batch in eval_batches(videos, cfg, ctx, failures):
        with ctx.autocast():
            logits, _, _ = net(batch.clips, batch.keys, eval_ratios(cfg)[0], 0.0)  # [views B, classes]
        shares = logits.float().softmax(-1).unflatten(0, (cfg.test_clips * cfg.test_crops, -1)).mean(0)  # [B, classes]
        shares, order = shares.sort(-1, descending=True)
        for i, share, best in zip(batch.index.tolist(), shares.tolist(), order.tolist(), strict=False):
            words = (f"{classes[c]} {100 * p:.1f} %" for c, p in zip(best[:5], share, strict=False))
            print(f"{videos.video(i)}: {', '.join(words)}")
    if failures.new:
        raise UserError("; ".join(failures.new))


@torch.no_grad()
def write_features(net, videos, cfg, ctx):
    """Write features.npy, float32 [videos, D]: CLS, mean over a video's clips, in the list's order; NaN if unreadable.

    Of a video-language model its vectors in the joint space, [videos, E].
    """
    views, failures = cfg.test_clips * cfg.test_crops, data.Failures(len(videos), cfg.max_bad)

    def parts():
        for batch in eval_batches(videos, cfg, ctx, failures):
            with ctx.autocast():
                if hasattr(net, "head"):
                    visible, _ = token_dropout(batch.keys, net.num_tokens, eval_ratios(cfg)[0], 0.0)  # [views B, K]
                    vectors = net.encode(patchify(batch.clips, net.patch), visible)[:, 0]  # [views B, D]
                else:
                    vectors, _, _ = net(batch.clips, batch.keys, eval_ratios(cfg)[0], 0.0)  # [views B, E]
            vectors = vectors.float().unflatten(0, (views, -1)).mean(0)  # [B, D] or [B, E]
            yield batch.index, vectors if hasattr(net, "head") else F.normalize(vectors, dim=-1)

    shape = len(videos), net.width if hasattr(net, "head") else net.embed_dim
    common.write_features(cfg.out or f"runs/turbo-{cfg.recipe}", shape, parts(), failures, ctx)


@common.in_one_line
def main(cfg):
    check(cfg)
    cfg = common.without_random(cfg)
    if cfg.plan:
        return print_plan(cfg)
    ctx = common.launch(cfg.precision)
    if cfg.task == "encode_text":
        make_toys(cfg, ctx)
        return write_text(cfg, ctx) if ctx.rank == 0 else None
    if cfg.task != "train":
        return use(cfg, ctx)
    micro, accumulation = common.micro_batches(cfg, ctx, bool(cfg.mixup or cfg.cutmix), cfg.repeated)
    videos, val_videos = open_lists(cfg, ctx)
    align = cfg.objective == "align"
    names = [] if align else videos.classes
    classes, text_width = len(names), 0
    metric, name, unit = ("val_recall1", "R@1", "sentences") if align else ("val_top1", "top-1", "videos")
    if align:
        text, sentence_ids = open_text(cfg, videos.captions), videos.captions.texts.ids()  # [sentences, text width], []
        text_width = text.shape[1]
        val_text = open_text(cfg, val_videos, text_width)  # [sentences, text width]
    run = common.Run(cfg, ctx, "turbo")
    state = run.resume(train_list=videos, val_list=val_videos)
    if state and state["text_width"] != text_width:
        raise UserError(f"{run.folder}: trained on text features of width {state['text_width']}, not {text_width}")
    for captions in (videos.captions, val_videos) if align else ():
        if captions.left_out:
            run.say(captions.check_left_out(cfg.max_bad))

    epoch_steps = len(videos) * cfg.repeated // cfg.batch_size
    total = cfg.max_steps or cfg.epochs * epoch_steps
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, classes, text_width).to(ctx.device)
    optimizer = common.optimizer("adamw", common.param_groups(net, cfg.weight_decay), cfg.lr)
    scaler = common.loss_scaler(ctx)  # outside fp16 it scales by 1, and only skips updates that are not finite
    meter = common.Meter(ctx.device, "loss", "nce" if align else "ce", "mae")
    # What a checkpoint says beside weights: a run has no other state, because its draws and its data order are keyed.
    at = {"step": 0, "evaluated": 0, "best": -1.0, "skipped": 0, "last": {}}
    if state:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["precision"] == ctx.precision:
            scaler.load_state_dict(state["scaler"])
        at = state["at"]
        meter.load(state["sums"], ctx)
    elif cfg.init:
        run.say(init_weights(cfg.init, net))
    state = None  # its memory is free
    common.compile_model(net, ctx, cfg.compile)
    losses_of, error_of = (common.compiled(loss, ctx, cfg.compile) for loss in (turbo_loss, partial_mae))
    model = ctx.wrap(net)
    run.say(
        f"{len(videos)} training videos, {len(val_videos)} {unit} to validate, {classes or 'no'} classes; batch "
        f"{cfg.batch_size} = {ctx.world} ranks x {micro} clips x {accumulation}; peak lr {cfg.lr:g}; "
        f"{ctx.precision} on {ctx.device}; steps {at['step']} to {total}"
    )

    if align:
        plan, make_dataset = partial(sample_pair, cfg, videos.captions), PairDataset
    else:
        plan, make_dataset = partial(sample_clip, cfg, True), data.ClipDataset
    dataset = make_dataset(videos, plan, cfg.size, cfg.seed, replace=True, views=cfg.repeated)
    sizes = cfg.batch_size // cfg.repeated, micro // cfg.repeated  # in videos  # DECISION (repeat)
    schedule = data.GlobalBatches(len(videos), *sizes, cfg.seed, at["step"], total, ctx.rank, ctx.world)
    batches = data.make_loader(dataset, schedule, cfg.workers, ctx.device)
    failures = data.Failures(len(videos), cfg.max_bad)

    def save(*files):
        if at["step"] < total and not meter.healthy(ctx):
            return False  # the last good checkpoint stays
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        run.save(state | {"at": at, "sums": meter.state(ctx), "classes": names, "text_width": text_width}, *files)
        return True

    while True:
        # Evaluation comes before the step, so that a run that was stopped between the two takes it up again.
        step = at["step"]
        if step > at["evaluated"] and (step == total or step % max(1, round(cfg.eval_every * epoch_steps)) == 0):
            picture = run.folder / "recon.png"
            if align:
                result = evaluate_alignment(net, val_videos, val_text, cfg, ctx, picture)
            else:
                result = evaluate(net, val_videos, cfg, ctx, picture)
            run.log(result | {"clips": step * cfg.batch_size}, step, total)
            better = result[metric] > at["best"] and meter.healthy(ctx)
            at |= {"evaluated": step, "best": result[metric] if better else at["best"], "last": result}
            save(*["best.pt"] * better, "last.pt")
        if step == total:
            break

        lr = common.cosine(step, total, cfg.warmup_epochs * epoch_steps, cfg.lr, cfg.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        ready = []  # this rank's micro-batches
        for _ in range(accumulation):
            batch = next(batches)
            run.wait(batch.waited)
            failures.add(batch, micro)
            clips = batch.clips  # [B, T, C, H, W], uint8
            if cfg.rand_augment:
                clips = data.rand_augment(clips, batch.keys, cfg.rand_augment, layers=2)  # [B, T, C, H, W]
            if cfg.flip:
                clips = data.flip(clips, batch.keys)  # [B, T, C, H, W]
            ready.append((batch, clips, batch.keys.to(ctx.device, non_blocking=True)))

        if align:  # Eq. 2: over the whole global batch, however it is cut (common.cached_step)

            def encode(item, replay):
                batch, clips, keys = item
                i = videos.sentences_of(batch, cfg.repeated)  # [B], as the loader drew them
                words = torch.from_numpy(text[i]).float().to(ctx.device, non_blocking=True)  # [B, text width]
                ids = torch.from_numpy(sentence_ids[i]).to(ctx.device, non_blocking=True)  # [B]
                (z_v, z_t), prediction, target = model(clips, keys, cfg.mask_ratio, cfg.recon_ratio, words, replay)
                return (z_v, z_t, ids), error_of(prediction, target)  # [B, E], [B, E], [B]; [B]

            loss_fn = partial(nce_loss, temperature=cfg.temperature)
            nce, pmae = common.cached_step(ctx, model, encode, ready, loss_fn, scaler)
            meter.add(torch.cat([batch.index for batch, _, _ in ready]), nce + pmae, nce, pmae)
        else:  # Eq. 1: a sum over clips, so gradients of micro-batches add up
            for i, (batch, clips, keys) in enumerate(ready):
                labels = data.soft_labels(batch.labels, classes, cfg.label_smoothing)  # [B, classes]
                clips, labels = data.mix(clips, labels, (cfg.seed, step), cfg.mixup, cfg.cutmix)  # DECISION (mixed)
                with ctx.sync(model, last=i == accumulation - 1):
                    with ctx.autocast():
                        logits, prediction, target = model(clips, keys, cfg.mask_ratio, cfg.recon_ratio)
                        loss, ce, pmae = losses_of(logits, labels, prediction, target)  # [B] each
                    # The mean over the global batch; the ranks' gradients are averaged, hence the factor `world`. A
                    # loss that is not finite makes the gradient so too, and thereby skips the update.
                    poison = torch.where(loss.isfinite().all(), 1.0, math.nan)
                    scaler.scale(loss.sum() * poison * ctx.world / cfg.batch_size).backward()
                meter.add(batch.index, loss, ce, pmae)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
        if cfg.clip_grad:
            nn.utils.clip_grads_with_norm_(net.parameters(), cfg.clip_grad, norm)
        meter.step(norm)
        scaler.step(optimizer)  # an update that is not finite is skipped, by a flag on the device
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        at["step"] = step = step + 1

        run.advance(step, total)
        epoch_ends = step % epoch_steps == 0
        if epoch_ends or step % cfg.log_every == 0 or step == total:
            for line in failures.collect(ctx, (step - 1) // epoch_steps):
                run.say(f"unreadable, replaced by another: {line}")
        if step % cfg.log_every == 0 or step == total:
            means, bad, skipped = meter.read(ctx)
            at["skipped"] += run.guard([videos.video(i) for i in bad], skipped, at["skipped"], scaler.get_scale())
            record = {"epoch": round(step / epoch_steps, 3), **means, "lr": lr, "clips": step * cfg.batch_size}
            run.log(record, step, total)
        if (run.save_due() or epoch_ends) and save("last.pt"):
            run.leave(step)

    last, shown = at["last"], f"{run.folder}/recon.png: original, seen, reconstruction. " * (cfg.recon_ratio > 0)
    chance = last["val_chance"] if align else 100 / classes
    run.say(
        f"complete: {name} {last[metric]:.1f} % of {last['val_clips']} {unit} (chance {chance:.1f} %), "
        f"best {at['best']:.1f} %. {shown}--overwrite starts anew."
    )


if __name__ == "__main__":
    main(parse(Config, RECIPES))
