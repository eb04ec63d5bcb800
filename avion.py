"""Training a Large Video Model on a Single Machine in a Day (Zhao, Krähenbühl, 2023): a video CLIP,
in one file.

A plain ViT over all space-time patches beats factorised ones, and trains in a day once three
bottlenecks are gone. GPU: attention that never stores its N x N weights, and recomputed blocks,
make room for the large batches that InfoNCE thrives on. IO: long videos are cut into chunks of
15 s, so that a clip reads little. CPU: the random crop moves into the decoder.

    paper                                   here
    Sec. 4.1, Fig. 4: memory                common.attention (--attention plain), common.run_blocks
    Fig. 3: which part of a block takes it  saved_megabytes (--plan)
    Sec. 4.2, Eqs. 1-2, Fig. 8b: the crop   sample_clip, data.random_resized_box, data.Video
    Fig. 8a: decode, then crop              data.WholeFrames (--loader)
    Sec. 4.2: what else runs on the GPU     data.flip, data.mix, data.normalize
    Sec. 4.3: chunks; Eq. 3                 data.Chunks, data.largest_chunk
    Sec. 3: joint space-time ViT            VideoEncoder
    Sec. 5.2: PE = PE_t + PE_s              VideoEncoder.embed, stretch_time
    Sec. 5.2: GPT-like text encoder, BPE    TextEncoder, BPETokenizer
    Sec. 5.2: total batch of 2,048          global_backward, common.cached_step
    Sec. 5.3: InfoNCE; max-margin [71]      common.contrastive_loss, max_margin_loss
    Sec. 5.1: mAP, nDCG of retrieval        mean_average_precision, ndcg, relevancy
    App. B.3: verbs, nouns from actions     marginalise, VideoClassifier
    App. B                                  Config (defaults: B.1), RECIPES
    Tables 1-3, Fig. 6                      RECIPES (--model, --init, --batch-size, --eval-frames)
    Table 4, Figs. 2-5, 7                   tests/bench_avion.py
    Sec. 5.5, Table 5: VideoMAE, loader     tpt_mae.py with one stage of 16 frames (videomae_k400)

    row of the paper              flags (more: lists, folders and --merges, as in the command below)
    Table 1, original narratives  --recipe ego4d --init clip-vit-base-patch16/
    Table 1, LLM-augmented        --recipe ego4d_llm --init clip-vit-base-patch16/
    Table 2, zero-shot, ViT-B     --recipe ego4d_llm --task eval --eval-frames 16
    Table 2, ViT-L's pretraining  --recipe ego4d_llm_l14 --init clip-vit-large-patch14/
    Table 2, zero-shot, ViT-L     --recipe ego4d_llm_l14 --task eval --eval-frames 16
    Table 2, finetuned, ViT-B     --recipe ek100_mir --init runs/avion-ego4d_llm/best.pt
    Table 2, finetuned, ViT-L     --recipe ek100_mir_l14 --init runs/avion-ego4d_llm_l14/best.pt
    Table 3, ViT-B                --recipe ek100_cls --init runs/avion-ego4d_llm/best.pt
    Table 3, ViT-L                --recipe ek100_cls_l14 --init runs/avion-ego4d_llm_l14/best.pt
    Table 4, first row            --recipe ego4d --init clip-vit-base-patch16/ --batch-size 512
                                  --attention plain --loader decode_then_crop
    Fig. 6, LLM-augmented, 512    --recipe ego4d_llm --init clip-vit-base-patch16/ --batch-size 512

Table 4's first row also reads chunks of 300 s (data.py chunk --seconds 300).
Faithful: model, losses, optimisers, schedules, sampling, metrics, as the paper states them.
DECISIONS where the paper is silent or contradicts itself; each line that one shapes is tagged:
    style       CLIP has QuickGELU, eps 1e-5 and a red mean of 122.77. The released code meant that
                but ran GELU, eps 1e-6 in its ViT, and 108.33. Here what --init holds decides:
                CLIP's weights get CLIP's, AVION's get the released code's, and a checkpoint of ours
                keeps what it began with; from scratch, CLIP's.
    temporal    paper: T x N x D, "randomly initialised"; code: T x D, zeros. Here T x D: upon
                CLIP's weights, which know single images only, zeros; from scratch sines, because a
                small model finds order slowly.
    checkpoint  Sec. 4.1's O(sqrt(L) N D) would keep the input of every sqrt(L)-th block. Here each
                block's, as the released code: O(L N D), with a small factor.
    temperature silent. As the released command: 0.07 and frozen; --no-freeze-temperature learns it,
                not below 0.01.
    crop        App. B.2 and B.3 ask for "short side 256, take 224" and for RRC (0.5, 1), B.1 for
                RRC alone. Only RRC is fused, and run.
    aspect      Eq. 1 draws the aspect ratio uniformly. Here log-uniformly, as torchvision and the
                released decoder, so that tall and wide crops are as likely.
    frames      "randomly sample 4 frames": one in each of 4 equal parts of the narration's time, as
                the released code.
    text        which text a clip is fine-tuned with is not said. As the released code: any sentence
                with a relevancy above 0.1 to it, drawn anew each time.
    duplicates  pairs of one text count as each other's negatives, as in the released code;
                --skip-duplicates: not.
    epochs      of retrieval's fine-tuning are not said: 100, as the released code and as App. B.3.
    classify    App. B.3's weight decay 5e-4, 1 epoch of warm-up, flips, no cutmix; the released
                command has 4e-5, 2, none and 1.0. Flips are made on the device, not in the decoder.
    batch       App. B.3 states one rate, 0.012, for 512 clips (ViT-B) and 192 (ViT-L). The released
                command scales it, 0.003 for 128 clips, so ViT-L's is 0.0045 here; AdamW's rates
                stay.
    rate        stochastic depth at one rate in all blocks, as the released code, not rising.
    decay       no weight decay of 1-D parameters; the released code spares PE_s too.
    prompts     zero-shot classes: the mean feature of an action's narrations, as LaViLa.
    corpus      35.0M pairs hold many phrasings a clip; "10 effective epochs" is read as 5 of a list
                twice as long.
    toy         so that a small model sees motion in minutes from nothing, its tokens span 2 frames,
                its positions are 3 times as large, and its text encoder learns at 0.05 of the rate:
                at the full rate captions of one colour become alike before the video encoder can
                tell their motions apart.
Missing: ftfy's repairs of texts (mojibake, ligatures, full width; its straight quotes are here);
LaViLa's narrator and rephraser, whose texts are read, not made; the rows of EgoVLP and LaViLa in
Tables 1-3, whose TimeSformer is no recipe; Lion, which the released VideoMAE command uses in place
of AdamW. Figs. 2 and 5 need 8 GPUs and 64 processes: the commands are in tests/bench_avion.py.

    python avion.py                     # toy videos, made on first use: 2 CPU cores, some minutes
    torchrun --nproc_per_node=8 avion.py --recipe ego4d --init clip-vit-base-patch16/ \\
        --merges bpe_simple_vocab_16e6.txt.gz --train-list ego4d.pkl --data-root ego4d_chunks \\
        --val-list EPIC_100_retrieval_test.csv --val-root ek100_chunks

The method is sample_clip, VideoEncoder, batch_loss and global_backward; the loop that calls them is
main's. Text, Evaluation, Weights and The plan may be skipped at first.
Shapes: B clips, T frames, C colours, N tokens (steps x places), K kept ones, D width, P pixel
values, L words, E embedding, A classes, V clips and S sentences of a retrieval task, Q queries of
either; b clips, or other rows, of a part, such as a micro-batch. keys, int64 [B], are hashes of
seed, epoch and entry, one a clip: all draws of a clip are made from its key (common.uniform).
"""

import gzip
import html
import math
import os
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

# Idle threads sleep: on the CPU the loader needs their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import Block, UserError, gather_tokens, opt, parse, patchify, uniform

# Width, depth and heads of the video encoder, its patches' side; width, depth and heads of the text
# encoder. Only in toys: `tubelet`, frames that a token spans; `position_scale`, a factor.
MODELS = {
    "clip_toy": {
        "width": 128, "depth": 4, "heads": 2, "patch": 16, "text": (64, 2, 1),
        "tubelet": 2, "position_scale": 3.0,  # DECISION (toy)
    },
    "clip_b16": {"width": 768, "depth": 12, "heads": 12, "patch": 16, "text": (512, 12, 8)},
    "clip_l14": {"width": 1024, "depth": 24, "heads": 16, "patch": 14, "text": (768, 12, 12)},
}  # fmt: skip


class Style(NamedTuple):
    """What weights were trained with, and so need; a checkpoint of ours has its name."""

    act: type  # activation
    eps: float  # of the video encoder's LayerNorms; the text encoder's is 1e-5
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1]: CLIP's
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


_AVION_MEAN = (108.3272985 / 255, 116.7460125 / 255, 104.09373615 / 255)  # red is not CLIP's 122.77
STYLES = {  # DECISION (style)
    "clip": Style(common.QuickGELU, 1e-5),
    "avion": Style(nn.GELU, 1e-6, _AVION_MEAN),
    "gelu": Style(nn.GELU, 1e-5),  # the hub's CLIPs that say so
}

