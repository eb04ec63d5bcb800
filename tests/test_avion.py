"""avion.py: each idea against a slow version, CLIP's features and token ids, metrics, formats, gradients, the CLI."""

import argparse
import csv
import dataclasses
import gzip
import html
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import unicodedata
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command

import avion
import common
import data
from common import UserError, make_key, uniform

# CLIP's merges and heads of EK-100's files, where they are at hand
FORMATS = Path(os.environ.get("FORMATS", ROOT.parent / "shared" / "formats"))
MERGES = FORMATS / "bpe_simple_vocab_16e6.txt.gz"
TINY = {"width": 64, "depth": 2, "heads": 1, "patch": 16, "text": (64, 2, 1)}
# Of 0-255 pixels, as OpenAI's CLIP and as AVION's released code (its red mean is another).
CLIP_MEAN, AVION_MEAN = (
    (122.7709383, 116.7460125, 104.09373615),
    (108.3272985, 116.7460125, 104.09373615),
)
STD = (68.5005327, 66.6321579, 70.32316305)
RUN = [
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--log-every",
    "1",
    "--epochs",
    "1",
    "--eval-every",
    "1",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Folder of a small toy `narrated` set: 3 training videos (24 captions), 1 for validation (8)."""
    return data.make_toy(tmp_path_factory.mktemp("told"), "narrated", counts={"train": 3, "val": 1})


@pytest.fixture
def args(told):
    """Flags that train on the small toy set."""
    lists = [
        "--train-list",
        told / "train.jsonl",
        "--val-list",
        told / "val.jsonl",
        "--data-root",
        told / "chunks",
    ]
    return [*map(str, lists), *RUN]


def config(*argv):
    return common.parse(avion.Config, avion.RECIPES, list(map(str, argv)))


def narrations(paths, root=""):
    return data.read_captions(paths, root, kind=avion.Narrations)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]


def refused(*argv):
    """The one line that avion.py's main ends with."""
    with pytest.raises(UserError) as error:
        avion.main(config(*argv))
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- tokenizer -------------------------------------------------------------------------------------------------------

SMALL_MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "1 2</w>", "s a"]


def test_merges_by_hand():
    """`the cat sat` with six merges; ids: 256 bytes, 256 at a word's end, merges, start, end."""
    tokenizer = avion.BPETokenizer(SMALL_MERGES)
    byte = lambda c: ord(c) - 33  # the first ids are the printable ASCII characters
    assert tokenizer.encode("The  cat sat") == [512 + 1, 512 + 3, 512 + 5, 256 + byte("t")]
    assert tokenizer.encode("12") == [
        256 + byte("1"),
        256 + byte("2"),
    ]  # numbers are cut into digits before merging
    assert (tokenizer.start, tokenizer.end, tokenizer.size) == (518, 519, 520)
    assert tokenizer(["the", "cat the"])[:, :5].tolist() == [
        [518, 513, 519, 0, 0],
        [518, 515, 513, 519, 0],
    ]


def test_bytes_without_a_file():
    """No merges: every byte of every word is an id, all texts can be read, different ones differ."""
    tokenizer = avion.BPETokenizer()
    assert tokenizer.encode("a é") == [
        256 + 64,
        tokenizer.ids[chr(0xC3)],
        tokenizer.ids[chr(0xA9) + "</w>"],
    ]
    assert tokenizer.size == 514 and tokenizer.encode("a red square") != tokenizer.encode(
        "a red circle"
    )


def test_truncation_keeps_the_end():
    tokenizer = avion.BPETokenizer(SMALL_MERGES)
    rows = tokenizer(["the " * 10_000, "the " * 75, "the " * 76, "cat"])
    assert rows.shape == (4, 77)
    assert (
        (rows[:3, 0] == 518).all() and (rows[:3, 76] == 519).all() and (rows[:3, 1:76] == 513).all()
    )
    assert tokenizer(["cat"]).shape == (1, 16) and tokenizer(["the " * 15]).shape == (1, 32)


def test_cleaning():
    """HTML entities twice, NFC, white space, lower case; marks and unknown characters are words of their own."""
    tokenizer = avion.BPETokenizer()
    same = lambda a, b: tokenizer.encode(a) == tokenizer.encode(b)
    assert (
        same("A &amp;amp; B", "a & b")
        and same("cafe\u0301", "CAF\u00c9")
        and same(" a\u3000\n b\t", "a b")
    )
    assert tokenizer.encode("e\u0301") == [
        tokenizer.ids[chr(0xC3)],
        tokenizer.ids[chr(0xA9) + "</w>"],
    ]  # one character
    assert not same("a b", "ab") and same("it's", "it 's") and same("３4", "３ 4")


CURLY = {"\u02bc": "'", "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'",
         "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u201f": '"'}  # fmt: skip  # as ftfy straightens them
DONT, QUOTED = (
    [328, 847, 713, 1038],
    [257, 320, 2368, 257],
)  # by ftfy 6.3 and transformers' CLIPTokenizer


@pytest.mark.skipif(not MERGES.exists(), reason="CLIP's merges file is not at hand")
def test_curly_quotes_are_straight():
    """CLIP's ids of `don't` and of `"a cat"`, however their quotes are typed."""
    tokenizer = avion.BPETokenizer(MERGES)
    for text in ("I don\u2019t know", "I don&rsquo;t know", "I don\u02bct know", "I don't know"):
        assert tokenizer.encode(text) == DONT, text
    for text in ("\u201cA cat\u201d", "\u201eA cat\u201f", "&ldquo;a cat&rdquo;", '"A cat"'):
        assert tokenizer.encode(text) == QUOTED, text
    straight = avion.BPETokenizer()
    for curly, plain in CURLY.items():
        assert straight.encode(f"a {curly}b{curly} c\xe9") == straight.encode(
            f"a {plain}b{plain} c\xe9"
        )
    assert straight.encode("5\u2032 6\u2033") != straight.encode(
        "5' 6\""
    )  # primes stay, as in ftfy


def odd_sentences(words, n):
    """Sentences of common words with odd things mixed in: scripts, digits, emoji, entities, controls, long runs."""
    rng = random.Random(0)
    odd = [
        "🎉🎊", "👩‍👩‍👧", "&lt;b&gt;", "&amp;quot;", "&#8217;s", "é", "e\u0301\u0323", "١٢٣", "४२", "Ⅷ", "½", "㊿",
        "漢字かな", "한국어", "don't", "'LL", "we've", "o'clock", "''s", "\x00\x01", "\x1c", "\x7f", "\u200b",
        "\u00ad", "a_b", "___", "...!?", "#tag", "http://x.y/z?q=1", "$9.99", "don\u2019t", "\u201ca\u201d", "\u2018\u201b",
        "İ", "ß", "ſ's", "\ufffd",
        "\U0001f1e9\U0001f1ea", "x" * 300, "!" * 200, "ab1" * 60, "\u0645\u0631\u062d\u0628\u0627",
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "A\u00a0B", "\u2028", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙",
    ]  # fmt: skip
    blocks = [
        chr(c)
        for c in range(0x2FFFF)
        if unicodedata.category(chr(c)) not in ("Cn", "Cs") and c != 0x345
    ]
    for i in range(n):
        parts = rng.choices(words, k=rng.randint(0, 9)) + rng.choices(odd, k=i % 3)
        parts.append("".join(rng.choices(blocks, k=i % 5)))
        rng.shuffle(parts)
        yield rng.choice([" ", "  ", "", "\t"]).join(parts)


@pytest.mark.skipif(not MERGES.exists(), reason="CLIP's merges file is not at hand")
def test_ids_equal_those_of_an_independent_tokenizer():
    """12,000 sentences, a third of them odd, against the `tokenizers` package (Rust) with the same merges, after the
    same cleaning; and CLIP's known ids of one sentence."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = avion.BPETokenizer(MERGES)
    assert ours.size == 49408
    assert ours(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1 : 1 + 49152 - 256 - 2]
    merges = [tuple(line.split(" ")) for line in lines]
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    symbols = [chr(byte) for byte in printable] + [
        chr(256 + n) for n in range(256 - len(printable))
    ]
    symbols += [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    assert len(vocabulary) == 49406
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>")
    )
    pattern = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = tokenizers.pre_tokenizers.Split(pattern, "removed", invert=True)
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, plain])
    words = ["".join(pair).removesuffix("</w>") for pair in merges[1000:9000]]
    straight = lambda text: "".join(CURLY.get(c, c) for c in text)
    clean = lambda text: unicodedata.normalize("NFC", straight(html.unescape(html.unescape(text))))
    seen = 0
    for text in odd_sentences(words, 12_000):
        expected = theirs.encode(
            clean(text).strip().lower().replace("'ſ", "'s"), add_special_tokens=False
        ).ids
        assert ours.encode(text.replace("'ſ", "'s")) == expected, repr(text)
        seen += len(expected)
    assert seen > 150_000
    assert ours.encode("a <|endoftext|> b") == [
        320,
        49407,
        321,
    ]  # CLIP reads its own marks in a text
    assert ours.encode("a\u0345 b") == [
        320,
        321,
    ]  # CLIP's pattern ignores case, and so drops this one character


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["can't be read"]),
        (b"\x1f\x8bnot gzip", ["can't be read"]),
        (b"\xff\xfe\x00", ["can't be read"]),
        (b"#version\ni n\nfoo bar\n", ["'foo bar'"]),
        ("#version\ni n\nĠ t\n".encode(), ["</w>", "not CLIP's"]),  # GPT-2's looks like this
        (b"<html>404</html>\n<p>x</p>\n", ["<p>x</p>"]),
    ],
)
def test_wrong_merges(content, words, tmp_path, args):
    path = tmp_path / "merges.txt"
    if content is not None:
        path.write_bytes(content)
    message = refused(*args, "--merges", path, "--out", tmp_path / "o")
    assert "--merges" in message and str(path) in message and all(word in message for word in words)


def test_merges_gzip_or_plain(tmp_path):
    text = "#version\n" + "\n".join(SMALL_MERGES) + "\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.gz").write_bytes(gzip.compress(text.encode()))
    assert (
        avion.read_merges(tmp_path / "a.txt")
        == avion.read_merges(tmp_path / "b.gz")
        == SMALL_MERGES
    )


# ---- losses, metrics -------------------------------------------------------------------------------------------------


def features(n, seed):
    return F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_max_margin_by_loops():
    """All 2 n (n - 1) terms of the mean, as the released code averages them; equal texts left out on demand."""
    video, text = features(5, 0), features(5, 1)
    s = (video @ text.T).tolist()
    terms = [
        max(0, 0.2 - s[i][i] + x)
        for i in range(5)
        for j in range(5)
        if i != j
        for x in (s[i][j], s[j][i])
    ]
    assert len(terms) == 40
    assert avion.max_margin_loss(video, text).mean().item() == pytest.approx(
        sum(terms) / 40, rel=1e-5
    )
    same = torch.eye(5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    kept = [max(0, 0.2 - s[i][i] + x) for i in range(5) for j in range(5) if i != j and {i, j} != {0, 1}
            for x in (s[i][j], s[j][i])]  # fmt: skip
    assert avion.max_margin_loss(video, text, 0.2, same).mean().item() == pytest.approx(
        sum(kept) / 40, rel=1e-5
    )


def slow_map(similarity, relevancy):
    total = 0.0
    for s, r in zip(similarity.tolist(), relevancy.tolist(), strict=True):
        order = sorted(range(len(s)), key=lambda i: -s[i])
        running, precision = 0.0, []
        for k, i in enumerate(order, 1):
            running += r[i]
            if r[i] == 1:
                precision.append(running / k)
        total += sum(precision) / len(precision)
    return total / len(similarity)


def slow_ndcg(similarity, relevancy):
    total = 0.0
    for s, r in zip(similarity.tolist(), relevancy.tolist(), strict=True):
        order, depth = sorted(range(len(s)), key=lambda i: -s[i]), sum(x > 0 for x in r)
        dcg = sum(r[i] / math.log2(k + 2) for k, i in enumerate(order[:depth]))
        total += dcg / sum(
            x / math.log2(k + 2) for k, x in enumerate(sorted(r, reverse=True)[:depth])
        )
    return total / len(similarity)


def random_relevancies(rows, columns):
    g = torch.Generator().manual_seed(2)
    similarity = torch.randn(rows, columns, generator=g)
    levels = torch.tensor([0, 0, 0, 1 / 6, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    relevant = levels[torch.randint(0, 8, (rows, columns), generator=g)]
    relevant[torch.arange(rows), torch.randint(0, columns, (rows,), generator=g)] = 1
    return similarity, relevant


def test_metrics_by_loops():
    """To 1e-12 on fractional relevancies; by hand where precision is not the usual one."""
    similarity, relevant = random_relevancies(600, 37)  # more than two blocks of queries
    assert (
        abs(avion.mean_average_precision(similarity, relevant) - slow_map(similarity, relevant))
        < 1e-12
    )
    assert abs(avion.ndcg(similarity, relevant) - slow_ndcg(similarity, relevant)) < 1e-12
    s, r = torch.tensor([[3.0, 2, 1]]), torch.tensor([[0.5, 1, 0]])
    assert avion.mean_average_precision(s, r) == pytest.approx(
        0.75
    )  # (0.5 + 1) / 2; the usual AP is 0.5
    assert avion.ndcg(s, r) == pytest.approx((0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))
    both = avion.retrieval_metrics(similarity[:37], relevant[:37].maximum(torch.eye(37)))
    assert both["val_map"] == pytest.approx((both["val_map_v2t"] + both["val_map_t2v"]) / 2)
    eye = avion.retrieval_metrics(torch.eye(3), torch.eye(3), False)
    assert eye["val_map"] == eye["val_ndcg"] == eye["val_r1_v2t"] == eye["val_r1_t2v"] == 100


def test_ties_fall_as_in_the_official_code():
    """Equal similarities: mAP ranks by (-s).argsort(), nDCG by s.argsort() from its end, as EK-100's evaluation."""
    similarity, relevant = random_relevancies(50, 37)
    similarity = similarity.round()
    s, r = similarity.numpy(), relevant.numpy()
    ranked = np.take_along_axis(r, (-s).argsort(), 1)
    precision = ranked.cumsum(1) / np.arange(1, 38)
    expected = ((precision * (ranked == 1)).sum(1) / (ranked == 1).sum(1)).mean()
    assert avion.mean_average_precision(similarity, relevant) == pytest.approx(expected, abs=1e-12)
    ranked, best, logs = (
        np.take_along_axis(r, s.argsort()[:, ::-1], 1),
        np.sort(r)[:, ::-1],
        np.log2(np.arange(37) + 2),
    )
    expected = ((ranked * (best > 0) / logs).sum(1) / (best / logs).sum(1)).mean()
    assert avion.ndcg(similarity, relevant) == pytest.approx(expected, abs=1e-12)