# A recipe replaces defaults of Config, which are App. B.1's.
TOY = {
    "train_list": ("toy/narrated/train.jsonl",), "val_list": "toy/narrated/val.jsonl",
    "data_root": "toy/narrated/chunks", "train_clips": 1920, "model": "clip_toy", "frames": 8,
    "size": 64, "embed_dim": 64, "patch_dropout": 0.25, "crop": False, "batch_size": 64, "lr": 1e-3,
    "min_lr": 1e-6, "warmup_epochs": 1.0, "clip_grad": 1.0, "workers": 2, "log_every": 30,
    "eval_every": 5,
}  # fmt: skip
TOY_TUNED = TOY | {"init": "runs/avion-toy/best.pt", "epochs": 5}
PRETRAINED = {"grad_checkpoint": True}  # DECISION (checkpoint); Sec. 5.2: 256 clips in 24 GB
TUNED = {  # App. B.2, B.3
    "train_clips": 67217, "frames": 16, "epochs": 100, "batch_size": 512, "start_lr": 1e-6,
    "min_lr": 1e-5, "warmup_epochs": 1.0, "drop_path": 0.1, "eval_every": 5,
    "grad_checkpoint": True,
}  # fmt: skip
CLASSIFIED = TUNED | {  # App. B.3  # DECISION (classify)
    "loss": "cross_entropy", "num_classes": 3806, "optimizer": "sgd", "weight_decay": 5e-4,
    "flip": True, "dropout": 0.5, "label_smoothing": 0.1, "mixup": 0.8,
}  # fmt: skip
RECIPES = {
    "toy": TOY | {
        "batch_size": 32, "epochs": 16, "eval_every": 2, "freeze_temperature": False,
        "skip_duplicates": True, "text_lr": 0.05,  # DECISION (toy)
    },
    "toy_mir": TOY_TUNED | {
        "loss": "max_margin", "lr": 2e-4, "min_relevancy": 0.5, "skip_duplicates": True,
    },
    "toy_cls": TOY_TUNED | {"loss": "cross_entropy", "lr": 3e-4},
    "ego4d": PRETRAINED | {"train_clips": 4_000_000},
    # DECISION (corpus): --train-list rephrased.pkl narrated.pkl
    "ego4d_llm": PRETRAINED | {"train_clips": 8_000_000},
    # App. B.1: 112 clips on each of 8 GPUs
    "ego4d_llm_l14": PRETRAINED | {
        "train_clips": 8_000_000, "model": "clip_l14", "batch_size": 896,
    },
    "ek100_mir": TUNED | {"loss": "max_margin"},  # DECISION (epochs)
    # App. B.2, B.3: 24 clips on each of 8 GPUs
    "ek100_mir_l14": TUNED | {"loss": "max_margin", "model": "clip_l14", "batch_size": 192},
    "ek100_cls": CLASSIFIED | {"lr": 0.012},
    # DECISION (batch)
    "ek100_cls_l14": CLASSIFIED | {"lr": 0.0045, "model": "clip_l14", "batch_size": 192},
}  # fmt: skip


@dataclass
class Config(common.RunConfig):
    task: str = opt(
        "train", "what to do with it", ["train", "eval", "predict", "features", "search"], free=True
    )
    train_list: tuple = opt((), "lists of narrated clips (.pkl, .csv, .jsonl), as one", free=True)
    val_root: str = opt("", "as --data-root, of --val-list; empty: --data-root", free=True)
    actions: tuple = opt((), "EK-100 lists of all the classes; empty: the lists at hand", free=True)
    merges: str = opt("", "CLIP's bpe_simple_vocab_16e6.txt.gz; else --init's or bytes", free=True)
    init: str = opt("", "weights: ours, OpenAI's .pt, CLIP's hub folder, AVION's; or `random`")
    query: str = opt("", "what --task search looks for", free=True)
    window: float = opt(4.0, "seconds of a clip in --task search", free=True, within="(0, inf)")
    num_classes: int = opt(0, "number of actions, for --plan; 0: as many as lists have", free=True)

    model: str = opt("clip_b16", "encoder sizes", list(MODELS))
    frames: int = opt(4, "frames a clip (App. B)", within="[1, inf)")
    eval_frames: int = opt(0, "at test (Table 2: 16); 0: --frames", free=True)
    size: int = opt(224, "height and width of a clip, in pixels (App. B)")
    embed_dim: int = opt(256, "width of what is compared (App. B.1)", within="[1, inf)")
    loss: str = opt("infonce", "what trains", ["infonce", "max_margin", "cross_entropy"])
    margin: float = opt(0.2, "margin of the max-margin loss (App. B.2)")
    # DECISION (text)
    min_relevancy: float = opt(0.1, "max-margin: texts above this relevancy are a clip's own")
    freeze_temperature: bool = opt(True, "keep the temperature at 0.07")  # DECISION (temperature)
    # DECISION (duplicates)
    skip_duplicates: bool = opt(False, "pairs with one text are no negatives of each other")
    patch_dropout: float = opt(0.0, "share of patches left out in training", within="[0, 1)")

    epochs: int = opt(5, "passes over the training list (App. B.1)", within="[1, inf)")
    batch_size: int = opt(2048, "clips a step over all ranks (App. B.1)", within="[1, inf)")
    optimizer: str = opt("adamw", "or SGD with momentum 0.9 (App. B.3)", ["adamw", "sgd"])
    lr: float = opt(3e-5, "peak learning rate at this batch, as used (App. B.1)")
    start_lr: float = opt(0.0, "learning rate at the start of the warm-up (App. B.2)")
    min_lr: float = opt(3e-5, "learning rate at the end of the cosine (App. B.1: fixed)")
    warmup_epochs: float = opt(0.0, "epochs of linear warm-up (App. B.1: none)")
    weight_decay: float = opt(0.01, "weight decay (App. B.1)")  # DECISION (decay)
    clip_grad: float = opt(0.0, "largest gradient norm; 0: not clipped")
    # DECISION (toy)
    text_lr: float = opt(1.0, "factor of the text encoder's rate; 0: frozen")
    # DECISION (rate)
    drop_path: float = opt(0.0, "stochastic depth, of the video encoder", within="[0, 1)")
    dropout: float = opt(0.0, "dropout before the classifier (App. B.3)", within="[0, 1)")
    label_smoothing: float = opt(0.0, "share spread over all classes (App. B.3)", within="[0, 1)")
    mixup: float = opt(0.0, "Beta parameter of mixup; 0: off (App. B.3)")
    cutmix: float = opt(0.0, "Beta parameter of cutmix; 0: off")
    # DECISION (crop)
    crop: bool = opt(True, "random resized crops in training (App. B); off: the centre square")
    crop_min: float = opt(0.5, "least share of the area in a crop (App. B)", within="(0, 1]")
    flip: bool = opt(False, "random left-right flips in training (App. B.3)")
    loader: str = opt("fused", "Fig. 8b, or 8a", ["fused", "decode_then_crop"], free=True)
    eval_every: int = opt(1, "epochs between evaluations; the last step is one", within="[1, inf)")

    @property
    def contrastive(self):
        """Whether clips are compared with texts, and not told apart by classes."""
        return self.loss != "cross_entropy"


# ---- Clips and losses ----------------------------------------------------------------------------


def sample_clip(video, index, view, key, videos, frames, train, crop=False, crop_min=0.5):
    """(frames, box) to read of an open `video` for entry `index` of `videos`; data.ClipDataset's
    `plan` (App. B).

    The narration's time in `frames` equal parts, one frame in each. In training a random one and,
    with `crop`, RRC (crop_min, 1): its box needs the video's width and height only, so that it is
    drawn before anything is decoded, and nothing outside of it is converted (Sec. 4.2). Else the
    middle ones, and the centre square.
    """
    u = 0.5  # where in its part a frame lies, from 0 to 1: the middle
    if train:
        u = uniform(key, "frames", frames).numpy()  # [T]  # DECISION (frames)
    start, end = videos.start[index], videos.end[index]
    chosen = data.between_frames(video, start, end, frames, u)  # opens the chunks that it touches
    if crop:  # DECISION (aspect)
        return chosen, data.random_resized_box(video.info, key, (crop_min, 1.0))  # DECISION (crop)
    return chosen, data.centre_box(video.info)


def max_margin_loss(video, text, margin=0.2, same=None):
    """Max-margin ranking, a value for each pair i: the sum over its negatives j of
    max(0, margin - s_ii + s_ij) and of the same with s_ji.

    video, text: features [B, E] of length 1, row i of one belongs to row i of the other; same: bool
    [B, B], pairs that are no negatives; None: a clip and its own text only. -> [B], whose mean is
    the mean over all 2 B (B - 1) terms (App. B.2; Wray et al. 2019).
    """
    similarity = video.float() @ text.float().T  # [B, B]
    own = similarity.diagonal()[:, None]  # [B, 1]
    terms = (margin - own + similarity).relu() + (margin - own + similarity.T).relu()  # [B, B]
    if same is None:
        same = torch.eye(len(own), dtype=torch.bool, device=own.device)
    return (terms * ~same).sum(1) / max(1, 2 * (len(own) - 1))  # [B]


def batch_loss(video, text, ids, scale, loss="infonce", margin=0.2, skip_duplicates=False):
    """The loss of each pair of the global batch, [B], by its name in --loss: features [B, E];
    with skip_duplicates int64 ids [B], equal where texts are; scale: 1 / temperature, []."""
    same = None  # whether pairs have one text, bool [B, B]
    if skip_duplicates:  # DECISION (duplicates)
        same = ids[:, None] == ids
    if loss == "max_margin":
        return max_margin_loss(video, text, margin, same)
    return common.contrastive_loss(video, text, scale, same)


# ---- The step over the global batch --------------------------------------------------------------
# InfoNCE of B pairs with features v_i and t_i, of length 1, and s = 1 / temperature:
#
#     L = 1/(2B) sum_i [ - log( exp(s v_i.t_i) / sum_j exp(s v_i.t_j) )     clip i among all texts
#                        - log( exp(s v_i.t_i) / sum_j exp(s v_j.t_i) ) ]   text i among all clips
#
# All clips of all ranks are in each term, so L, the loss here, is no sum over micro-batches. The
# paper's 8 GPUs hold the graph of its 2,048 clips, 256 each. Fewer or smaller ones take it in
# parts, which is not in the paper (Gao et al. 2021): L sees nothing of a clip but its features.
# What it asks of them, dL/dv and dL/dt, is small, [B, E] each, and known before any backward pass.
# From there the chain rule goes on, a micro-batch m at a time:
#
#     dL/dtheta = sum_m ( dL/dv[m] dv[m]/dtheta + dL/dt[m] dt[m]/dtheta )
#
# and a temperature that is learned has dL/ds, one number, likewise.
#
#     pass 1, no graph             all ranks' features        pass 2, with a graph
#
#     rank 0   m 0 -> v, t  --+                          +--> m 0 -> v, t: (v . dL/dv[rows]
#              m 1 -> v, t  --+                          |                  + t . dL/dt[rows])
#                             +-> v, t -> L -> dL/dv, dL/dt                 .sum().backward()
#     rank 1   m 0 -> v, t  --+                          |
#              m 1 -> v, t  --+   [B, E] each            +--> m 1 -> ... then ranks' gradients meet
#
# Rows of [B, E] run rank after rank, in a rank micro-batch after micro-batch: those of micro-batch
# m of rank r begin at (r * accumulation + m) * b, of b clips. Drop path and patch dropout draw by
# the clips' keys, so that pass 2 computes again what pass 1 did. The price is one more forward
# pass, what --grad-checkpoint costs too. A rank whose clips are one micro-batch keeps pass 1's
# graph, and computes nothing twice. max_margin_loss goes the same way, without s.


def global_backward(run, batches, loss_fn):
    """Add to the gradients those of the mean loss of the global batch.

    batches: this rank's (clips [b, T, C, H, W], keys [b], tokens [b, L], ids [b]). The two passes
    are common.cached_step's: it calls `encode` in both, and loss_fn with what that gives, by name,
    of all ranks.
    """

    def encode(batch):
        clips, keys, tokens, ids = batch
        video, text, scale = run.model(clips, tokens, keys)  # [b, E] each, []
        return {"video": video, "text": text, "ids": ids, "scale": scale}

    loss, _ = common.cached_step(run.ctx, run.model, encode, batches, loss_fn, run.scaler)
    run.note(loss)


# ---- The model -----------------------------------------------------------------------------------


def stretch_time(embedding, steps):
    """PE_t for another number of steps, linearly (Sec. 5.2): [before, D] -> [steps, D]."""
    if len(embedding) == steps:
        return embedding
    x = embedding.T[None].float()  # [1, D, before]
    x = F.interpolate(x, steps, mode="linear", align_corners=False)  # [1, D, steps]
    return x[0].T.to(embedding.dtype)  # [steps, D]


def num_kept(tokens, patch_dropout):
    """How many of a clip's patches are not left out (patch dropout: FLIP's, not the paper's)."""
    # round: 10 * (1 - 0.9) is a little less than the 1 that it means.
    return max(1, int(round(tokens * (1 - patch_dropout), 6)))