def test_metrics_need_a_relevant_item():
    similarity, relevant = random_relevancies(3, 4)
    relevant[1] = torch.tensor([0.5, 0, 0, 0.25])
    with pytest.raises(ValueError, match="query 1 has no item of relevancy 1"):
        avion.mean_average_precision(similarity, relevant)
    relevant[1] = 0
    with pytest.raises(ValueError, match="no relevant item"):
        avion.ndcg(similarity, relevant)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        avion.ndcg(similarity, relevant[:2])


def test_relevancy_by_sets():
    verbs, sets = [0, 0, 3], [{2}, {2, 49}, {49, 5, 2}]
    nouns = torch.zeros(3, 60)
    for row, nouns_of in zip(nouns, sets, strict=True):
        row[list(nouns_of)] = 1
    got = avion.relevancy(torch.tensor(verbs), nouns, torch.tensor(verbs), nouns)
    for i in range(3):
        for j in range(3):
            iou = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
            assert got[i, j].item() == pytest.approx(
                0.5 * (verbs[i] == verbs[j]) + 0.5 * iou, abs=1e-15
            )
    assert (got.diagonal() == 1).all()


def test_marginalised_actions():
    actions = avion.Actions(["0:1", "0:2", "3:1", "3:10"])
    p = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.4, 0.35, 0.25, 0.0]])
    torch.testing.assert_close(
        avion.marginalise(p, actions.verb), torch.tensor([[0.3, 0.7], [0.75, 0.25]])
    )
    torch.testing.assert_close(
        avion.marginalise(p, actions.noun), torch.tensor([[0.5, 0.2, 0.3], [0.65, 0.35, 0.0]])
    )
    assert actions.hits(p, torch.tensor([3, 0])).tolist() == [
        [False, True, False],
        [True, True, True],
    ]


def test_eq_3():
    """The paper's 1,024 clips, 1 Mb/s, 4 s, and 500 MB/s (a SATA SSD) or 80 (a hard disk)."""
    assert (
        data.largest_chunk(1024, 1, 500, 4) == 15.625 and data.largest_chunk(1024, 1, 80, 4) == 2.5
    )


def test_stretched_time():
    """As F.interpolate, bilinear on [1, 1, T, D], which the released code uses; ends are flat, the middle linear."""
    x = torch.randn(4, 6)
    expected = F.interpolate(x[None, None], (16, 6), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(avion.stretch_time(x, 16), expected)
    assert avion.stretch_time(x, 4) is x
    assert avion.stretch_time(torch.tensor([[0.0], [4.0]]), 4)[:, 0].tolist() == [
        0.0,
        1.0,
        3.0,
        4.0,
    ]


# ---- memory (Fig. 3) -------------------------------------------------------------------------------------------------


def test_fig_3_memory():
    """ViT-B, 4 frames, fp32, real tensors: plain 70.59, efficient 38.63, recomputed 2.41 MB a block; attention's share
    of plain memory 0.60 to 0.65 ("> 60 %")."""
    x, block = torch.randn(1, 785, 768, requires_grad=True), common.Block(768, 12, kind="plain")
    plain = common.saved_bytes(block, x) / 1e6
    block.attn.kind = "sdpa"
    efficient = common.saved_bytes(block, x) / 1e6
    recomputed = common.saved_bytes(torch.nn.Identity(), x) + x.numel() * 4
    assert [plain, efficient, recomputed / 1e6] == pytest.approx([70.59, 38.63, 2.41], rel=0.02)
    assert plain / efficient == pytest.approx(1.827, rel=0.02)
    sizes = avion.saved_megabytes("clip_b16", 785)
    parts = sizes["plain"]
    assert sum(parts) == pytest.approx(12 * 70.59, rel=0.02) and 0.60 < parts[1] / sum(parts) < 0.65
    assert parts == pytest.approx([58.2, 528.6, 260.4], rel=0.02)
    assert sum(sizes["sdpa"]) == pytest.approx(12 * 38.63, rel=0.02)
    assert sum(sizes["checkpoint"]) == pytest.approx(2 * (14.5 + 19.3), rel=0.02)
    square = common.Attention(
        768, 12, "plain"
    )  # 8 frames of real tensors: what is found at two lengths holds at all
    seen = common.saved_bytes(square, torch.randn(1, 1569, 768)) / 1e6
    assert avion.saved_megabytes("clip_b16", 1569)["plain"][1] == pytest.approx(12 * seen, rel=1e-3)


def test_checkpointing_stores_inputs_only():
    """grad_checkpoint of the real encoder stores about a third: the blocks' inputs, and what is outside of them."""
    stored = []
    for flag in (False, True):
        torch.manual_seed(0)
        encoder = avion.VideoEncoder("clip_toy", 8, 64, grad_checkpoint=flag)
        clips = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8)
        stored.append(common.saved_bytes(encoder, clips, make_key(torch.arange(2))))
    assert stored[1] < 0.35 * stored[0]


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(avion.MODELS, "tiny", TINY)


def normalised(clips, mean):
    """Clips 0-255 [B, T, C, H, W] as a model's first layer gets them."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, STD))
    return (clips - mean) / std


def hub_model():
    """A random CLIPModel of transformers with the sizes of TINY; every weight is random, so that none can be missed."""
    transformers = pytest.importorskip("transformers")
    part = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    text = transformers.CLIPTextConfig(**part, vocab_size=514, max_position_embeddings=77, eos_token_id=513,
                                       bos_token_id=512, pad_token_id=0)  # fmt: skip
    vision = transformers.CLIPVisionConfig(**part, image_size=32, patch_size=16)
    torch.manual_seed(0)
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict(), "projection_dim": 24}
    model = transformers.CLIPModel(transformers.CLIPConfig(**both)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tiny_net(path, frames=1, **flags):
    """The VideoCLIP that --init path gives."""
    cfg = dataclasses.replace(
        config(), model="tiny", frames=frames, size=32, embed_dim=24, init=str(path), **flags
    )
    start = avion.read_init(path)
    net = avion.build(cfg, start["style"], 514).eval()
    common.load_weights(net, avion.fit_weights(start, net, "x"), path)
    return net


def as_openai(state):
    """The hub's names and layouts -> OpenAI's, written from its published key list."""
    out = {"logit_scale": state["logit_scale"], "visual.proj": state["visual_projection.weight"].T.clone(),
           "text_projection": state["text_projection.weight"].T.clone(),
           "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
           "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
           "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
           "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
           "positional_embedding": state["text_model.embeddings.position_embedding.weight"]}  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for theirs, ours in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
            for i in range(2):
                a, b = f"{theirs}.encoder.layers.{i}.", f"{ours}.resblocks.{i}."
                qkv = [state[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{b}attn.in_proj_{kind}"] = torch.cat(qkv)
                for x, y in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                    out[f"{b}{y}.{kind}"] = state[f"{a}{x}.{kind}"]
    return out


def as_avion(state, flash):
    """OpenAI's names -> AVION's, with fast conv1, a temporal embedding, and either attention's names."""
    out = {}
    for name, x in as_openai(state).items():
        name = name if name.startswith(("visual.", "logit_scale")) else f"textual.{name}"
        name = {"visual.proj": "visual.image_projection"}.get(name, name)
        if name == "visual.conv1.weight":
            x = x.flatten(1)
        if flash and name.startswith("visual."):
            name = (
                name.replace("attn.in_proj_", "attn.Wqkv.")
                .replace("c_fc", "fc1")
                .replace("c_proj", "fc2")
            )
        out[f"module.{name}"] = x
    out["module.visual.temporal_embedding"] = torch.randn(4, 64)
    return out


class Tree(torch.nn.Module):
    """A module tree that holds a state dict under its dotted names."""

    def __init__(self, state):
        super().__init__()
        for head in dict.fromkeys(name.split(".")[0] for name in state):
            if head in state:
                self.register_buffer(
                    head, state[head]
                ) if "embedding" in head else self.register_parameter(
                    head, torch.nn.Parameter(state[head])
                )
            else:
                part = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(head + ".")}
                self.add_module(head, Tree(part))

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
def test_features_equal_clips(tiny, tmp_path):
    """T = 1, the hub's file: image and text features are transformers' to 1e-5 (they come normalised)."""
    hub = hub_model()
    hub.save_pretrained(tmp_path)
    net = tiny_net(tmp_path)
    clips = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    tokens = avion.BPETokenizer()(["a red square", "turn on tap " * 9, "x"])
    with torch.no_grad():
        out = hub(input_ids=tokens, pixel_values=normalised(clips, CLIP_MEAN)[:, 0])
        video, text, scale = net(clips, tokens, None)
    assert (video - out.image_embeds).abs().max() < 1e-5 and (
        text - out.text_embeds
    ).abs().max() < 1e-5
    torch.testing.assert_close(scale, hub.logit_scale.exp())
    four, clips = (
        tiny_net(tmp_path, frames=4),
        torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8),
    )
    shuffled = clips[:, [2, 0, 3, 1]]  # PE_t is zero: the frames' order says nothing yet
    torch.testing.assert_close(
        four.encode_video(shuffled), four.encode_video(clips), atol=1e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore")
def test_all_forms_of_clip_load_alike(tiny, tmp_path):
    """OpenAI's TorchScript archive and state dict, AVION's checkpoint in both layouts, the hub's: the same weights, each its style."""
    hub = hub_model()
    hub.save_pretrained(tmp_path / "hub")
    state = common.read_safetensors(tmp_path / "hub" / "model.safetensors")  # the hub's own names
    torch.jit.save(torch.jit.script(Tree(as_openai(state)).half()), tmp_path / "openai.pt")
    reference, half = (
        tiny_net(tmp_path / "hub").state_dict(),
        tiny_net(tmp_path / "openai.pt").state_dict(),
    )
    assert reference.keys() == half.keys()
    assert all(torch.equal(reference[k].half().float(), half[k]) for k in reference)
    scalars = {
        name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")
    }
    torch.save(as_openai(state) | scalars, tmp_path / "state_dict.pt")  # OpenAI's, saved anew
    plain = tiny_net(tmp_path / "state_dict.pt").state_dict()
    assert all(torch.equal(plain[k], reference[k]) for k in reference)
    for flash in (False, True):
        file = {"state_dict": as_avion(state, flash), "epoch": 5, "args": argparse.Namespace(lr=1)}
        torch.save(
            file | {"best_acc1": np.float64(0.3)}, tmp_path / "avion.pt"
        )  # as its scripts leave it
        net = tiny_net(tmp_path / "avion.pt", frames=4)
        own = net.state_dict()
        assert all(
            torch.equal(own[k], reference[k]) for k in reference if k != "visual.temporal_embedding"
        )
        assert torch.equal(
            own["visual.temporal_embedding"], file["state_dict"]["module.visual.temporal_embedding"]
        )
        assert (
            isinstance(net.visual.blocks[0].mlp.act, torch.nn.GELU)
            and net.visual.ln_pre.eps == 1e-6
        )
    assert isinstance(tiny_net(tmp_path / "hub").visual.blocks[0].mlp.act, common.QuickGELU)
    wide = dataclasses.replace(config(), model="tiny", frames=4, size=32, embed_dim=16, init="x")
    kept = avion.fit_weights(avion.read_init(tmp_path / "hub"), avion.build(wide, "clip", 514), "x")
    assert not {"visual_projection.weight", "text_projection.weight", "logit_scale"} & set(kept)
    assert (
        kept["visual.temporal_embedding"].shape == (4, 64)
        and not kept["visual.temporal_embedding"].any()
    )


@pytest.mark.filterwarnings("ignore")
def test_features_equal_avions(tiny, tmp_path):
    """4 and 16 frames of an AVION checkpoint: video features as its code computes them (its pixels' mean, GELU, eps
    1e-6, key biases, spatial positions tiled, temporal ones repeated, and interpolated when the frames change), written
    out from its own names."""
    hub_model().save_pretrained(tmp_path / "hub")
    state = as_avion(common.read_safetensors(tmp_path / "hub" / "model.safetensors"), flash=False)
    torch.save(
        {"state_dict": state, "epoch": 1, "args": argparse.Namespace(lr=1)}, tmp_path / "avion.pt"
    )
    w = {name.removeprefix("module.visual."): x for name, x in state.items()}
    for frames in (4, 16):
        clips = torch.randint(0, 256, (2, frames, 3, 32, 32), dtype=torch.uint8)
        pixels = normalised(clips, AVION_MEAN).flatten(0, 1)
        x = F.conv2d(pixels, w["conv1.weight"].reshape(64, 3, 16, 16), stride=16)
        x = x.flatten(2).transpose(1, 2).reshape(2, frames * 4, 64)
        time = F.interpolate(w["temporal_embedding"][None, None], (frames, 64), mode="bilinear")[
            0, 0
        ]
        x = x + w["positional_embedding"][1:].repeat(frames, 1) + time.repeat_interleave(4, 0)
        cls = (w["class_embedding"] + w["positional_embedding"][0]).expand(2, 1, 64)
        norm = lambda x, name: F.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
        x = norm(torch.cat([cls, x], 1), "ln_pre")
        for i in range(2):
            block = f"transformer.resblocks.{i}"
            qkv = F.linear(
                norm(x, f"{block}.ln_1"),
                w[f"{block}.attn.in_proj_weight"],
                w[f"{block}.attn.in_proj_bias"],
            )
            q, k, v = qkv.chunk(3, -1)  # one head
            y = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
            x = x + F.linear(
                y, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"]
            )
            y = F.linear(
                norm(x, f"{block}.ln_2"), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"]
            )
            x = x + F.linear(
                F.gelu(y), w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"]
            )
        expected = F.normalize(norm(x[:, 0], "ln_post") @ w["image_projection"], dim=-1)
        for trained in (
            4,
            frames,
        ):  # interpolated when used (--eval-frames), or when loaded (--frames)
            got = tiny_net(tmp_path / "avion.pt", frames=trained).encode_video(clips)
            assert (got - expected).abs().max() < 1e-5


def embedded(encoder, clips):
    """What the patch embedding of a VideoEncoder gives for these clips."""
    seen = []
    hook = encoder.patch_embed.register_forward_hook(
        lambda layer, given, result: seen.append(result)
    )
    encoder(clips)
    hook.remove()
    return seen[0]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_keeps_its_style(tiny, told, args, tmp_path):
    """Fine-tuned from CLIP's or AVION's weights, or from nothing: what is opened later, and a run that starts from it,
    normalises pixels as those weights were trained with."""
    hub_model().save_pretrained(tmp_path / "hub")
    state = as_avion(common.read_safetensors(tmp_path / "hub" / "model.safetensors"), flash=False)
    torch.save(
        {"state_dict": state, "epoch": 1, "args": argparse.Namespace(lr=1)}, tmp_path / "avion.pt"
    )
    small = {"model": "tiny", "size": 32, "frames": 4, "embed_dim": 24}
    kept = {"scratch": (CLIP_MEAN, "QuickGELU", 1e-5), "hub": (CLIP_MEAN, "QuickGELU", 1e-5),
            "avion.pt": (AVION_MEAN, "GELU", 1e-6)}  # fmt: skip
    for name, (mean, act, eps) in kept.items():
        out, again = tmp_path / f"from-{name}", tmp_path / f"again-{name}"
        init = [] if name == "scratch" else ["--init", tmp_path / name]
        avion.main(
            dataclasses.replace(config(*args, "--max-steps", 1, *init, "--out", out), **small)
        )
        flags = [
            "--recipe",
            "toy_mir",
            *args,
            "--max-steps",
            1,
            "--init",
            out / "best.pt",
            "--out",
            again,
        ]
        avion.main(dataclasses.replace(config(*flags), **small))
        for folder in (out, again):
            trained = config("--task", "eval", "--init", folder / "last.pt")
            net = avion.open_model(trained, common.launch("fp32"))[1]
            encoder = net.visual
            assert type(encoder.blocks[0].mlp.act).__name__ == act and encoder.ln_pre.eps == eps
            clips = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
            expected = F.linear(
                common.patchify(normalised(clips, mean), (1, 16, 16)), encoder.patch_embed.weight
            )
            torch.testing.assert_close(embedded(encoder, clips), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_avions_classifier_is_evaluated_as_it_is(tiny, told, tmp_path, capsys):
    """AVION's fine-tuned classifier (`fc_cls`, no projection): its logits by a direct product, classes named by
    --actions; fine-tuning starts from it, head and all; another number of classes is refused."""
    hub_model().save_pretrained(tmp_path / "hub")
    state = as_avion(common.read_safetensors(tmp_path / "hub" / "model.safetensors"), flash=True)
    state = {
        name: x
        for name, x in state.items()
        if name.startswith("module.visual.") and "projection" not in name
    }
    videos = narrations([told / "train.jsonl"], told / "chunks")
    classes = len(avion.Actions(lists=[videos]).names)
    state |= {
        "module.fc_cls.weight": torch.randn(classes, 64),
        "module.fc_cls.bias": torch.randn(classes),
    }
    torch.save(
        {"state_dict": state, "epoch": 3, "args": argparse.Namespace(num_classes=classes)},
        tmp_path / "cls.pt",
    )
    flags = ["--init", tmp_path / "cls.pt", "--task", "eval", "--frames", 4, "--workers", 0, "--data-root",
             told / "chunks", "--val-list", told / "train.jsonl"]  # fmt: skip
    cfg = dataclasses.replace(config(*flags), model="tiny", size=32)
    avion.main(cfg)
    ours = re.search(r"val_action ([\d.]+)", capsys.readouterr().out)
    start, ctx = avion.read_init(tmp_path / "cls.pt"), common.launch("fp32")
    net = avion.build(
        dataclasses.replace(cfg, loss="cross_entropy"), start["style"], classes=classes
    ).eval()
    assert (
        common.load_weights(net, avion.fit_weights(start, net, "x"), "x").count("left at init 0")
        == 1
    )
    assert (
        isinstance(net.visual.blocks[0].mlp.act, torch.nn.GELU) and net.visual.ln_post.eps == 1e-6
    )
    clips = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    expected = net.visual(clips) @ state["module.fc_cls.weight"].T + state["module.fc_cls.bias"]
    torch.testing.assert_close(net(clips), expected)
    features, _, _ = avion.encode_clips(cfg, ctx, net, videos)
    right = (
        net.head(features).argmax(1).numpy() == avion.Actions(lists=[videos]).labels(videos)
    ).mean()
    assert float(ours[1]) == pytest.approx(100 * right, rel=1e-3)
    with pytest.raises(UserError, match=f"--num-classes {classes}.*--actions"):
        avion.main(dataclasses.replace(cfg, val_list=str(told / "val.jsonl")))


def test_avions_single_frame_model_is_known(tiny, tmp_path):
    """Without a temporal embedding (one frame) AVION's names still say whose activation it is."""
    state = {
        "module.visual.image_projection": torch.zeros(64, 24),
        "module.textual.text_projection": torch.zeros(64, 24),
    }
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    assert avion.read_init(tmp_path / "a.pt")["style"] == "avion"


@pytest.mark.filterwarnings("ignore")
def test_hidden_act_of_the_hub_decides(tiny, tmp_path):
    """A hub folder whose config says gelu, as some CLIPs', gets GELU at CLIP's eps."""
    hub_model().save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    text["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(text))
    net = tiny_net(tmp_path)
    assert isinstance(net.visual.blocks[0].mlp.act, torch.nn.GELU) and net.visual.ln_pre.eps == 1e-5


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_read_not_run(tmp_path, monkeypatch, args):
    """A module tree of parameters and buffers, half and whole precision, comes back equal; an archive whose pickle
    calls something else is refused, and nothing of it runs; a cut one too."""
    monkeypatch.chdir(tmp_path)
    state = {
        "a.b.weight": torch.randn(3, 2),
        "a.positional_embedding": torch.arange(4.0),
        "w": torch.randn(2).double(),
    }
    torch.jit.save(torch.jit.script(Tree(state)), "a.pt")
    read = common.torchscript_weights("a.pt")
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
    assert all(read[k].dtype == state[k].dtype for k in state)
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("evil.pt", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, pickle.dumps({"x": Evil()}) if name.endswith("/data.pkl") else old.read(name)
            )
    message = refused(*args, "--init", "evil.pt", "--out", "o")
    assert "evil.pt" in message and "system" in message and not os.path.exists("ran")
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("cut.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 4 if "/data/" in name else None])
    assert "cut.pt" in refused(*args, "--init", "cut.pt", "--out", "o")


def test_weights_of_another_width_or_vocabulary(tiny, tmp_path, args, trained):
    message = refused(
        *args, "--init", trained / "best.pt", "--model", "clip_b16", "--size", 64, "--out", tmp_path
    )
    assert "best.pt" in message and "--model" in message
    (tmp_path / "m.txt").write_text("#version\n" + "\n".join(SMALL_MERGES))
    message = refused(
        *args,
        "--init",
        trained / "best.pt",
        "--merges",
        tmp_path / "m.txt",
        "--out",
        tmp_path / "o",
    )
    assert "514" in message and "520" in message and "--merges" in message
    message = refused(*args, "--task", "eval", "--init", ROOT / "avion.py", "--out", tmp_path)
    assert "avion.py" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", ["not a readable checkpoint"]),
        ("another script's", ["not a checkpoint of avion.py"]),
        ("no classes", ["not a checkpoint of avion.py"]),
        ("no loss", ["not a checkpoint of this version of avion.py", "loss"]),
        ("other size", ["not a checkpoint of this version of avion.py", "positional_embedding"]),
        ("other width", ["not a checkpoint of this version of avion.py", "patch_embed"]),
        ("no weight", ["not a checkpoint of this version of avion.py", "ln_post"]),
        ("other style", ["not a checkpoint of this version of avion.py", "KeyError"]),
        ("other merges", ["--merges"]),
    ],
)
@pytest.mark.parametrize("task", ["eval", "search"])
def test_what_is_no_checkpoint_of_ours(change, words, task, args, trained, tmp_path):
    """Damaged, another script's, of another version: one line that names the file."""
    path, more = tmp_path / "c.pt", []
    state = torch.load(trained / "best.pt", weights_only=True)
    if change == "another script's":
        del state["style"]
    elif change == "no classes":
        del state["classes"]
    elif change == "no loss":
        del state["config"]["loss"]
    elif change == "other size":
        state["config"]["size"] = 96
    elif change == "other width":
        state["model"]["visual.patch_embed.weight"] = torch.zeros(64, 1536)
    elif change == "no weight":
        del state["model"]["visual.ln_post.weight"]
    elif change == "other style":
        state["style"] = "later"
    elif change == "other merges":
        (tmp_path / "m.txt").write_text("#version\n" + "\n".join(SMALL_MERGES))
        more = ["--merges", tmp_path / "m.txt"]
    torch.save(state, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:4000])
    message = refused(*args, "--task", task, "--query", "x", "--init", path, *more)
    assert message.startswith(f"error: {path}: ") and all(word in message for word in words), (
        message
    )


def test_patch_dropout_equals_dense_attention_over_the_kept(tiny):
    """Left-out patches change nothing: the encoder on K kept ones = all tokens embedded, kept ones picked, blocks."""
    torch.manual_seed(0)
    encoder, keys = avion.VideoEncoder("tiny", 4, 32, patch_dropout=0.5), make_key(torch.arange(3))
    clips = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    got = encoder(clips, keys)
    pixels = normalised(clips, CLIP_MEAN)
    kernel = common.linear_to_conv(encoder.patch_embed.weight, (1, 16, 16))[:, :, 0]
    for b in range(3):
        x = F.conv2d(pixels[b], kernel, stride=16).flatten(2).transpose(1, 2)  # [T, 4, D]
        x = x + encoder.positional_embedding[1:] + encoder.temporal_embedding[:, None]
        x = x.reshape(16, 64)[common.random_split(keys, 16, 8)[0][b]]
        x = torch.cat([(encoder.class_embedding + encoder.positional_embedding[0])[None], x])[None]
        expected = encoder.ln_post(common.run_blocks(encoder.blocks, encoder.ln_pre(x)))[0, 0]
        torch.testing.assert_close(got[b], expected, atol=1e-5, rtol=1e-5)
    assert encoder(clips).shape == (3, 64) and not torch.allclose(encoder(clips), got, atol=1e-2)


def test_text_encoder_sees_nothing_behind_the_end():
    """The same feature however much padding there is, and with other tokens behind the end; order matters."""
    torch.manual_seed(0)
    encoder, tokenizer = avion.TextEncoder("clip_toy", 514), avion.BPETokenizer()
    tokens = tokenizer(["a red square"])
    padded = F.pad(tokens, (0, 77 - tokens.shape[1]))
    torch.testing.assert_close(encoder(tokens), encoder(padded), atol=1e-5, rtol=0)
    noisy = padded.clone()
    noisy[0, int(tokens.argmax(1)) + 1 :] = 7
    torch.testing.assert_close(encoder(noisy), encoder(padded), atol=1e-5, rtol=0)
    assert not torch.allclose(encoder(tokens), encoder(tokenizer(["square red a"])), atol=1e-3)


def test_other_numbers_of_frames(tiny):
    """A model of 4 frames takes 16 (--eval-frames): as one whose PE_t was interpolated."""
    torch.manual_seed(0)
    short, long = avion.VideoEncoder("tiny", 4, 32), avion.VideoEncoder("tiny", 16, 32)
    state = short.state_dict()
    long.load_state_dict(
        state | {"temporal_embedding": avion.stretch_time(state["temporal_embedding"], 16)}
    )
    clips = torch.randint(0, 256, (2, 16, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(short(clips), long(clips))


# ---- lists -----------------------------------------------------------------------------------------------------------

EK = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame," \
     "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"  # fmt: skip


def ek_row(i, narration, verb, nouns, start="00:00:00.50", stop="00:00:02.00"):
    cells = [f"P01_01_{i}", "P01", "P01_01", start, start, stop, "1", "9", narration, "v", str(verb), "n",
             str(nouns[0]), "['x']", str(nouns)]  # fmt: skip
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()


def test_digest_tells_nouns(tmp_path):
    """Relevancy, and so mAP, depends on all nouns of a row, which its action doesn't tell."""
    digests = set()
    for nouns in ([2], [2, 5]):
        path = tmp_path / "list.csv"
        path.write_text(EK + ek_row(0, "take plate", 0, nouns))
        digests.add(narrations([path]).digest())
    assert len(digests) == 2


def test_official_ek100_rows(tmp_path):
    """Times, file names, classes, relevancy, and the sentence file; without it the first row of each text."""
    rows = [ek_row(0, "take plate", 0, [2]), ek_row(1, "take plate", 0, [2], "01:02:03.25", "01:02:04.00"),
            ek_row(2, "put plate, bowl", 1, [2, 7]), ek_row(3, "wash cloth", 2, [17])]  # fmt: skip
    (tmp_path / "test.csv").write_text(EK + "".join(rows))
    videos = narrations([tmp_path / "test.csv"], "root")
    assert (
        videos.video(0) == "root/P01/P01_01.MP4"
        and videos.start[1] == 3723.25
        and videos.end[1] == 3724
    )
    assert videos.sentences.tolist() == [0, 2, 3] and videos.actions[videos.action[2]] == "1:2"
    expected = [[1, 0.25, 0], [1, 0.25, 0], [0.25, 1, 0], [0, 0, 1]]
    assert videos.relevancy(torch.arange(4), videos.sentences).tolist() == expected
    (tmp_path / "test_sentence.csv").write_text(
        "narration_id,narration\nP01_01_3,x\nP01_01_1,x\nP01_01_2,x\n"
    )
    assert narrations([tmp_path / "test.csv"]).sentences.tolist() == [3, 1, 2]
    actions = avion.Actions(lists=[videos])
    assert actions.names == ["0:2", "1:2", "2:17"] and actions.texts[0] == ["take plate"]
    assert actions.labels(videos).tolist() == [0, 0, 1, 2]
    (tmp_path / "n.csv").write_text(
        EK + ek_row(0, "wash it", 2, [5, 17]).replace(",5,['x']", ",17,['x']")
    )
    assert narrations([tmp_path / "n.csv"]).actions == [
        "2:17"
    ]  # the class is noun_class, whatever comes first


@pytest.mark.skipif(not FORMATS.is_dir(), reason="EK-100's files are not at hand")
def test_heads_of_the_published_files(tmp_path):
    shutil.copy(FORMATS / "EPIC_100_retrieval_test_head.csv", tmp_path / "t.csv")
    videos = narrations([tmp_path / "t.csv"])
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    published = [
        row["narration"]
        for row in csv.DictReader((FORMATS / "EPIC_100_retrieval_test_sentence_head.csv").open())
    ]
    texts = [videos.text(i) for i in videos.sentences.tolist()]
    assert (
        30 <= len(texts) and texts == published[: len(texts)]
    )  # in the order of the published file, without that file
    assert len(videos) == len(rows) > 30 and videos.classified
    sets = [set(json.loads(row["all_noun_classes"])) for row in rows]
    got = videos.relevancy(torch.arange(len(rows)), torch.arange(len(rows)))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            iou = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
            assert got[i, j].item() == pytest.approx(
                0.5 * (a["verb_class"] == b["verb_class"]) + 0.5 * iou
            )


def test_ego4d_pickle_jsonl_csv_and_several_lists(tmp_path):
    """AVION's tuples of four and five, one or several phrasings; the same rows in other formats; two lists as one."""
    rows = [
        ("uid-a", 1.5, 2.5, "#C C opens a door"),
        ("uid-b", 0.0, 4.0, ["one", "two", "three"], [-1.0, -2.0, -3.0]),
    ]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(rows))
    keys = ("video", "start", "end", "text")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps(dict(zip(keys, row))) + "\n\n" for row in rows)
    )
    (tmp_path / "c.csv").write_text(
        'video,start,end,text\nuid-a,1.5,2.5,"#C C opens, a door"\nx/y.webm,0,4,one\n'
    )
    for name in ("a.pkl", "b.jsonl"):
        videos = narrations([tmp_path / name], "r")
        assert [videos.video(0), videos.video(1)] == [
            "r/uid-a.mp4",
            "r/uid-b.mp4",
        ] and not videos.classified
        assert [videos.text(1, u) for u in (0.0, 0.4, 0.99)] == ["one", "two", "three"]
    both = narrations([tmp_path / "a.pkl", tmp_path / "c.csv"])
    assert len(both) == 4 and both.text(2) == "#C C opens, a door" and both.video(3) == "x/y.webm"
    assert both.relevancy([1, 2], [1, 3]).tolist() == [[1, 1], [0, 0]]