class VideoEncoder(nn.Module):
    """A ViT that attends over all patches of all frames at once (Sec. 3); its CLS token stands for
    the clip."""

    def __init__(
        self,
        model="clip_b16",
        frames=4,
        size=224,
        style="clip",
        drop_path=0.0,
        patch_dropout=0.0,
        attention="auto",
        grad_checkpoint=False,
    ):
        super().__init__()
        spec = MODELS[model]
        self.style = STYLES[style]
        act, eps = self.style.act, self.style.eps
        self.width = spec["width"]
        self.grad_checkpoint = grad_checkpoint
        self.patch_dropout = patch_dropout
        self.patch = spec.get("tubelet", 1), spec["patch"], spec["patch"]  # t, h, w
        pixels = 3 * math.prod(self.patch)
        self.patch_embed = nn.Linear(pixels, self.width, bias=False)  # CLIP's Conv2d, as a product
        self.class_embedding = nn.Parameter(0.02 * torch.randn(self.width))
        places = (size // spec["patch"]) ** 2
        steps = frames // self.patch[0]
        # Without --init both positions begin as sines.
        factor = spec.get("position_scale", 1.0)
        positions = factor * common.sinusoid_table(1 + places, self.width)  # [1 + places, D]
        self.positional_embedding = nn.Parameter(positions)  # row 0: CLS
        # DECISION (temporal): flipped, so that channels where places vary fast vary slowly in time
        time = factor * common.sinusoid_table(steps, self.width).flip(1)  # [steps, D]
        self.temporal_embedding = nn.Parameter(time)
        self.ln_pre = nn.LayerNorm(self.width, eps=eps)
        options = {"drop_path": drop_path, "eps": eps, "act": act, "kind": attention}
        self.blocks = nn.ModuleList(  # DECISION (rate)
            Block(self.width, spec["heads"], index=i, **options) for i in range(spec["depth"])
        )
        self.ln_post = nn.LayerNorm(self.width, eps=eps)
        self.apply(common.init_linear)
        self.patch_embed.reset_parameters()  # PyTorch's default, as of a convolution

    def forward(self, clips, keys=None):
        """Clips 0-255 [B, T, C, H, W] of any number of frames -> [B, D]. keys int64 [B] turn on
        drop path and patch dropout: left-out patches are neither normalised nor embedded."""
        x = self.embed(clips, keys)  # [B, 1 + K, D]
        x = common.run_blocks(self.blocks, x, keys, self.grad_checkpoint)  # [B, 1 + K, D]
        return self.ln_post(x[:, 0])  # [B, D]

    @common.region
    def embed(self, clips, keys=None):
        """CLS and the patches that are not left out as tokens [B, 1 + K, D]."""
        patches = patchify(clips, self.patch)  # [B, N, P]
        time = stretch_time(self.temporal_embedding, clips.shape[1] // self.patch[0])  # [steps, D]
        positions = time[:, None] + self.positional_embedding[1:]  # [steps, places, D]
        positions = positions.flatten(0, 1)[None]  # [1, N, D]
        if keys is not None and self.patch_dropout:
            n = patches.shape[1]
            (kept,) = common.random_split(keys, n, num_kept(n, self.patch_dropout))  # [B, K]
            patches = gather_tokens(patches, kept)  # [B, K, P]
            positions = gather_tokens(positions, kept)  # [B, K, D]
        x = self.patch_embed(data.normalize(patches, self.style.mean, self.style.std))  # [B, K, D]
        cls = self.class_embedding + self.positional_embedding[0]  # [D]
        cls = cls.expand(len(x), 1, -1)  # [B, 1, D]
        x = torch.cat([cls.to(x.dtype), x + positions.to(x.dtype)], dim=1)  # [B, 1 + K, D]
        return self.ln_pre(x).to(x.dtype)  # [B, 1 + K, D]


class TextEncoder(nn.Module):
    """CLIP's GPT-like text encoder; the end token, which sees all words before it, stands for the
    text (Sec. 5.2)."""

    def __init__(
        self,
        model="clip_b16",
        vocabulary=49408,
        context=77,
        style="clip",
        attention="auto",
        grad_checkpoint=False,
    ):
        super().__init__()
        self.width, depth, heads = MODELS[model]["text"]
        self.grad_checkpoint = grad_checkpoint
        self.token_embedding = nn.Embedding(vocabulary, self.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, self.width))
        options = {"eps": 1e-5, "act": STYLES[style].act, "kind": attention, "causal": True}
        self.blocks = nn.ModuleList(Block(self.width, heads, **options) for _ in range(depth))
        self.ln_final = nn.LayerNorm(self.width, eps=1e-5)
        self.apply(common.init_linear)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens):
        """int64 [B, L], L <= context -> [B, D]."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [B, L, D]
        x = common.run_blocks(self.blocks, x, grad_checkpoint=self.grad_checkpoint)  # [B, L, D]
        clip = torch.arange(len(x), device=x.device)  # [B]
        return self.ln_final(x[clip, tokens.argmax(1)])  # [B, D]: the end token has the largest id


class VideoCLIP(nn.Module):
    """Video and text encoder, one linear layer each to features of length 1, and a temperature
    (Sec. 5.2, App. B.1).

        net = VideoCLIP(VideoEncoder(), TextEncoder())
        tokens = BPETokenizer("bpe_simple_vocab_16e6.txt.gz")(texts)  # of B strings
        keys = common.make_key(seed, step, torch.arange(B))  # other draws in each step
        video, text, scale = net(clips, tokens, keys)        # clips uint8 [B, 4, 3, 224, 224]
        loss = common.contrastive_loss(video, text, scale).mean()
    """

    def __init__(self, visual, textual, embed_dim=256, freeze_temperature=True):
        super().__init__()
        self.visual, self.textual, self.embed_dim = visual, textual, embed_dim
        self.visual_projection = nn.Linear(visual.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(textual.width, embed_dim, bias=False)
        for layer in (self.visual_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        log_scale = torch.tensor(math.log(1 / 0.07))  # DECISION (temperature)
        self.logit_scale = nn.Parameter(log_scale, requires_grad=not freeze_temperature)

    def encode_video(self, clips, keys=None):
        """Clips 0-255 [B, T, C, H, W] -> float32 [B, E]; keys int64 [B] in training."""
        x = self.visual_projection(self.visual(clips, keys))  # [B, E]
        return F.normalize(x.float(), dim=-1)  # [B, E]

    def encode_text(self, tokens):
        """int64 [B, L] -> float32 [B, E]."""
        x = self.text_projection(self.textual(tokens))  # [B, E]
        return F.normalize(x.float(), dim=-1)  # [B, E]

    @torch.no_grad()
    def bound_temperature(self):
        """Clamp the temperature to 0.01 ... 1, as CLIP does after each update; -> the temperature,
        []."""
        self.logit_scale.clamp_(0, math.log(100))
        return 1 / self.logit_scale.exp().double()  # []

    def forward(self, clips, tokens, keys):
        """-> features of clips and texts, [B, E] each, and 1 / temperature, []."""
        return self.encode_video(clips, keys), self.encode_text(tokens), self.logit_scale.exp()


class VideoClassifier(nn.Module):
    """The video encoder, dropout, and one linear layer to the actions in place of the projection
    (App. B.3)."""

    def __init__(self, visual, classes, dropout=0.0):
        super().__init__()
        self.visual, self.embed_dim, self.dropout = visual, visual.width, dropout
        self.head = nn.Linear(visual.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def encode_video(self, clips, keys=None):
        """Clips 0-255 [B, T, C, H, W] -> [B, D]; keys int64 [B] in training."""
        return self.visual(clips, keys)  # [B, D]

    def forward(self, clips, keys=None):
        """Clips 0-255 [B, T, C, H, W] -> logits [B, A]; keys int64 [B] in training."""
        x = self.encode_video(clips, keys)  # [B, D]
        if keys is not None and self.dropout:
            kept = uniform(keys, "dropout", x.shape[1]) >= self.dropout  # [B, D]
            x = x * kept / (1 - self.dropout)  # [B, D]
        return self.head(x)  # [B, A]


def build(cfg, style, vocabulary=49408, classes=0):
    """The model that a Config describes: VideoClassifier for cross-entropy, else VideoCLIP."""
    visual = VideoEncoder(
        cfg.model, cfg.frames, cfg.size, style, cfg.drop_path, cfg.patch_dropout,
        cfg.attention, cfg.grad_checkpoint,
    )  # fmt: skip
    if cfg.loss == "cross_entropy":
        return VideoClassifier(visual, classes, cfg.dropout)
    textual = TextEncoder(cfg.model, vocabulary, 77, style, cfg.attention, cfg.grad_checkpoint)
    frozen = cfg.freeze_temperature or cfg.loss == "max_margin"  # which has no temperature
    return VideoCLIP(visual, textual, cfg.embed_dim, frozen)


# ---- Text ----------------------------------------------------------------------------------------

# Each byte as a printable character, as GPT-2 and CLIP write them in the file; the order is that of
# their ids.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {byte: chr(byte) for byte in _PRINTABLE}
_BYTES |= {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
_SYMBOLS = [*_BYTES.values(), *(f"{symbol}</w>" for symbol in _BYTES.values())]


def read_merges(path):
    """The merges, `left right` strings, of CLIP's file (gzip or plain; the first line is a header);
    UserError."""
    known = set(_SYMBOLS)
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        lines = raw.decode().split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--merges {path}: can't be read ({error})") from None
    lines = lines[1 : 1 + 49152 - 256 - 2]  # CLIP uses no more of its file
    merges = list(filter(None, lines))
    for line in merges:
        left, _, right = line.partition(" ")
        if left not in known or right not in known:
            raise UserError(f"--merges {path}: {line[:40]!r} is not two symbols known by then")
        known.add(left + right)
    if not any(line.endswith("</w>") for line in merges):
        raise UserError(
            f"--merges {path}: no merge ends a word (</w>), so it is not CLIP's "
            "bpe_simple_vocab_16e6"
        )
    return merges


# Curly quotes -> straight ones, as CLIP's cleaning (ftfy) has them: "don\u2019t" is "don't".
_CURLY = "\u02bc\u2018\u2019\u201a\u201b", "\u201c\u201d\u201e\u201f"  # single, double
_STRAIGHT = str.maketrans(_CURLY[0] + _CURLY[1], "'" * 5 + '"' * 4)


# Unicode's white space (Python's has \x1c-\x1f too); and U+0345, which CLIP drops because its
# pattern ignores case.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\u0345"
# What CLIP cuts a text into: its own two marks, English endings, letters, single digits, and runs
# of anything else (marks, emoji).
_WORDS = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:[sſtmd]|re|ve|ll)|"
    rf"[^\W\d_]+|\d|(?:[^\w{_SPACE}]|_)+"
)


class BPETokenizer:
    """CLIP's byte-pair encoding (Sennrich et al. 2016): text -> ids, equal to CLIP's after its
    cleaning of the text.

    A word is its UTF-8 bytes, the last one marked </w>; the pair of neighbours that comes first in
    the list of merges becomes one symbol, again and again. Cleaning: HTML entities, straight
    quotes, NFC, white space, lower case; ftfy's other repairs are missing. merges: path of CLIP's
    file, or its lines; without any, ids are bytes.
    """

    def __init__(self, merges=(), context=77):
        self.merges = read_merges(merges) if isinstance(merges, (str, Path)) else list(merges)
        self.context = context
        self.ranks = {tuple(pair.split(" ")): n for n, pair in enumerate(self.merges)}
        vocabulary = _SYMBOLS + [pair.replace(" ", "") for pair in self.merges]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {symbol: n for n, symbol in enumerate(vocabulary)}
        self.size = len(vocabulary)
        self.start = self.ids["<|startoftext|>"]
        self.end = self.ids["<|endoftext|>"]
        self.word_ids = lru_cache(1 << 18)(self._word_ids)

    def _word_ids(self, word):
        """The ids of one word, a tuple."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.ids[word],)
        parts = [_BYTES[byte] for byte in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged = parts[:1]
            for part in parts[1:]:
                if (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(self.ids[part] for part in parts)

    def encode(self, text):
        """The ids of a text, a list, without start and end."""
        text = html.unescape(html.unescape(text))
        if not text.isascii():
            text = unicodedata.normalize("NFC", text.translate(_STRAIGHT))
            # To CLIP a number is a word, to Python's patterns only a digit is: not a Roman one.
            numbers = {c for c in text if unicodedata.category(c) in ("Nl", "No")}
            text = "".join(f" {c} " if c in numbers else c for c in text)
        words = _WORDS.findall(text.strip().lower())
        return [i for word in words for i in self.word_ids(word)]

    def __call__(self, texts):
        """int64 [B, L] of texts: start, ids, end, zeros; a text that is too long is cut and keeps
        its end. L is what the longest needs, rounded up to 16, at most the context of 77:
        nothing behind the end is ever looked at."""
        rows = [[self.start, *self.encode(text)[: self.context - 2], self.end] for text in texts]
        length = min(self.context, -(-max(map(len, rows)) // 16) * 16)
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])  # [B, L]


def text_ids(tokens, context=77):
    """int64 [B], equal for equal texts: a hash of their tokens, int64 [B, L]."""
    # To one length, [B, context], as micro-batches differ in L and zeros count in the hash.
    tokens = F.pad(tokens, (0, context - tokens.shape[1]))
    return common.make_key(*tokens.T)  # [B]


# ---- Narrations and their classes ----------------------------------------------------------------


def relevancy(verbs, nouns, other_verbs, other_nouns):
    """How well sentences fit clips by their classes, c = 1/2 [same verb] + 1/2 IoU of noun sets:
    float64 [B, S].

    verbs int [B], [S]; nouns, sets as 0 and 1, float32 [B, n], [S, n] (EK-100's definition; Damen
    et al., Wray et al.).
    """
    shared = nouns @ other_nouns.T  # [B, S]
    union = nouns.sum(1)[:, None] + other_nouns.sum(1) - shared  # [B, S]
    overlap = shared.double() / union.clamp(min=1)  # [B, S]
    overlap = torch.where(union > 0, overlap, 1.0)  # [B, S]; two without nouns are alike
    return 0.5 * (verbs[:, None] == other_verbs).double() + 0.5 * overlap  # [B, S]


class Narrations(data.Captions):
    """Captioned clips, and what retrieval asks of their verbs and nouns, where they have them
    (EK-100)."""

    @cached_property
    def verb(self):
        """A number for the verb of each of the `actions`, int64 [actions]."""
        return data.numbered(str(name).partition(":")[0] for name in self.actions)

    @cached_property
    def nouns(self):
        """The noun sets as 0 and 1, float32 [sets, n]."""
        columns = dict.fromkeys(chain(*self.noun_sets))  # each noun once, as they first come
        rows = [[noun in noun_set for noun in columns] for noun_set in self.noun_sets]
        return torch.tensor(rows, dtype=torch.float32)  # [sets, n]

    def digest(self):
        """Captions.digest(), and of the actions and all nouns."""
        actions = data.Strings([super().digest(), *map(str, self.actions)])
        return data.digest(actions, self.action, self.noun_set, self.nouns)

    @cached_property
    def sentences(self):
        """The entries, int64 [S], whose texts clips are compared with: those of <list>_sentence.csv
        where EK-100's lies beside the list, else the first of each text. And, as in EK-100's own
        file, the first of each verb and set of nouns that none of these has (7 of its 3,842:
        their text stands for others already). So each clip has something to find: a sentence of
        relevancy 1."""
        path = Path(self.paths[0])
        path = path.with_name(f"{path.stem}_sentence.csv")
        if len(self.paths) == 1 and len(self.narration_ids) == len(self) and path.exists():
            chosen = self._published_sentences(path)
        else:
            first = {}
            for i in range(len(self)):
                first.setdefault(self.text(i), i)
            chosen = list(first.values())
        if self.classified:
            noun_set = torch.from_numpy(self.noun_set)  # [entries]
            classes = (self.verb[self.action] * len(self.nouns) + noun_set).tolist()  # [entries]
            found = {classes[i] for i in chosen}
            for i, pair in enumerate(classes):
                if pair not in found:
                    found.add(pair)
                    chosen.append(i)
        return torch.tensor(chosen)

    def _published_sentences(self, path):
        """The entries that EK-100's file of sentences names, in its order; without those that the
        list left out."""
        place = {name: i for i, name in enumerate(self.narration_ids)}
        chosen, unknown = [], []
        for where, row in data.read_table(path):
            name = row.get("narration_id")
            if name in place:
                chosen.append(place[name])
            else:
                unknown.append(f"{where}: narration {name!r} is not in {self.path}")
        if len(unknown) > len(self.left_out):
            raise UserError(unknown[0])
        return chosen

    def relevancy(self, rows, columns):
        """Relevancy of entries `columns` [S] to entries `rows` [B]: float64 [B, S]. Without classes
        1 where they have the same text, else 0."""
        if not self.classified:
            texts = [self.text(int(i)) for i in (*rows, *columns)]
            ids = data.numbered(texts)  # [B + S]
            return (ids[: len(rows), None] == ids[len(rows) :]).double()  # [B, S]
        return relevancy(*self._verbs_and_nouns(rows), *self._verbs_and_nouns(columns))  # [B, S]

    def _verbs_and_nouns(self, entries):
        """int64 [B], float32 [B, n]."""
        return self.verb[self.action[entries]], self.nouns[self.noun_set[entries]]


class Actions:
    """Classes `verb:noun`: `names`, sorted as strings (3,806 in EK-100); `verb` and `noun`, int64
    [A], what to marginalise to; `texts`, the distinct narrations of each in `lists`."""

    def __init__(self, names=(), lists=()):
        texts = {name: {} for name in names}
        for entries in lists:
            if not entries.classified:
                raise UserError(
                    f"{entries.path}: not all of its narrations have a verb and a noun class"
                )
            for i, action in enumerate(entries.action.tolist()):
                texts.setdefault(entries.actions[action], {})[entries.text(i)] = None
        self.names = list(names) or sorted(texts)
        self.texts = [list(texts[name]) for name in self.names]
        self.verb = data.numbered(name.partition(":")[0] for name in self.names)
        self.noun = data.numbered(name.partition(":")[2] for name in self.names)

    def labels(self, entries):
        """The class of each entry of a Narrations, int64 [entries]; UserError where its action is
        none."""
        place = {name: i for i, name in enumerate(self.names)}
        try:
            return np.array([place[name] for name in entries.actions])[entries.action]
        except KeyError as error:
            raise UserError(
                f"{entries.path}: action {error} is none of the {len(place)} classes; see --actions"
            ) from None

    def hits(self, probabilities, labels):
        """Whether the likeliest action, verb, noun is right: [B, A], int64 [B] -> bool [B, 3]."""
        right = [probabilities.argmax(1) == labels]
        for groups in (self.verb.to(labels.device), self.noun.to(labels.device)):
            right.append(marginalise(probabilities, groups).argmax(1) == groups[labels])
        return torch.stack(right, 1)


def marginalise(probabilities, groups):
    """Probabilities of groups of classes, such as an action's verb (App. B.3): [B, A], int64 [A] ->
    [B, groups]."""
    sums = probabilities.new_zeros(len(probabilities), int(groups.max()) + 1)  # [B, groups]
    return sums.index_add_(1, groups, probabilities)


def training_texts(videos, index, keys, related=False, min_relevancy=0.1):
    """A text for each clip, entries `index` [B] of a list, drawn by `keys` [B]: one of its own
    phrasings; if `related`, any sentence of the list above this relevancy to it."""
    draws = list(zip(index.tolist(), uniform(keys, "text").tolist(), strict=True))
    if not related:
        return [videos.text(i, u) for i, u in draws]
    fits = videos.relevancy(index, videos.sentences) > min_relevancy  # [B, S]  # DECISION (text)
    texts = []
    for (i, u), fitting in zip(draws, fits, strict=True):
        chosen = videos.sentences[fitting].tolist()
        if chosen:
            texts.append(videos.text(chosen[int(u * len(chosen))]))
        else:
            texts.append(videos.text(i, u))
    return texts


# ---- Evaluation ----------------------------------------------------------------------------------


def class_vectors(model, texts, encode):
    """What a clip's features are multiplied with, a vector a class: a classifier's weights [A, D];
    zero-shot, the mean feature of the texts of each class (a list of lists), [A, E]. encode: see
    `evaluate`."""
    if not isinstance(model, VideoCLIP):
        return model.head.weight.detach().cpu()  # [A, D]
    encoded = encode([*chain(*texts)])  # [texts, E]
    parts = encoded.split([len(part) for part in texts])
    means = torch.stack([part.mean(0) for part in parts])  # [A, E]  # DECISION (prompts)
    return F.normalize(means, dim=-1)  # [A, E]


@torch.no_grad()
def class_logits(model, features, vectors):
    """Logits [V, A], on the CPU, of features [V, E] or [V, D] and class_vectors [A, the same]."""
    features = features.float().cpu()
    with torch.autocast("cpu", enabled=False):  # float32, also where the model is in half precision
        if isinstance(model, VideoCLIP):
            return model.logit_scale.exp().cpu() * features @ vectors.T  # [V, A]
        return F.linear(features, vectors, model.head.bias.cpu())  # [V, A]


def _queries(similarity, relevancy):
    """(similarities, relevancies in float64) of each query, [S] each: a query at a time, so that
    a matrix as large as EK-100's costs little memory beside itself."""
    similarity = np.asarray(similarity)
    relevancy = np.asarray(relevancy, np.float64)
    if similarity.shape != relevancy.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity is {similarity.shape}, relevancy {relevancy.shape}; both should be [Q, S]"
        )
    return zip(similarity, relevancy, strict=True)


def mean_average_precision(similarity, relevancy):
    """mAP of queries (rows) over items (columns), [Q, S] each, as EK-100's official code has it ->
    float.

    Items of relevancy 1 are the hits, but precision at rank k is the sum of all relevancies up to
    k, fractions too, over k: AP = sum over hits of that, over the number of hits. Ties fall as
    there. ValueError: a query without a hit.
    """
    found = []
    rank = np.arange(1, similarity.shape[1] + 1)  # [S]
    for query, (s, r) in enumerate(_queries(similarity, relevancy)):
        ranked = r[(-s).argsort()]  # [S]
        hits = ranked == 1  # [S]
        if not hits.any():
            raise ValueError(f"query {query} has no item of relevancy 1: its AP is not defined")
        precision = ranked.cumsum() / rank  # [S]
        found.append((precision * hits).sum() / hits.sum())
    return float(np.mean(found))


def ndcg(similarity, relevancy):
    """nDCG of queries (rows) over items (columns), [Q, S] each, as EK-100's official code has it ->
    float.

    Sum of relevancy / log2(1 + rank) over as many ranks as the query has items of relevancy > 0,
    over the same in the best order. Ties fall as there. ValueError: a query without such an item.
    """
    found = []
    discount = np.log2(np.arange(2, similarity.shape[1] + 2))  # [S]
    for query, (s, r) in enumerate(_queries(similarity, relevancy)):
        ranked = r[s.argsort()[::-1]]  # [S]
        best = np.sort(r)[::-1]  # [S]
        if best[0] <= 0:
            raise ValueError(f"query {query} has no relevant item: its nDCG is not defined")
        found.append((ranked * (best > 0) / discount).sum() / (best / discount).sum())
    return float(np.mean(found))


def retrieval_metrics(similarity, relevancy, fractions=True):
    """mAP, nDCG and (not the paper's) R@1 in % of clips (rows) and texts (columns), [V, S]: video
    to text, text to video, their mean. fractions: whether mAP counts relevancies below 1, as
    EK-100's does."""
    exact = (relevancy == 1).double()  # [V, S]
    result = {}
    for name, metric, relevant in (
        ("map", mean_average_precision, relevancy if fractions else exact),
        ("ndcg", ndcg, relevancy),
    ):
        to_text = 100 * metric(similarity, relevant)
        to_video = 100 * metric(similarity.T, relevant.T)
        result[f"val_{name}"] = (to_text + to_video) / 2
        result[f"val_{name}_v2t"] = to_text
        result[f"val_{name}_t2v"] = to_video
    for name, s, relevant in (("v2t", similarity, exact), ("t2v", similarity.T, exact.T)):
        result[f"val_r1_{name}"] = 100 * relevant.gather(1, s.argmax(1, keepdim=True)).mean().item()
    return result


def retrieval(features, rows, videos, encode):
    """retrieval_metrics of clips, entries `rows` [V] of a list, whose features [V, E] are given,
    and of its sentences. encode: see `evaluate`."""
    columns = videos.sentences  # [S]
    relevant = videos.relevancy(rows, columns)  # [V, S]
    found = (relevant == 1).any(0)  # [S]: not those of clips that could not be read
    columns = columns[found]
    relevant = relevant[:, found]
    texts = [videos.text(i) for i in columns.tolist()]
    similarity = features @ encode(texts).T  # [V, S]
    shuffled = similarity[common.permutation(common.make_key(0), "shuffle", len(rows))]  # [V, S]
    fractions = bool(videos.narration_ids)  # EK-100's lists have them
    result = retrieval_metrics(similarity, relevant, fractions)
    chance = retrieval_metrics(shuffled, relevant, fractions)
    return result | {"shuffled_map": chance["val_map"], "shuffled_ndcg": chance["val_ndcg"]}


@torch.no_grad()
def evaluate(model, features, rows, videos, actions, encode):
    """Retrieval and, where the list has classes, zero-shot accuracy, of a VideoCLIP; accuracy of a
    VideoClassifier.

    All in %, of clips, entries `rows` [V] of `videos`, whose features [V, E] or [V, D] are given;
    texts are its `sentences`. `shuffled_` is what the metrics give when clips are mixed up.
    encode(list of texts) -> float32 [texts, E], on the CPU.
    """
    result = {}
    if isinstance(model, VideoCLIP):
        result |= retrieval(features, rows, videos, encode)
    if actions:
        vectors = class_vectors(model, actions.texts, encode)  # [A, E] or [A, D]
        logits = class_logits(model, features, vectors)  # [V, A]
        labels = torch.as_tensor(actions.labels(videos))[rows]  # [V]
        hits = actions.hits(logits.softmax(-1), labels).double().mean(0)  # [3]
        result |= zip(("val_action", "val_verb", "val_noun"), (100 * hits).tolist(), strict=True)
    return result


# ---- Weights -------------------------------------------------------------------------------------


def read_init(path):
    """What --init holds, told apart by content: {"model": weights by our names, "style": a key of
    STYLES} and, of a checkpoint of ours, the rest of it. No code of it is run; UserError where
    it is none of the known forms."""
    state = common.read_state(path)
    if isinstance(state, dict) and {"model", "config"} <= state.keys():
        if "style" not in state:
            raise UserError(f"{path}: not a checkpoint of avion.py")
        return state
    weights = common.weights_of(state, path)
    return {"model": common.clip_weights(weights), "style": style_of(weights, path)}


def style_of(state, path):
    """The style of published weights: by their names; of CLIP's by the config.json beside them."""
    marks = ("temporal_embedding", "image_projection", "fc_cls.weight")
    if any(name.endswith(marks) for name in state):
        return "avion"  # DECISION (style)
    act = common.hub_setting(path, "hidden_act", "")
    return "gelu" if act == "gelu" else "clip"


def fit_weights(start, net, path):
    """The weights of read_init(path) as `net` takes them. PE_t is stretched to its frames, and zero
    of CLIP, which has none; CLIP's projections and temperature are left out unless `net` has
    CLIP's embed_dim; a classifier takes the video encoder, and a head of as many classes."""
    weights = dict(start["model"])
    own = net.state_dict()
    if "visual.patch_embed.weight" in weights:
        zeros = torch.zeros(1, net.visual.width)  # [1, D]  # DECISION (temporal)
        time = weights.get("visual.temporal_embedding", zeros)  # [before, D]
        steps = len(net.visual.temporal_embedding)
        weights["visual.temporal_embedding"] = stretch_time(time, steps)  # [steps, D]
    projection = weights.get("visual_projection.weight", ())
    if "config" not in start and start["style"] != "avion" and len(projection) != net.embed_dim:
        for name in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
            weights.pop(name, None)
    if "head.weight" in own:
        kept = ["visual."]
        if weights.get("head.weight", torch.empty(0)).shape == own["head.weight"].shape:
            kept.append("head.")
        return {name: x for name, x in weights.items() if name.startswith(tuple(kept))}
    tokens = len(weights.get("textual.token_embedding.weight", ()))
    ours = len(own["textual.token_embedding.weight"])
    if tokens not in (0, ours):
        raise UserError(
            f"{path}: its texts have {tokens} different tokens, this run's {ours}: --merges takes "
            "CLIP's file, bpe_simple_vocab_16e6.txt.gz"
        )
    return weights


# ---- The plan ------------------------------------------------------------------------------------


def part_megabytes(part, width, tokens):
    """MB that a part of a block stores for the backward pass of one clip in fp32: a N + b N^2, from
    two small N, because the real one may take gigabytes."""
    one, two = (common.saved_bytes(part, torch.randn(1, n, width)) for n in (64, 128))
    square = (two - 2 * one) / (128**2 - 2 * 64**2)
    return ((one / 64 - 64 * square) * tokens + square * tokens**2) / 1e6


def saved_megabytes(model, tokens):
    """MB that the video encoder's blocks store for the backward pass of one clip in fp32, {kind:
    [LayerNorm, attention, MLP]}, from the parts of real blocks on the CPU (Fig. 3; GELU, as
    measured there). "plain" and "sdpa": kinds of attention. "checkpoint": SDPA, all blocks' inputs,
    and one block's parts while that is recomputed."""
    width, depth, heads = (MODELS[model][key] for key in ("width", "depth", "heads"))
    sizes = {}
    for kind in ("plain", "sdpa"):
        block = Block(width, heads, kind=kind)
        norms = 2 * part_megabytes(block.norm1, width, tokens)
        attn = part_megabytes(block.attn, width, tokens)
        mlp = part_megabytes(block.mlp, width, tokens)
        sizes[kind] = [depth * norms, depth * attn, depth * mlp]
    # The parts are SDPA's, the loop's last kind.
    sizes["checkpoint"] = [norms + depth * tokens * width * 4 / 1e6, attn, mlp]
    return sizes


def memory(cfg, net, tokens):
    """The common.Phase of training `net`, for common.print_memory. tokens: a clip's, as kept."""
    values = 3 * cfg.frames * cfg.size**2
    pixels = common.pixel_bytes(mixup=cfg.mixup) * values
    passed = [(net.visual.blocks, (tokens, MODELS[cfg.model]["width"]))]
    if not isinstance(net, VideoCLIP):
        return common.plan_phase(cfg, cfg.recipe, net, pixels, passed)
    passed.append((net.textual.blocks, (77, MODELS[cfg.model]["text"][0])))
    phase = common.plan_phase(cfg, cfg.recipe, net, pixels, passed)
    # All clips of a step wait for their turn, as bytes.
    return phase._replace(state=phase.state + cfg.batch_size / cfg.gpus * values)


def print_figure_3(model, tokens):
    print(
        "MB that the video encoder's blocks save a clip for backward, in fp32 (Fig. 3; fp16: half)"
    )
    columns = " ".join(f"{column:>10}" for column in ("LayerNorm", "attention", "MLP", "all"))
    print(f"{'':<24} {columns} {'attention %':>12}")
    names = {"plain": "plain", "sdpa": "memory-efficient", "checkpoint": "efficient, recomputed"}
    for kind, sizes in saved_megabytes(model, tokens).items():
        cells = " ".join(f"{n:10.1f}" for n in [*sizes, sum(sizes)])
        print(f"{names[kind]:<24} {cells} {100 * sizes[1] / sum(sizes):12.1f}")


def print_plan(cfg):
    """What would run, counted on the model itself: no data, no GPU, no training (--plan)."""
    with torch.device("meta"):
        net = build(cfg, "clip", classes=cfg.num_classes or 2)
        forward = common.clip_macs(net.visual, cfg.frames, cfg.size)
        macs = f"{forward:.2f} of a clip, forward"
        if isinstance(net, VideoCLIP):
            words = torch.zeros(1, 77, dtype=torch.int64)
            text = common.count_macs(net.textual, words)
            macs += f"; {text:.2f} of a text of 77 tokens"
            forward += text
    tokens = cfg.frames // net.visual.patch[0] * (cfg.size // net.visual.patch[1]) ** 2
    kept = 1 + num_kept(tokens, cfg.patch_dropout)
    steps = cfg.max_steps or cfg.train_clips // cfg.batch_size * cfg.epochs
    chunk = data.largest_chunk(cfg.batch_size, 1, 500, 4)  # Sec. 4.3: at 1,024 clips 16 s
    print(
        f"model     {cfg.model}: {common.millions(net):.1f} M parameters, "
        f"{common.millions(net.visual):.1f} M of them the video encoder's\n"
        f"tokens    {kept} of a clip in training: CLS and {kept - 1} of {tokens} patches\n"
        f"schedule  {cfg.loss}, {cfg.epochs} epochs of {cfg.train_clips} clips at batch "
        f"{cfg.batch_size}: {steps} steps, {cfg.optimizer}, peak lr {cfg.lr:g}\n"
        f"GMACs     {macs}\n"
        "Eq. 3     a disk of 500 MB/s serves this batch, at 1 Mbit/s a video and 4 s a step, in "
        f"chunks of up to {chunk:.1f} s\n"
    )
    print_figure_3(cfg.model, kept)
    common.print_memory(cfg, [memory(cfg, net, kept)])
    passes = 4 if cfg.grad_checkpoint else 3  # forward 1, backward 2; recomputed 1
    if isinstance(net, VideoCLIP) and 0 < cfg.micro_batch < cfg.batch_size // cfg.gpus:
        passes += 1  # common.cached_step's first
    data.print_cores([(cfg.frames, passes * forward, 1)])


# ---- The tasks -----------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that can't work, by the flag's name, before anything is read or made."""
    common.check_flags(cfg, MODELS[cfg.model]["patch"])
    tubelet = MODELS[cfg.model].get("tubelet", 1)
    if cfg.frames % tubelet or cfg.eval_frames % tubelet:
        raise UserError(
            f"--frames and --eval-frames must be multiples of {tubelet}, the frames of a token of "
            f"--model {cfg.model}"
        )
    if cfg.contrastive and (cfg.mixup or cfg.cutmix or cfg.dropout or cfg.label_smoothing):
        raise UserError(
            "--mixup, --cutmix, --dropout and --label-smoothing are for --loss cross_entropy: "
            "a text can't be mixed"
        )
    if cfg.contrastive and cfg.batch_size < 2:
        raise UserError(
            f"--batch-size {cfg.batch_size} has no negatives; --loss {cfg.loss} compares clips"
        )
    if cfg.task == "search" and not cfg.query.strip():
        raise UserError('--task search needs --query "what to look for"')
    if cfg.task == "predict" and not cfg.input:
        raise UserError("--task predict needs --input video.mp4 ...")
    pretrained = [name for name in RECIPES if name.startswith("ego4d")]
    tuned = [name for name in RECIPES if name.startswith("ek100")]
    common.need_init(cfg, pretrained, "CLIP's weights")
    common.need_init(cfg, tuned, "weights trained on Ego4D")


def open_list(cfg, flag, ctx):
    """Narrations of the lists of --train-list or --val-list."""
    if flag == "--train-list":
        paths, root = cfg.train_list, cfg.data_root
    else:
        paths, root = (cfg.val_list,), cfg.val_root or cfg.data_root
    for path in paths or ("",):
        data.need_list(flag, path, ctx, "a list of narrated clips, .pkl, .csv or .jsonl")
    return data.read_captions(paths, root, cfg.max_bad, kind=Narrations, ctx=ctx)


def open_lists(cfg, ctx):
    """(training, validation) Narrations, Actions or None."""
    videos = open_list(cfg, "--train-list", ctx)
    val_videos = open_list(cfg, "--val-list", ctx)
    actions = open_actions(cfg, [val_videos] if cfg.contrastive else [videos, val_videos])
    # What evaluation needs is opened now, so that what is wrong is said now, and not after an
    # epoch.
    data.need_videos(val_videos, cfg.max_bad, "--val-root" if cfg.val_root else "--data-root")
    if actions:
        actions.labels(val_videos)
    if not cfg.contrastive:
        videos.labels = actions.labels(videos)
    return videos, val_videos, actions


def open_actions(cfg, lists):
    """The classes: of --actions, else of all `lists` given; None where these have none and need
    none."""
    if not cfg.actions and cfg.contrastive and not all(videos.classified for videos in lists):
        return None
    if cfg.actions:
        lists = [data.read_captions(cfg.actions, max_bad=cfg.max_bad, kind=Narrations)]
    actions = Actions(lists=lists)
    if not cfg.contrastive and cfg.num_classes not in (0, len(actions.names)):
        raise UserError(
            f"--num-classes {cfg.num_classes}: the lists have {len(actions.names)} actions; "
            "EK-100's 3,806 are those of training and validation together, which --actions can name"
        )
    return actions


def clips_of(cfg, videos, train):
    """The clips of a list: random ones to train on, or the centre of each narration."""
    frames = cfg.frames if train else cfg.eval_frames or cfg.frames
    plan = partial(
        sample_clip,
        videos=videos,
        frames=frames,
        train=train,
        crop=train and cfg.crop,
        crop_min=cfg.crop_min,
    )
    reader = data.WholeFrames if cfg.loader == "decode_then_crop" else data.Video
    return data.ClipDataset(
        videos, plan, cfg.size, cfg.seed, replace=train, frames=frames, reader=reader
    )


def encode_clips(cfg, ctx, model, videos):
    """-> (features of a list's centre clips that could be read, float32 [V, E], of a classifier
    [V, D]; their entries, int64 [V]; a line for each of the others), on the CPU. Ranks share the
    work."""
    failures = common.Failures(len(videos), cfg.max_bad)
    clips = clips_of(cfg, videos, train=False)
    encode = lambda batch: model.encode_video(batch.clips)
    out = torch.zeros(len(videos), 1 + model.embed_dim, device=ctx.device)  # [all, E + 1]
    for index, x in data.each_video(cfg, ctx, clips, encode, failures):
        # The last column: it was read.
        out[index.to(ctx.device)] = F.pad(x.float(), (0, 1), value=1.0)  # [B, E + 1]
    out = ctx.sum(out).cpu()
    unread = failures.unread(ctx)
    (rows,) = out[:, -1].nonzero(as_tuple=True)  # [V]
    if not len(rows):
        raise UserError(f"no clip could be read: {'; '.join(unread[:3])}")
    return out[rows, :-1], rows, unread


@torch.no_grad()
def encode_texts(model, texts, tokenizer, ctx, size=256):
    """Features float32 [texts, E] on the CPU; ranks share the work."""
    out = torch.zeros(len(texts), model.embed_dim, device=ctx.device)
    for first in range(ctx.rank * size, len(texts), ctx.world * size):
        tokens = tokenizer(texts[first : first + size]).to(ctx.device)  # [b, L]
        with ctx.autocast():
            out[first : first + len(tokens)] = model.encode_text(tokens)
    return ctx.sum(out).cpu()


def validate(cfg, ctx, model, videos, actions, tokenizer):
    """`evaluate` the centre clips of a list; `val_unread` of them could not be read."""
    model.eval()
    features, rows, unread = encode_clips(cfg, ctx, model, videos)  # [V, E] or [V, D], [V]
    encode = partial(encode_texts, model, tokenizer=tokenizer, ctx=ctx)
    result = evaluate(model, features, rows, videos, actions, encode)
    model.train()
    return result | {"val_clips": len(rows), "val_unread": len(unread)}


def trained_model(cfg, state):
    """The model of a checkpoint of ours."""
    tokenizer = BPETokenizer(state["merges"])
    if cfg.merges and read_merges(cfg.merges) != tokenizer.merges:
        raise UserError(
            f"it was trained with other merges than --merges {cfg.merges}; leave that flag out"
        )
    return build(cfg, state["style"], tokenizer.size, len(state["classes"]))


def published_model(cfg, start, vocabulary):
    """(cfg, model) of published weights, as read_init has them; what they tell of its shape goes
    before the flags. vocabulary: how many tokens texts have."""
    weights = start["model"]
    if "head.weight" in weights:
        cfg = replace(cfg, loss="cross_entropy", num_classes=len(weights["head.weight"]))
    elif "visual_projection.weight" in weights:
        cfg = replace(cfg, loss="infonce", embed_dim=len(weights["visual_projection.weight"]))
    net = build(cfg, start["style"], vocabulary, cfg.num_classes)
    weights = fit_weights(start, net, cfg.init)
    common.load_weights(net, weights, cfg.init)
    missing = [name for name in net.state_dict() if name not in weights and name != "logit_scale"]
    if missing:
        raise UserError(
            f"{cfg.init}: has no {missing[0]} that fits; its --embed-dim and --loss must be the "
            "file's"
        )
    return cfg, net.eval()


def open_model(cfg, ctx):
    """(cfg, model, tokenizer, names of its classes) of a trained or a published model."""
    start = read_init(cfg.init)
    if "config" in start:
        settings = "model", "frames", "size", "embed_dim", "loss", "seed"
        more = "style", "merges", "classes"
        cfg, net, _ = common.open_trained(cfg, "avion.py", settings, more, trained_model, start)
        tokenizer = BPETokenizer(start["merges"])
    else:
        tokenizer = BPETokenizer(cfg.merges or ())
        cfg, net = published_model(cfg, start, tokenizer.size)
    return cfg, net.to(ctx.device), tokenizer, start.get("classes", ())


def use(cfg, ctx):
    """--task eval, predict, features, search: a trained or published model."""
    cfg, net, tokenizer, names = open_model(cfg, ctx)
    if cfg.task == "search":
        return search(cfg, ctx, net, tokenizer)
    if cfg.task == "predict":
        return predict(cfg, ctx, net, tokenizer, names)
    videos = open_list(cfg, "--val-list", ctx)
    if cfg.task == "features":  # of length 1, or CLS of a classifier
        clips = clips_of(cfg, videos, train=False)
        encode = lambda batch: net.encode_video(batch.clips)
        return data.write_features(cfg, ctx, clips, encode, net.embed_dim)
    actions = Actions(names) if names else open_actions(cfg, [videos])
    result = validate(cfg, ctx, net, videos, actions, tokenizer)
    common.print_result(cfg, ctx, result)


def predict(cfg, ctx, net, tokenizer, names):
    """Print the five likeliest actions of each --input video; of a VideoCLIP, the closest
    narrations of --val-list."""
    if isinstance(net, VideoCLIP):
        listed = open_list(cfg, "--val-list", ctx)
        names = [listed.text(i) for i in listed.sentences]
    elif not names:
        lists = [] if cfg.actions else [open_list(cfg, "--val-list", ctx)]
        names = open_actions(cfg, lists).names
    videos = data.Captions((path, 0.0, math.inf, "") for path in cfg.input)
    encode = partial(encode_texts, net, tokenizer=tokenizer, ctx=ctx)
    vectors = class_vectors(net, [[name] for name in names], encode)  # [A, E] or [A, D]

    def shares(batch):  # [B, A]
        return class_logits(net, net.encode_video(batch.clips), vectors).softmax(-1)

    data.print_predictions(cfg, ctx, clips_of(cfg, videos, train=False), shares, names)


def search(cfg, ctx, net, tokenizer):
    """Print the ten clips of --window seconds that fit --query best, with their scores (cosines),
    times and videos, out of --input, else of the videos of --val-list; of clips that overlap,
    the best."""
    if not isinstance(net, VideoCLIP):
        raise UserError(
            "--task search needs a model with a text encoder, not one of --loss cross_entropy"
        )
    paths = cfg.input
    if not paths:
        listed = open_list(cfg, "--val-list", ctx)
        paths = dict.fromkeys(map(listed.video, range(len(listed))))
    windows = []
    for path in paths:
        windows += windows_of(path, cfg.window)
    features, rows, _ = encode_clips(cfg, ctx, net, data.Captions(windows))  # [V, E], [V]
    scores = features @ encode_texts(net, [cfg.query], tokenizer, ctx)[0]  # [V]
    shown = []
    for i in scores.argsort(descending=True).tolist():
        path, start, end, _ = windows[rows[i]]
        if any(path == p and start < e and s < end for p, s, e in shown):
            continue
        shown.append((path, start, end))
        if ctx.rank == 0:
            print(f"{scores[i]:.3f}  {start:7.1f} - {end:.1f} s  {path}")
        if len(shown) == 10:
            break


def windows_of(path, seconds):
    """Spans (path, start, end, "") of so many seconds that cover a video, each half over the one
    before."""
    try:
        with data.open_video(path) as video:
            end = video.clamp(math.inf)
    except data.VideoError as error:
        raise UserError(f"--input {error}") from None
    starts = np.arange(0.0, max(end - seconds / 2, 0.1), seconds / 2)
    return [(path, start, min(start + seconds, end), "") for start in starts.tolist()]


def open_start(cfg, run, classes):
    """(model, tokenizer, style) that a run begins with: of --init or from nothing; or that it goes
    on with."""
    start = run.state or (read_init(cfg.init) if cfg.init else {})
    merges = cfg.merges
    if run.state or not merges:
        merges = start.get("merges", ())
    tokenizer = BPETokenizer(merges)
    if cfg.contrastive and not tokenizer.merges:
        run.say(
            "no --merges: texts are read as bytes, which needs no file; CLIP's weights need CLIP's "
            "merges"
        )
    style = start.get("style", "clip")
    torch.manual_seed(cfg.seed)  # for the initial weights; all later draws are keyed
    net = build(cfg, style, tokenizer.size, classes)
    if cfg.init and not run.state:  # weights of run.state: run.prepare loads them
        loaded = common.load_weights(net, fit_weights(start, net, cfg.init), cfg.init)
        run.say(f"{loaded}; activation, eps, mean and std of pixels: {style}'s")
    return net, tokenizer, style


def parameter_groups(net, weight_decay, text_lr):
    """Optimizer groups; the text encoder's have the factor `text_lr` to the learning rate."""

    def layer_of(name):
        # A layer decay of two layers: 0, the text encoder, has text_lr ** 1; 1, all else, ** 0.
        return 0 if name.startswith("textual.") else 1

    return common.param_groups(net, weight_decay, text_lr, layer_of)  # DECISION (decay)


def learning_rate(step, total, warmup, start, peak, end):
    """Of step 0, 1, ...: from `start` in a line to `peak` in `warmup` steps, then half a cosine to
    `end` (App. B.2)."""
    rate = common.cosine(step, total, warmup, peak, end)
    if step < warmup:
        rate += start * (1 - step / warmup)
    return rate


# What the last line of a run shows of an evaluation.
SHOWN = (
    "val_map", "shuffled_map", "val_ndcg", "shuffled_ndcg", "val_r1_v2t", "val_r1_t2v",
    "val_action", "val_verb", "val_noun",
)  # fmt: skip


def say_result(run, metric):
    """The line that a run ends with."""
    last = run.at["last"]
    numbers = ", ".join(f"{name} {last[name]:.1f} %" for name in SHOWN if name in last)
    tasks = "eval, predict, features"
    if metric == "val_map":  # of a model that reads texts
        tasks = f"search --query, {tasks}"
    run.say(
        f"complete: {numbers} of {last['val_clips']} validation clips; best {metric} "
        f"{run.at['best']:.1f} %. {run.folder}/best.pt: --task {tasks}. --overwrite starts anew."
    )


@common.in_one_line
def main(cfg):
    check(cfg)
    cfg = common.settled(cfg, "avion")
    if cfg.plan:
        return print_plan(cfg)
    ctx = common.launch(cfg.precision)
    if cfg.task != "train":
        return use(cfg, ctx)
    micro, accumulation = common.micro_batches(cfg, ctx)
    videos, val_videos, actions = open_lists(cfg, ctx)
    classes = len(actions.names) if actions else 0
    sentences = len(val_videos.sentences) if cfg.contrastive else 0
    epoch_steps = common.steps_of_epoch(videos.path, len(videos), cfg.batch_size, what="clips")
    total = cfg.max_steps or cfg.epochs * epoch_steps
    warmup = cfg.warmup_epochs * epoch_steps

    run = common.Trainer(cfg, ctx, train_list=videos, val_list=val_videos)
    net, tokenizer, style = open_start(cfg, run, classes)
    net = net.to(ctx.device)
    groups = parameter_groups(net, cfg.weight_decay, cfg.text_lr)
    optimizer = common.optimizer(cfg.optimizer, groups, cfg.lr)
    names = () if cfg.contrastive else actions.names
    # run.model is then `net`, compiled and over ranks.
    run.prepare(net, optimizer, classes=names, merges=tokenizer.merges, style=style)
    run.say(
        f"{len(videos)} training and {len(val_videos)} validation clips, {sentences} sentences, "
        f"{classes} classes; batch {cfg.batch_size} = {ctx.world} ranks x {micro} clips x "
        f"{accumulation}; peak lr {cfg.lr:g}; {ctx.precision} on {ctx.device}; steps {run.step} to "
        f"{total}"
    )
    augment = data.flip if cfg.flip else None  # DECISION (classify)
    dataset = clips_of(cfg, videos, train=True)
    batches = data.training_batches(
        cfg, ctx, dataset, cfg.batch_size, micro, run.step, total, augment
    )
    run.begin(batches, cfg.batch_size, micro, epoch_steps, stop=total)
    metric = "val_map" if cfg.contrastive else "val_action"
    related = cfg.loss == "max_margin" and videos.classified
    loss_fn = partial(
        batch_loss, loss=cfg.loss, margin=cfg.margin, skip_duplicates=cfg.skip_duplicates
    )

    if run.evaluation_due():  # the run was stopped between a step and its evaluation
        run.evaluated(validate(cfg, ctx, net, val_videos, actions, tokenizer), metric)
    # run.update clips, steps, zeroes; run.end_step logs and saves: both are common.Trainer's.
    while run.step < total:
        if cfg.contrastive:  # a loss of the whole batch: all its clips wait, as uint8, for its step
            pairs = []
            for batch in run.micro_batches():
                texts = training_texts(videos, batch.index, batch.keys, related, cfg.min_relevancy)
                tokens = tokenizer(texts)  # [b, L]
                ids = batch.keys  # [b], all different, and not looked at
                if cfg.skip_duplicates:
                    ids = text_ids(tokens)  # [b]
                inputs = [data.to_device(x, ctx.device) for x in (batch.keys, tokens, ids)]
                pairs.append((batch.clips, *inputs))
            global_backward(run, pairs, loss_fn)
        else:  # a sum over clips: gradients of micro-batches add up
            for batch in run.micro_batches():
                labels = data.soft_labels(batch.labels, classes, cfg.label_smoothing)  # [b, A]
                step_key = cfg.seed, run.step
                clips, labels = data.mix(batch.clips, labels, step_key, cfg.mixup, cfg.cutmix)
                keys = data.to_device(batch.keys, ctx.device)  # [b]
                with run.forward():
                    logits = run.model(clips, keys)  # [b, A]
                    loss = F.cross_entropy(logits.float(), labels, reduction="none")  # [b]
                run.backward(loss)
        lr = learning_rate(run.step, total, warmup, cfg.start_lr, cfg.lr, cfg.min_lr)
        run.update(lr)
        if cfg.contrastive:
            temperature = net.bound_temperature()
            run.end_step(temperature=temperature)
        else:
            run.end_step()
        if run.evaluation_due():
            run.evaluated(validate(cfg, ctx, net, val_videos, actions, tokenizer), metric)

    say_result(run, metric)


if __name__ == "__main__":
    main(parse(Config, RECIPES))