def test_toy_list_leaves_out_what_no_picture_shows(told):
    rows = [json.loads(line) for line in (told / "train.jsonl").read_text().splitlines()]
    videos = narrations([told / "train.jsonl"])
    assert len(videos) == sum(row["visible"] for row in rows) == 24 < len(rows)
    texts = {videos.text(i) for i in range(24)}
    assert texts == {row["text"] for row in rows if row["visible"]}
    exact = (videos.relevancy(torch.arange(24), torch.arange(24)) == 1).tolist()
    assert all(
        exact[i][j] == (videos.text(i) == videos.text(j)) for i in range(24) for j in range(24)
    )


GOOD = '{"video": "x", "start": 0, "end": 1, "text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", None, ["No such file"]),
        ("a.jsonl", '{"video": "x", "start": 0, "end": 1, "text": ""}\n', ["a.jsonl:1", "empty"]),
        ("a.jsonl", '{"video": "x", "start": 0, "end": 1, "text": 7}\n', ["a.jsonl:1", "not text"]),
        (
            "a.jsonl",
            '{"video": "x", "start": 0, "end": 1, "text": ["a", null]}\n',
            ["a.jsonl:1", "not text"],
        ),
        (
            "a.jsonl",
            '{"video": "x", "start": 2, "end": 1, "text": "a"}\n',
            ["a.jsonl:1", "start must be before"],
        ),
        (
            "a.jsonl",
            '{"video": "x", "start": NaN, "end": 1, "text": "a"}\n',
            ["a.jsonl:1", "start must be before"],
        ),
        ("a.jsonl", GOOD + '\n{"video": "x"}\n' + GOOD, ["a.jsonl:3:", "'start' is missing"]),
        ("a.jsonl", GOOD + "{", ["a.jsonl:2:", "double quotes"]),
        ("a.jsonl", GOOD + "7\n", ["a.jsonl:2:"]),
        ("a.jsonl", GOOD.encode() + b"\xff\xfe\n", ["a.jsonl:2:", "UTF-8"]),
        ("a.jsonl", "", ["holds no narration"]),
        (
            "a.csv",
            EK + ek_row(0, "take", 0, [1], "00:00:02.00", "00:00:01.00"),
            ["a.csv:2", "start must be before"],
        ),
        (
            "a.csv",
            EK + ek_row(0, "take", 0, [1]) + ek_row(0, "take", 0, [1], "soon"),
            ["a.csv:3:", "'soon' is not a number"],
        ),
        ("a.csv", "foo,bar\n1,2\n", ["a.csv:2:", "'video' is missing", "'foo': '1'"]),
        (
            "a.csv",
            'video,start,end,text\nx,0,1,"two\nlines"\n\nx,0\n',
            ["a.csv:5:", "'start': '0', 'end': None"],
        ),
        ("a.csv", 'video,start,end,text\nx,0,1,a\nx,0,1,"open\nx,0,1,a\n', ["a.csv:3:", "csv"]),
        ("a.csv", b"video,start,end,text\nx,0,1,a\nx,0,1,caf\xe9\n", ["a.csv:3:", "UTF-8"]),
        ("a.pkl", pickle.dumps([("x", 0.0, 1.0, "")]), ["a.pkl: row 0", "empty"]),
        ("a.pkl", pickle.dumps([("x", 0.0, 1.0, "a"), ("x", 0.0)]), ["a.pkl: row 1:"]),
        ("a.pkl", pickle.dumps(7), ["a.pkl"]),
        (
            "a.json",
            '{"v": [[1, 0.0, 1.0, "a"], [1, "x", 1.0, "b"], [1, 2]]}',
            ["v, sentence 1", "'x'"],
        ),
        ("a.json", '{"v": [[1, 0.0, 1.0, "a"], [1, 2]]}', ["v, sentence 1", "('v', [1, 2])"]),
        ("a.json", '{"v": [[1, 0.0, 1.0, "a"], 7]}', ["v, sentence 1", "('v', 7)"]),
        ("a.pkl", b"\x80garbage", ["a.pkl", "nothing in it was run"]),
        (
            "a.pkl",
            pickle.dumps([("x", 0.0, 1.0, Evil())]),
            ["a.pkl", "system", "nothing in it was run", ".csv"],
        ),
        ("a.pkl", pickle.dumps([("x", np.float64(0), 1.0, "a")]), ["a.pkl", "refused", ".jsonl"]),
    ],
)
def test_wrong_lists(name, content, words, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(*args, "--train-list", name, "--out", "o")
    assert all(word in message for word in words), message
    for python in ("Error", "object", "unpack", "literal", "convert", "index", "argument"):
        assert python not in message, message
    assert not os.path.exists("ran")


def test_a_few_rows_are_left_out_and_counted(tmp_path, told, args, capsys):
    """Like unreadable videos: one always, then --max-bad of all; a run and an evaluation say so."""
    lines = (told / "val.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(next(line for line in lines if json.loads(line)["visible"]))
    lines.insert(3, json.dumps(row | {"start": 3.5, "end": 1.25}) + "\n")
    (tmp_path / "v.jsonl").write_text("".join(lines))
    n = sum(json.loads(line)["visible"] for line in lines)
    flags = [
        *args,
        "--val-list",
        tmp_path / "v.jsonl",
        "--max-bad",
        0,
        "--max-steps",
        1,
        "--out",
        tmp_path / "o",
    ]
    avion.main(config(*flags))
    note = f"{tmp_path}/v.jsonl:4: its time is 3.5 to 1.25 s: the start must be before the end (1 such of {n} rows)"
    assert f"left out: {note}" in capsys.readouterr().out
    assert [r["val_clips"] for r in records(tmp_path / "o") if "val_clips" in r] == [n - 1]
    avion.main(config(*flags, "--task", "eval", "--init", tmp_path / "o" / "last.pt"))
    assert f"left out: {note}" in capsys.readouterr().out
    lines.append(json.dumps({"video": "x", "start": 1, "end": 2, "text": " "}) + "\n")
    (tmp_path / "v.jsonl").write_text("".join(lines))
    message = refused(*flags, "--overwrite")
    assert "v.jsonl:4: its time" in message and f"2 such of {n + 1} rows, --max-bad 0" in message


def test_long_narration_trains(tmp_path, told, args):
    """10,000 words: cut, and everything runs."""
    lines = (told / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"text": "word " * 10_000, "visible": True}
    plain = [{k: v for k, v in json.loads(line).items() if k != "visible"} for line in lines[1:]]
    rows = [{k: v for k, v in row.items() if k != "visible"}, *plain]
    rows[1]["text"] = "half of an emoji \ud83d"
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    avion.main(config(*args, "--train-list", tmp_path / "t.jsonl", "--batch-size", 12, "--max-steps", 2,
                      "--out", tmp_path / "o"))  # fmt: skip
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "o") if "loss" in r)


def test_missing_and_short_chunks(tmp_path, told, args, capsys):
    """A folder that is missing, a chunk that is: named, nothing hangs; a chunk of an odd number of frames is read."""
    chunks = tmp_path / "chunks"
    shutil.copytree(told / "chunks", chunks)
    shutil.rmtree(chunks / "train_00001.mp4")
    roots = ["--data-root", chunks, "--val-root", told / "chunks"]
    avion.main(config(*args, *roots, "--max-steps", 6, "--out", tmp_path / "o"))
    assert re.search(r"replaced by another: \S+train_00001.mp4", capsys.readouterr().out)
    (chunks / "train_00002.mp4" / "5.mp4").unlink()
    message = refused(*args, *roots, "--out", tmp_path / "o2")
    assert all(
        word in message
        for word in ("train_00002.mp4", "no chunk holds second", "train_00001.mp4", "--max-bad")
    )
    for path in sorted((chunks / "train_00000.mp4").glob("*.mp4")):  # 39 of 40 frames: 4.9 s of 5
        clip = (
            data.read_clip(path, range(data.probe(path).num_frames - 1), 64)
            .permute(0, 2, 3, 1)
            .numpy()
        )
        path.unlink()
        data._toy_write(path, clip, 8)
    cfg = config(*args)
    videos = narrations([told / "train.jsonl"], chunks)
    dataset = data.ClipDataset(videos, avion.clips_of(cfg, videos, True).plan, 64, 0, replace=False)
    samples = [dataset[0, i] for i in range(24) if "train_00000" in videos.video(i)]
    assert len(samples) == 8 and all(clip.shape == (8, 3, 64, 64) for (clip,), *_ in samples)


def test_every_clip_has_a_sentence(tmp_path, told, args):
    """Classes that no chosen text stands for get their first clip's text, as in EK-100's own file of sentences: without
    the file, and where it leaves them out. What the sentences lack is said before the first step."""
    rows = [ek_row(0, "cut slice", 7, [4]), ek_row(1, "stir", 10, [20, 3]), ek_row(2, "cut slice", 7, [7]),
            ek_row(3, "cut slice", 7, [7]), ek_row(4, "stir", 10, [3, 20, 3]), ek_row(5, "stir", 10, [3])]  # fmt: skip
    (tmp_path / "test.csv").write_text(EK + "".join(rows))
    videos = narrations([tmp_path / "test.csv"])
    assert videos.sentences.tolist() == [0, 1, 2, 5]
    assert (videos.relevancy(torch.arange(6), videos.sentences) == 1).sum(1).tolist() == [1] * 6
    (tmp_path / "test_sentence.csv").write_text("narration_id,narration\nP01_01_3,cut slice\n")
    assert narrations([tmp_path / "test.csv"]).sentences.tolist() == [3, 0, 1, 5]
    late = ek_row(
        6, "wave", 1, [9], "00:00:03.00", "00:00:01.00"
    )  # a row that the list leaves out has no sentence
    (tmp_path / "late.csv").write_text(EK + "".join(rows) + late)
    (tmp_path / "late_sentence.csv").write_text(
        "narration_id,narration\nP01_01_6,wave\nP01_01_3,cut slice\n"
    )
    assert narrations([tmp_path / "late.csv"]).sentences.tolist() == [3, 0, 1, 5]
    twice = narrations(
        [tmp_path / "test.csv", tmp_path / "test.csv"]
    )  # the file is of one list, not of both
    assert twice.sentences.tolist() == [0, 1, 2, 5]


def test_what_evaluation_needs_is_opened_first(tmp_path, told, args):
    """A list of sentences that isn't the list's, videos that aren't where --val-root says: refused before training."""
    (tmp_path / "P01").mkdir()
    (tmp_path / "P01/P01_01.MP4").symlink_to(told / "chunks" / "val_00000.mp4")
    (tmp_path / "v.csv").write_text(
        EK + ek_row(0, "take plate", 0, [2]) + ek_row(1, "wash cloth", 2, [17])
    )
    flags = [*args, "--val-list", tmp_path / "v.csv", "--max-steps", 1, "--out", tmp_path / "o"]
    for content, words in (
        (
            b"narration_id,narration\nP09_01_0,x\n",
            ["v_sentence.csv", "v_sentence.csv:2", "'P09_01_0' is not in"],
        ),
        (b"narration_id\n\xff\xfe", ["v_sentence.csv:2", "UTF-8"]),
        (b"id\nP01_01_0\n", ["v_sentence.csv:2", "None is not in"]),
    ):
        (tmp_path / "v_sentence.csv").write_bytes(content)
        message = refused(*flags, "--val-root", tmp_path)
        assert all(word in message for word in words), message
    (tmp_path / "v_sentence.csv").unlink()
    message = refused(*flags, "--val-root", tmp_path / "P01")
    assert "v.csv" in message and "--val-root" in message and "P01_01.MP4" in message
    assert not (tmp_path / "o").exists()
    avion.main(config(*flags, "--val-root", tmp_path))
    assert records(tmp_path / "o")[-1]["val_clips"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "6", "--micro-batch", "4"], ["--batch-size 6", "--micro-batch 4"]),
        (["--batch-size", "1"], ["--batch-size 1", "negatives"]),
        (["--lr", "1e-7"], ["--min-lr 1e-06", "--lr 1e-07"]),
        (["--batch-size", "100"], ["24 clips", "--batch-size of 100"]),
        (["--size", "60"], ["--size 60"]),
        (["--frames", "0"], ["--frames"]),
        (["--eval-frames", "-1"], ["--eval-frames"]),
        (["--patch-dropout", "1"], ["--patch-dropout"]),
        (["--crop-min", "0"], ["--crop-min"]),
        (["--mixup", "0.8"], ["--mixup", "cross_entropy"]),
        (["--train-list", ""], ["--train-list is missing"]),
        (["--val-list", ""], ["--val-list is missing"]),
        (["--task", "search"], ["--query"]),
        (
            ["--task", "predict", "--init", "none.pt", "--input", "x.mp4"],
            ["none.pt", "no such checkpoint"],
        ),
        (["--loss", "cross_entropy", "--num-classes", "3806"], ["--num-classes 3806", "--actions"]),
    ],
)
def test_impossible_flags(flags, words, args, tmp_path):
    message = refused(*args, "--out", tmp_path, *flags)
    assert all(word in message for word in words), message


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_of_a_narration(told):
    """Training: a random moment of each quarter, a crop of at least half of the area; test: the middles, the centre."""
    cfg = config("--frames", 4, "--size", 64, "--crop")
    videos = narrations([told / "train.jsonl"], told / "chunks")

    class Clock:
        info = data.VideoInfo(320, 240, 30.0, 900, 30.0, 0, "h264")
        clamp = staticmethod(lambda second: min(second, 30.0))
        at = staticmethod(lambda seconds: list(seconds))

    start, end = videos.start[3], min(videos.end[3], 30.0)
    step, seen = (end - start) / 4, []
    for key in make_key(torch.arange(60)):
        frames, (x, y, w, h) = avion.clips_of(cfg, videos, True).plan(Clock, 3, 0, key)
        assert all(start + k * step <= f <= start + (k + 1) * step for k, f in enumerate(frames))
        assert 0.48 < w * h / (320 * 240) <= 1 and 0 <= x <= 320 - w and 0 <= y <= 240 - h
        seen.append(tuple(frames))
    assert len(set(seen)) == 60
    frames, box = avion.clips_of(cfg, videos, False).plan(Clock, 3, 0, make_key(0))
    assert frames == pytest.approx([start + (k + 0.5) * step for k in range(4)]) and box == (
        40,
        0,
        240,
        240,
    )
    long = dataclasses.replace(cfg, eval_frames=16)
    frames, _ = avion.clips_of(long, videos, False).plan(Clock, 3, 0, make_key(0))
    assert len(frames) == 16


def test_decode_then_crop_reads_the_same_clip(told, monkeypatch):
    """Fig. 8a and 8b: the same frames and box, to the scaler's rounding, across chunk boundaries too; other errors
    are the loader's own."""
    videos, clips, plain, calls = narrations([told / "train.jsonl"], told / "chunks"), [], [], []
    read = data.read_clip_decode_then_crop
    monkeypatch.setattr(
        data, "read_clip_decode_then_crop", lambda *args: calls.append(args[0]) or read(*args)
    )
    for loader in ("fused", "decode_then_crop"):
        cfg = config("--loader", loader, "--crop")
        dataset = avion.clips_of(cfg, videos, True)
        clips.append(torch.stack([dataset[0, i][0][0] for i in range(8)]).float())
        plain.append(len(calls))
    assert (clips[0] - clips[1]).abs().mean() < 3 < (clips[0] - clips[0].flip(0)).abs().mean()
    assert plain[0] == 0 and 8 < plain[1] <= 16  # some of the eight clips cross into another chunk


def test_text_of_max_margin_is_any_relevant_sentence(tmp_path):
    rows = [ek_row(0, "take plate", 0, [2]), ek_row(1, "take cup", 0, [3]), ek_row(2, "wash plate", 2, [2]),
            ek_row(3, "open door", 3, [9])]  # fmt: skip
    (tmp_path / "t.csv").write_text(EK + "".join(rows))
    videos = narrations([tmp_path / "t.csv"])
    clips = torch.zeros(200, dtype=torch.int64), make_key(torch.arange(200))
    texts = avion.training_texts(videos, *clips, related=True)
    counts = {t: texts.count(t) for t in set(texts)}
    assert set(counts) == {"take plate", "take cup", "wash plate"} and min(counts.values()) > 40
    assert set(avion.training_texts(videos, *clips)) == {"take plate"}
    assert set(avion.training_texts(videos, *clips, related=True, min_relevancy=0.5)) == {
        "take plate"
    }


# ---- header, flags, recipes ------------------------------------------------------------------------------------------


def test_header_map_names_exist():
    """The second column of the header's table: every symbol is in the file, every file in the repository or planned."""
    table = avion.__doc__.split("paper  ")[1].split("\n\n")[0]
    cells = [re.split(r"\s{2,}", line.strip())[-1] for line in table.splitlines()[1:]]
    names = [name for cell in cells for name in re.sub(r" \(.*?\)", "", cell).split(", ")]
    assert len(names) >= 20
    for name in names:
        if ".py" in name:
            assert name.startswith("tpt_mae.py") or (ROOT / name).exists()
            continue
        owner = avion
        for part in name.split("."):
            owner = getattr(owner, part)


def test_decisions_of_the_header_are_tagged_where_they_are_made():
    """A `DECISION (word)` in the code for each word of the header's list, and none besides."""
    listed = re.findall(
        r"^    (\w+) ", avion.__doc__.split("DECISIONS")[1].split("Missing")[0], re.MULTILINE
    )
    tagged = re.findall(r"# DECISION \((\w+)\)", (ROOT / "avion.py").read_text())
    assert set(listed) == set(tagged) and len(listed) == len(set(listed)) > 10


def test_every_flag_is_read():
    names = "avion.py", "common.py", "data.py"
    source = "".join((ROOT / name).read_text() for name in names)
    for field in dataclasses.fields(avion.Config):
        assert re.search(rf"\bcfg\.{field.name}\b", source) or field.name in ("embed_dim",), (
            field.name
        )


def test_recipes_only_set_known_fields_of_the_right_type():
    types = {field.name: field.type for field in dataclasses.fields(avion.Config)}
    for name, recipe in avion.RECIPES.items():
        for key, value in recipe.items():
            assert isinstance(value, types[key]), (name, key)
        avion.check(config("--recipe", name, "--init", "random"))


def test_recipes_that_start_from_other_weights_need_them(args, tmp_path, capsys):
    """Without --init a paper's recipe is refused by its name; `random` trains from nothing, and runs resume with it."""
    named = [name for name in avion.RECIPES if not name.startswith("toy")]
    assert len(named) == 7
    for name in named:
        message = refused(*args, "--recipe", name, "--out", tmp_path / "o")
        assert f"--recipe {name}" in message and "--init random" in message
        assert ("CLIP's weights" in message) == name.startswith("ego4d")
    assert not (tmp_path / "o").exists()
    small = {"model": "clip_toy", "size": 64, "num_classes": 0, "mixup": 0.0}
    for name in ("ego4d", "ek100_cls"):
        cfg = config(
            *args, "--recipe", name, "--init", "random", "--max-steps", 1, "--out", tmp_path / name
        )
        for _ in range(2):
            avion.main(dataclasses.replace(cfg, **small))
        out = capsys.readouterr().out
        assert out.count("loaded") == 0 and out.count("steps 1 to 1") == 1


LLM = ["--recipe", "ego4d_llm"]
ROWS = {  # every row of the paper: Tables 1-4, Fig. 6, Fig. 3; F2 and F5 need hardware, and T5, F7 are tpt_mae.py's
    "T1 original": (["--recipe", "ego4d"], "9765 steps"),
    "T1 LLM": (LLM, "19530 steps"),
    "T2 zero-shot B": (["--recipe", "ego4d", "--eval-frames", 16], "784"),
    "T2 zero-shot L": (["--recipe", "ego4d_llm_l14"], "44640 steps"),
    "T2 fine-tuned B": (["--recipe", "ek100_mir"], "13100 steps"),
    "T2 fine-tuned L": (["--recipe", "ek100_mir_l14"], "at batch 192"),
    "T3 B": (["--recipe", "ek100_cls"], "peak lr 0.012"),
    "T3 L": (["--recipe", "ek100_cls_l14"], "4096 patches"),
    "T4 first": (
        [
            "--recipe",
            "ego4d",
            "--attention",
            "plain",
            "--loader",
            "decode_then_crop",
            "--no-grad-checkpoint",
        ],
        "in 24 GB: 32,",  # of 2, 4, 8 ... 256 clips; the paper ran 64 a GPU, and 256 did not fit
    ),
    "T4 last": (["--recipe", "ego4d"], "in 24 GB: 256,"),
    "F3": (["--recipe", "ego4d"], " 62.4\n"),
    "F6 512": (["--recipe", "ego4d", "--batch-size", 512], "39060 steps"),  # 2,048: T1
    "F6 1024": (["--recipe", "ego4d", "--batch-size", 1024], "19530 steps"),
    "F6 LLM 512": ([*LLM, "--batch-size", 512], "78125 steps"),
    "F6 LLM 1024": ([*LLM, "--batch-size", 1024], "39060 steps"),
}


@pytest.fixture(scope="module")
def counted():
    """common.count_macs, once for each encoder and size that the rows share."""
    known, count = {}, common.count_macs

    def look_up(encoder, given, *more):
        key = sum(p.numel() for p in encoder.parameters()), given.shape
        if key not in known:
            known[key] = count(encoder, given, *more)
        return known[key]

    return look_up


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_paper_has_a_plan(row, counted, blocks_by_hand, capsys, monkeypatch):
    monkeypatch.setattr(common, "count_macs", counted)
    flags, words = ROWS[row]
    avion.main(config("--plan", *flags))
    out = capsys.readouterr().out
    assert words in out and "GMACs" in out and "attention %" in out
    used = re.search(r"([\d.]+) GB a GPU, an estimate; largest --micro-batch in 24 GB", out)
    assert float(used[1]) < 24 or row == "T4 first"  # the recipes fit the paper's cards


def test_memory_of_the_papers_batch(capsys):
    """Table 1: 256 clips a GPU take 19 GB, of which the count has all but what an uncompiled LayerNorm keeps in float32
    and the allocator loses. Sec. 4.1: without recomputed blocks they don't fit 24; half on 16 GPUs."""
    cfg = config("--recipe", "ego4d")
    with torch.device("meta"):
        net = avion.build(cfg, "clip")
    used, fitting = [], []
    for change in (
        {},
        {"grad_checkpoint": False},
        {"gpus": 16},
        {"gpu_gb": ("11",)},
        {"precision": "fp32"},
    ):
        changed = dataclasses.replace(cfg, **change)
        common.print_memory(changed, [avion.memory(changed, net, 785)])
        used.append(float(re.search(r"([\d.]+) GB a GPU", line := capsys.readouterr().out)[1]))
        fitting.append(line.split("micro-batch in ")[1].strip())
    weights = sum(p.numel() for p in net.parameters())
    pixels = 4 * 3 * 224 * 224
    tokens = 785 * 768 + 77 * 512
    # Weight, gradient, AdamW's two, a copy in half precision; 10 bytes a pixel, and all clips as bytes; in half
    # precision the inputs of 12 blocks, and 42 bytes a token and channel of one that is at work (as in test_tpt.py).
    expected = 2**30 + 18 * weights + 256 * (11 * pixels + (12 * 2 + 42) * tokens)
    assert used[0] == used[3] == pytest.approx(expected / 2**30, rel=0.02) and 15 < used[0] < 19
    assert used[1] > 70 and used[4] > 1.2 * used[0]
    assert 0.5 * used[0] < used[2] < 0.7 * used[0]  # weights and their gradients stay
    assert fitting[0] == "24 GB: 256, 80 GB: 256" and fitting[3] == "11 GB: 128"


def test_rows_of_other_programs(blocks_by_hand, capsys):
    """Table 5 is tpt_mae.py's with one stage of 16 frames; what needs other hardware is the benchmark's; Eq. 3."""
    import bench_avion

    import tpt_mae

    tpt_mae.main(
        common.parse(tpt_mae.Config, tpt_mae.RECIPES, ["--plan", "--recipe", "videomae_k400"])
    )
    assert (
        "16" in capsys.readouterr().out
        and "tpt_mae.py with one stage of 16 frames" in avion.__doc__
    )
    assert all(
        f"    {name} " in bench_avion.__doc__ for name in ("table4", "fig3", "fig4", "fig5", "fig7")
    )
    assert "Fig. 2 is" in bench_avion.__doc__ and "Figs. 2 and 5 need 8 GPUs" in avion.__doc__
    avion.main(config("--plan", "--recipe", "ego4d", "--batch-size", 1024))
    assert "up to 15.6 s" in capsys.readouterr().out


def test_parameters_and_multiply_adds(blocks_by_hand, capsys):
    """CLIP ViT-B/16's sizes: 86.2 M with its 768 x 512 projection, 63.4 M text; 4 frames of it."""
    avion.main(config("--plan", "--recipe", "ego4d"))
    out = capsys.readouterr().out
    with torch.device("meta"):
        net = avion.build(config("--recipe", "ego4d", "--embed-dim", 512, "--frames", 1), "clip")
    count = sum(p.numel() for p in net.parameters())
    # CLIP's 149,620,737, less 24 key biases (12 x 768 + 12 x 512), plus PE_t of one frame
    assert count == 149_620_737 - 12 * (768 + 512) + 768
    assert "149.3 M" in out


# ---- training --------------------------------------------------------------------------------------------------------

CHOICES = [
    [f"--{field.name.replace('_', '-')}", choice]
    for field in dataclasses.fields(avion.Config)
    for choice in field.metadata["choices"] or ()
    if field.name != "task"
    and choice not in ("flash", "clip_b16", "clip_l14")  # no GPU here; too large for a test
]
CLS = ["--recipe", "toy_cls", "--init", ""]


@pytest.mark.parametrize(
    "flags",
    [
        *CHOICES,
        ["--micro-batch", "2", "--crop", "--flip", "--grad-checkpoint", "--drop-path", "0.3"],
        ["--freeze-temperature", "--no-skip-duplicates", "--patch-dropout", "0", "--clip-grad", "1"],
        ["--recipe", "toy_mir", "--init", "", "--micro-batch", "2", "--min-relevancy", "0.1"],
        [*CLS, "--mixup", "0.8", "--cutmix", "1", "--micro-batch", "2", "--dropout", "0.5", "--optimizer", "sgd",
         "--start-lr", "1e-6", "--label-smoothing", "0.1", "--drop-path", "0.1"],
        ["--eval-frames", "16", "--embed-dim", "32"],
    ],
)  # fmt: skip
def test_every_choice_trains_a_step(flags, args, tmp_path, monkeypatch):
    monkeypatch.setitem(avion.MODELS, "clip_toy", avion.MODELS["clip_toy"] | {"depth": 2})
    avion.main(config(*args, "--max-steps", "2", "--out", tmp_path, *flags))
    log = records(tmp_path)
    assert [r["step"] for r in log] == [1, 2, 2] and all(math.isfinite(r["loss"]) for r in log[:2])


def test_frozen_and_learned_temperature(args, tmp_path):
    """Frozen it stays at 0.07; learned it moves, and is clamped at 0.01."""
    for name, flags in (
        ("frozen", ["--freeze-temperature"]),
        ("hot", ["--lr", "9", "--warmup-epochs", "0"]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if name == "hot":  # everything pulls at the temperature alone
                patch.setattr(
                    common,
                    "contrastive_loss",
                    lambda v, t, scale, same: 0 * (v + t).sum(1) - scale.log(),
                )
            avion.main(config(*args, "--max-steps", 2, "--out", tmp_path / name, *flags))
    values = {n: torch.load(tmp_path / n / "last.pt", weights_only=True)["model"]["logit_scale"].item()
              for n in ("frozen", "hot")}  # fmt: skip
    assert values["frozen"] == pytest.approx(math.log(1 / 0.07)) and values["hot"] == pytest.approx(
        math.log(100)
    )


def test_text_lr_is_of_the_text_encoder_only(args, tmp_path):
    """--text-lr 0: after two steps its weights are as built, weight decay included; all others' rate is the run's."""
    avion.main(
        config(
            *args,
            "--max-steps",
            2,
            "--warmup-epochs",
            0,
            "--text-lr",
            0,
            "--out",
            tmp_path / "still",
        )
    )
    avion.main(
        config(
            *args,
            "--max-steps",
            2,
            "--warmup-epochs",
            0,
            "--text-lr",
            0.5,
            "--out",
            tmp_path / "half",
        )
    )
    still, half = (torch.load(tmp_path / name / "last.pt") for name in ("still", "half"))
    torch.manual_seed(0)
    built = avion.build(config(*args), "clip", 514).state_dict()
    text = {k for k in built if k.startswith("textual.")}
    assert text and all(torch.equal(still["model"][k], built[k]) for k in text)
    assert not torch.equal(
        still["model"]["visual.patch_embed.weight"], built["visual.patch_embed.weight"]
    )
    assert not torch.equal(
        half["model"]["textual.token_embedding.weight"], built["textual.token_embedding.weight"]
    )
    rates = {g["lr"] for g in half["optimizer"]["param_groups"]}
    assert len(rates) == 2 and min(rates) == pytest.approx(0.5 * max(rates))


def test_learning_rates(args, tmp_path):
    """App. B.2: from 1e-6 in a line to the peak in the first epoch, then a cosine to the end; B.1: fixed."""
    avion.main(
        config(
            *args,
            "--epochs",
            2,
            "--lr",
            1e-3,
            "--start-lr",
            1e-4,
            "--min-lr",
            5e-4,
            "--out",
            tmp_path / "a",
        )
    )
    rates = [r["lr"] for r in records(tmp_path / "a") if "lr" in r]
    expected = [1e-4 + 9e-4 * s / 6 for s in range(6)] + [
        5e-4 + 5e-4 * (1 + math.cos(math.pi * s / 6)) / 2 for s in range(6)
    ]
    assert rates == pytest.approx(expected)
    fixed = config("--recipe", "ego4d")
    assert {common.cosine(s, 100, 0, fixed.lr, fixed.min_lr) for s in range(100)} == {3e-5}


def test_kill_and_resume_is_exact(args, tmp_path, monkeypatch):
    """4 steps = 2 steps, SIGTERM, 2 more, bit for bit, with micro-batches, patch dropout and drop path."""
    flags = [
        *args,
        "--max-steps",
        "4",
        "--micro-batch",
        "2",
        "--drop-path",
        "0.2",
        "--no-freeze-temperature",
    ]
    avion.main(config(*flags, "--out", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        advance = common.Run.advance
        patch.setattr(common.Run, "advance", lambda run, step, total: (
            advance(run, step, total), setattr(run, "stopped", signal.SIGTERM if step == 2 else 0)))  # fmt: skip
        with pytest.raises(SystemExit) as end:
            avion.main(config(*flags, "--out", tmp_path / "cut"))
    assert end.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "cut/last.pt", weights_only=True)["at"]["step"] == 2
    avion.main(config(*flags, "--out", tmp_path / "cut"))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        for name in ("whole", "cut")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    numbers = [[{k: r.get(k) for k in ("step", "loss", "val_map", "val_action")} for r in records(tmp_path / n)]
               for n in ("whole", "cut")]  # fmt: skip
    assert numbers[0] == numbers[1] and len(numbers[0]) == 5


DRIVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, common, avion
for argv in json.loads({jobs!r}):
    def keep(gradients):
        if os.environ["RANK"] == "0":
            torch.save(gradients, argv[-1] + "/gradients.pt")
        raise InterruptedError
    torch.nn.utils.get_total_norm = keep
    try:
        avion.main(common.parse(avion.Config, avion.RECIPES, argv))
    except InterruptedError:
        pass
"""


def gradients(*argv):
    """The gradients of the first step of a run with these flags, in this process."""
    kept = []

    def keep(tensors):
        kept.extend(tensors)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", keep)
        with pytest.raises(InterruptedError):
            avion.main(config(*argv))
    return kept


def same_gradient(one, other, overall=1e-6):
    """1e-6 overall, 1e-5 a tensor."""
    norm = lambda tensors: sum(t.double().square().sum() for t in tensors).sqrt().item()
    difference = [a - b for a, b in zip(one, other, strict=True)]
    print("relative gradient difference", norm(difference) / norm(one))
    assert norm(difference) <= overall * norm(one)
    assert all(
        norm([d]) <= 1e-5 * max(norm([g]), 1e-3 * norm(one))
        for d, g in zip(difference, one, strict=True)
    )


MIXED = ["--recipe", "toy_cls", "--init", "", "--mixup", "0.8", "--cutmix", "1", "--dropout", "0.5"]


def test_ranks_and_micro_batches_give_the_same_gradient(args, told, tmp_path, trained, capsys):
    """1 process, the full batch = 4 micro-batches = 2 processes = 2 x 2, drop path and patch dropout on, temperature
    learned; so for mixed labels, whose loss needs no cache. And evaluation on 2 processes counts each clip once."""
    flags = [*args, "--batch-size", "8", "--drop-path", "0.3", "--patch-dropout", "0.5"]
    micro = ["--micro-batch", "2"]
    lists = ["--val-list", told / "val.jsonl", "--data-root", told / "chunks", "--workers", 0]
    evaluation = ["--task", "eval", *lists, "--init", trained / "best.pt"]
    cases = {"two": [], "both": micro, "two-mixed": MIXED, "both-mixed": [*MIXED, *micro]}
    jobs = [[*flags, *extra, "--out", tmp_path / name] for name, extra in cases.items()] + [
        evaluation
    ]
    jobs = json.dumps([[str(word) for word in job] for job in jobs])
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT), jobs=jobs))
    process = command(
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", tmp_path / "driver.py"
    )
    one, mixed = (
        gradients(*flags, *extra, "--out", tmp_path / "one")
        for extra in ([], [*MIXED, "--overwrite"])
    )
    same_gradient(one, gradients(*flags, *micro, "--out", tmp_path / "four"))
    same_gradient(
        mixed, gradients(*flags, *MIXED, *micro, "--out", tmp_path / "four", "--overwrite")
    )
    capsys.readouterr()
    avion.main(config(*evaluation))
    alone = capsys.readouterr().out
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in cases:
        same_gradient(
            mixed if "mixed" in name else one,
            torch.load(tmp_path / name / "gradients.pt", weights_only=True),
        )
    assert (
        len(one) > 60 and "val_clips 8" in alone and "val_unread 0" in alone and out.endswith(alone)
    )


def test_micro_batches_of_the_max_margin_loss(args, tmp_path):
    """To 3e-6 overall (1.2e-6 measured)."""
    flags = [*args, "--recipe", "toy_mir", "--init", "", "--batch-size", 8, "--patch-dropout", 0.5]
    same_gradient(
        *(gradients(*flags, "--micro-batch", n, "--out", tmp_path / str(n)) for n in (8, 2)), 3e-6
    )


def test_loading_overlaps_with_the_step(args, tmp_path, monkeypatch):
    """data_wait below 5 % on the toy's chunks, with one loader process, where a step takes three times its loading."""
    avion.main(
        config(*args, "--max-steps", 3, "--out", tmp_path / "alone")
    )  # no process: all loading is waiting
    log = [r for r in records(tmp_path / "alone") if "data_wait" in r]
    loading = max(
        r["data_wait"] * 4 / r["clips_per_second"] for r in log
    )  # seconds of a batch of 4
    step = common.cached_step
    monkeypatch.setattr(
        common, "cached_step", lambda *parts: (time.sleep(max(0.3, 3 * loading)), step(*parts))[1]
    )
    avion.main(config(*args, "--workers", 1, "--max-steps", 6, "--out", tmp_path / "ahead"))
    waits = [r["data_wait"] for r in records(tmp_path / "ahead") if "data_wait" in r]
    assert len(waits) == 6 and np.median(waits[2:]) < 0.05, waits


def test_recipes_of_the_paper_train_on_published_formats(told, tmp_path):
    """ego4d on a pickle, then ek100_mir and ek100_cls on EK-100's files and chunk folders, each for 2 steps and from
    the run before; zero-shot evaluation of the first, of both tasks."""
    rows = [json.loads(line) for line in (told / "train.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["visible"] and r["video"].startswith("train_00000")]
    (tmp_path / "a.pkl").write_bytes(
        pickle.dumps([("train_00000", r["start"], r["end"], [r["text"], "again"]) for r in rows])
    )
    words = [r["text"].split(" ", 3) for r in rows]  # a, colour, shape, motion
    verbs, nouns = (sorted({w[k] for w in words}) for k in (3, 2))
    (tmp_path / "t.csv").write_text(EK + "".join(
        ek_row(i, r["text"], verbs.index(w[3]), [nouns.index(w[2])], f"00:00:{r['start']:05.2f}", f"00:00:{r['end']:05.2f}")
        for i, (r, w) in enumerate(zip(rows, words, strict=True))))  # fmt: skip
    (tmp_path / "P01").mkdir()
    (tmp_path / "P01/P01_01.MP4").symlink_to(told / "chunks" / "train_00000.mp4")
    small = ["--model", "clip_toy", "--size", 64, "--batch-size", 4, "--max-steps", 2, "--workers", 0, "--log-every", 1,
             "--val-list", tmp_path / "t.csv"]  # fmt: skip
    ek100 = ["--train-list", tmp_path / "t.csv", "--data-root", tmp_path, "--num-classes", 0]
    for recipe, flags in (
        (
            "ego4d",
            [
                "--init",
                "random",
                "--train-list",
                tmp_path / "a.pkl",
                "--data-root",
                told / "chunks",
                "--val-root",
                tmp_path,
            ],
        ),
        ("ek100_mir", [*ek100, "--init", tmp_path / "ego4d/best.pt"]),
        ("ek100_cls", [*ek100, "--init", tmp_path / "ek100_mir/best.pt"]),
    ):
        avion.main(config("--recipe", recipe, *small, *flags, "--out", tmp_path / recipe))
        *log, result = records(tmp_path / recipe)
        assert len(log) == 2 and all(math.isfinite(r["loss"]) for r in log)
        assert result["val_clips"] == len(rows) and 0 <= result["val_action"] <= 100
        assert ("val_map" in result) == (recipe != "ek100_cls")


# ---- the real command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(told, tmp_path_factory):
    """A run folder of a few dozen steps on the small toy set, through the real command line."""
    out = tmp_path_factory.mktemp("trained")
    lists = [
        "--train-list",
        told / "train.jsonl",
        "--val-list",
        told / "val.jsonl",
        "--data-root",
        told / "chunks",
    ]
    process = command(
        "avion.py", *lists, *RUN, "--batch-size", 8, "--epochs", 16, "--eval-every", 8, "--out", out
    )
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "bytes" in stdout and "complete: val_map" in stdout
    return out


def test_training_lowers_the_loss(trained):
    losses = [r["loss"] for r in records(trained) if "loss" in r]
    assert len(losses) == 48 and np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    results = [r for r in records(trained) if "val_map" in r]
    assert [r["step"] for r in results] == [24, 48]
    keys = {"val_map_v2t", "val_map_t2v", "val_ndcg", "val_r1_v2t", "val_r1_t2v", "shuffled_map", "shuffled_ndcg",
            "val_action", "val_verb", "val_noun", "val_clips", "val_unread"}  # fmt: skip
    assert keys <= set(results[0])


def test_eval_features_search_predict(trained, told, cli):
    lists = [
        "--val-list",
        told / "val.jsonl",
        "--data-root",
        told / "chunks",
        "--workers",
        0,
        "--out",
        trained,
    ]
    code, stdout, err = cli(
        "avion.py", "--task", "search", "--query", "a red square moves left", *lists
    )
    assert code == 0, err
    found = re.findall(r"^(-?[\d.]+) +([\d.]+) - ([\d.]+) s  (\S+)$", stdout, re.MULTILINE)
    assert 5 <= len(found) <= 10 and all(path.endswith("val_00000.mp4") for *_, path in found)
    scores = [float(score) for score, *_ in found]
    assert scores == sorted(scores, reverse=True) and all(-1 <= s <= 1 for s in scores)
    spans = sorted((float(a), float(b)) for _, a, b, _ in found)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))  # no overlaps


def test_tasks_in_process(trained, told, tmp_path, capsys):
    lists = ["--val-list", told / "val.jsonl", "--data-root", told / "chunks", "--workers", 0]
    avion.main(config("--task", "eval", "--init", trained / "best.pt", *lists))
    best = torch.load(trained / "best.pt", weights_only=True)["at"]["best"]
    assert f"val_map {best:.4g}" in capsys.readouterr().out
    avion.main(
        config("--task", "features", "--init", trained / "best.pt", "--out", tmp_path, *lists)
    )
    features = np.load(tmp_path / "features.npy")
    assert features.shape == (8, 64) and np.abs(np.linalg.norm(features, axis=1) - 1).max() < 1e-5
    video = min((told / "videos").glob("val*.mp4"))
    capsys.readouterr()
    avion.main(config("--task", "predict", "--init", trained / "best.pt", "--input", video, *lists))
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{video}: ") and len(re.findall(r"[\d.]+ %", line)) == 5
    message = refused(
        "--task", "search", "--query", "x", "--init", trained / "best.pt", "--input", "gone.mp4"
    )
    assert "--input" in message and "gone.mp4" in message


def test_fine_tuning_from_a_pretrained_run(trained, told, args, tmp_path, capsys):
    """toy_mir and toy_cls start from the contrastive run: nothing but the new head is left at init."""
    for recipe, left in (("toy_mir", "left at init 0"), ("toy_cls", "left at init 2 (head.weight")):
        avion.main(config("--recipe", recipe, "--init", trained / "best.pt", *args, "--max-steps", 2,
                          "--out", tmp_path / recipe))  # fmt: skip
        assert left in capsys.readouterr().out
    avion.main(
        config(
            "--task",
            "eval",
            "--recipe",
            "toy_cls",
            "--init",
            tmp_path / "toy_cls/best.pt",
            *args[2:],
        )
    )
    assert "val_action" in capsys.readouterr().out
    video = min((told / "videos").glob("val*.mp4"))
    avion.main(
        config(
            "--task",
            "predict",
            "--init",
            tmp_path / "toy_cls/best.pt",
            "--workers",
            0,
            "--input",
            video,
        )
    )
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{video}: ") and len(re.findall(r":\w+ \w+ [\d.]+ %", line)) == 5, line
    message = refused(
        "--task", "search", "--query", "x", "--init", tmp_path / "toy_cls/best.pt", *args[2:]
    )
    assert "text encoder" in message


def test_zero_shot_by_hand(told, trained):
    """The class of a clip is that of the mean narration feature it is closest to; verbs and nouns add actions' shares.
    On the training clips, which this small model knows."""
    cfg, state, ctx = (
        config("--workers", 0),
        avion.read_init(trained / "best.pt"),
        common.launch("fp32"),
    )
    tokenizer, videos = avion.BPETokenizer(), narrations([told / "train.jsonl"], told / "chunks")
    net = avion.build(cfg, "clip", tokenizer.size)
    net.load_state_dict(state["model"])
    actions = avion.Actions(lists=[videos])
    result = avion.validate(cfg, ctx, net, videos, actions, tokenizer)
    net.eval()
    features, rows, _ = avion.encode_clips(cfg, ctx, net, videos)
    names = sorted({videos.text(i) for i in range(24)})
    texts = net.encode_text(tokenizer(names)).detach()
    parts = {
        "val_action": lambda t: t,
        "val_verb": lambda t: t.split(" ", 3)[3],
        "val_noun": lambda t: t.split(" ")[1:3],
    }
    for key, part in parts.items():
        right = 0
        for i in range(24):
            shares, totals = (net.logit_scale.exp() * features[i] @ texts.T).softmax(0).tolist(), {}
            for name, share in zip(names, shares, strict=True):
                totals[str(part(name))] = totals.get(str(part(name)), 0) + share
            right += max(totals, key=totals.get) == str(part(videos.text(i)))
        assert result[key] == pytest.approx(100 * right / 24), key
    assert len(rows) == len(videos) and result["val_noun"] > 50 > 100 / len(
        {str(parts["val_noun"](name)) for name in names}
    )


def test_unread_clips_are_left_out(trained, told, tmp_path, capsys):
    """One validation clip of a missing video: named, NaN in features, not counted; the metrics still are."""
    lines = (told / "val.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if json.loads(line)["visible"])
    lines[first] = json.dumps(json.loads(lines[first]) | {"video": "gone"})
    (tmp_path / "v.jsonl").write_text("\n".join(lines))
    flags = ["--init", trained / "best.pt", "--workers", 0, "--val-list", tmp_path / "v.jsonl",
             "--data-root", told / "chunks", "--out", tmp_path]  # fmt: skip
    avion.main(config("--task", "eval", *flags))
    out = capsys.readouterr().out
    assert "val_clips 7" in out and "val_unread 1" in out
    avion.main(config("--task", "features", *flags))
    assert "gone" in capsys.readouterr().out
    assert np.isnan(np.load(tmp_path / "features.npy")).all(1).sum() == 1


def test_bench_prints_the_papers_tables(told, capsys, monkeypatch):
    """Table 4 and Figs. 3, 4, 5, 7, measured here, with the paper's numbers beside them; and the tokenizer and metrics."""
    import bench_avion

    flags = ["--list", told / "train.jsonl", "--short-root", told / "chunks", "--long-root", told / "videos", "--rounds",
             1, "--batch", 4, "--workers", 0, "--processes", 0, "--pairs", 60, 40]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench_avion.py", *map(str, flags)])
    bench_avion.main()
    tables = [part.splitlines()[2:] for part in capsys.readouterr().out.split("\n\n")[1:]]
    table4, fig3, fig4, fig5, fig7, ((merges, new, known, seconds, memory),) = (
        [line.strip("| ").split(" | ") for line in part] for part in tables
    )
    assert len(table4) == 8 and table4[-1][-3:] == ["0.9", "5.9", "347"]
    assert all(float(row[5]) > float(row[4]) > 0 for row in table4)
    assert len(fig3) == 3 and fig3[0][5] == "62.4%"
    saved = {(shape, name): float(size) for shape, name, _, size, *_ in fig4}
    assert len(fig4) == 6 and [fig4[i][-2:] for i in (0, -1)] == [["39.4", "28"], ["62.8", "304"]]
    for shape in ("joint", "divided"):
        assert saved[shape, "plain"] > saved[shape, "efficient"] > saved[shape, "recomputed"]
    assert len(fig5) == 2 and all(
        float(row[2]) * float(row[4]) == pytest.approx(1000, rel=0.02) for row in fig5
    )
    assert [row[-2:] for row in fig7] == [["0.74", "2.4"], ["0.25", "1.55"]]
    assert merges == "bytes" and min(map(float, (new, known, seconds, memory))) > 0


def test_copying_three_files_runs(cli, args, tmp_path):
    for name in ("avion.py", "common.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    code, _, err = cli("avion.py", *args, "--max-steps", 1, cwd=tmp_path)
    assert code == 0 and (tmp_path / "runs/avion-toy/last.pt").exists(), err


def test_keyed_dropout(tiny):
    """Half of the features, the same for a clip anywhere, scaled up; none at test."""
    torch.manual_seed(0)
    encoder = avion.VideoEncoder("tiny", 1, 32)
    net = avion.VideoClassifier(encoder, 3, dropout=0.5)
    clips, keys = (
        torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8),
        make_key(torch.arange(2)),
    )
    mask = (uniform(keys, "dropout", 64) >= 0.5).float() * 2
    torch.testing.assert_close(
        net(clips, keys), net.head(encoder(clips) * mask), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(net(clips[1:], keys[1:]), net(clips, keys)[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(clips), net.head(encoder(clips)), atol=1e-6, rtol=1e-6)


def test_scores_of_classes_are_single_precision():
    """Where the model runs in half precision too: a score is printed to its tenth of a percent."""
    head, features = torch.nn.Linear(4, 3), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = avion.class_logits(SimpleNamespace(head=head), features, head.weight.detach())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, features @ head.weight.T + head.bias)
