"""Published checkpoints (pretrained.py) equal transformers' models of the same files; what is not one of them is
refused in one line (pip install -e '.[test,peers,pretrained]'). Every checkpoint is made here, tiny and random.

    MINQ_PATIENT=FOLDER pytest tests/test_pretrained.py       also a real one: an encoder, as sentence-transformers'
"""
import contextlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minq.damage import last_hidden
from minq.data import stdlib_source
from minq.runs import open_run
from running import run, saved
from serving import COMMIT, as_hub

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
resource = pytest.importorskip("resource")  # not on Windows

SENTENCE = "the quick brown fox jumps over the lazy dog. "
MEAN, STD = [0.48, 0.42, 0.55], [0.27, 0.31, 0.19]  # of pixels: nothing like 0.5
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# ---- tiny checkpoints ----

def perturbed(model):
    """In evaluation mode, with biases and LayerNorms that matter."""
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def bert(architecture="BertForMaskedLM", **changed):
    torch.manual_seed(0)
    config = dict(vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100,
                  max_position_embeddings=20)
    return perturbed(getattr(transformers, architecture)(transformers.BertConfig(**config | changed)))


def opt(architecture="OPTForCausalLM", **changed):
    torch.manual_seed(0)
    config = dict(vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=100,
                  max_position_embeddings=20, word_embed_proj_dim=48)
    return perturbed(getattr(transformers, architecture)(transformers.OPTConfig(**config | changed)))


def vit(**changed):
    torch.manual_seed(0)
    config = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100, image_size=32,
                  patch_size=8, num_labels=11)
    return perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**config | changed)))


def vocabulary(specials=BERT_SPECIALS):
    """word -> id: the sentence's words, and "brown" from pieces."""
    words = re.findall(r"\w+|\.", SENTENCE.replace("brown", ""))
    return {word: i for i, word in enumerate(dict.fromkeys((*specials, *words, "br", "##own")))}


def wordpiece(specials=BERT_SPECIALS):
    """BERT's tokenizer. Were it to add special tokens, they would be "the" and "."."""
    vocab = vocabulary(specials)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing((".", vocab["."]), ("the", vocab["the"]))
    return tokenizer


def bpe():
    """OPT's tokenizer: four special tokens, all bytes, and some pairs of them."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([SENTENCE * 9], vocab_size=290, show_progress=False,
                                  special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    return tokenizer


def publish(model, folder, **options):
    """The model's folder, as it would be on the Hub."""
    model.save_pretrained(folder, **options)
    if model.config.model_type != "vit":
        (wordpiece if model.config.model_type == "bert" else bpe)().save(str(folder / "tokenizer.json"))
    return folder


def edit(folder, **changed):
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def edit_weights(folder, change):
    """Save the weights anew, as `change` makes them from {name: tensor}."""
    path = folder / "model.safetensors"
    state = change(safetensors.load_file(path))
    safetensors.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


# ---- comparison ----

def opened(folder, out, *flags):
    """The run that the script makes of a folder."""
    run("pretrained.py", folder, "--out", out, *flags)
    return open_run(out, torch.device("cpu"))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def assert_same(run, theirs, output="logits"):
    """The run's model and transformers', on random tokens: all positions, and fewer."""
    config = run.model.config
    full = torch.randint(config.vocab_size, (3, config.seq_len), generator=torch.Generator().manual_seed(1))
    for tokens in (full, full[:, :5]):
        ours = run.model(tokens) if output == "logits" else last_hidden(run.model, (tokens,))
        assert_close(ours, theirs(tokens)[output])


@torch.no_grad()
def assert_same_vit(run, theirs, mean, std):
    size = run.model.config.image_size
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    assert_close(run.model(x), theirs((x - mean) / std))


# ---- equality: text ----

@pytest.mark.parametrize("model, output", [
    (lambda: bert(), "logits"),
    (lambda: transformers.BertForMaskedLM(bert().config).eval(), "logits"),  # biases zero, LayerNorms one
    (lambda: bert("BertForPreTraining"), "prediction_logits"),  # its other head is dropped
    (lambda: bert("BertModel"), "last_hidden_state"),
    (lambda: bert(hidden_act="relu", layer_norm_eps=1e-3, type_vocab_size=1), "logits"),
    (lambda: opt(), "logits"),
    (lambda: opt("OPTModel"), "last_hidden_state"),
    (lambda: opt(activation_function="gelu"), "logits"),
], ids=["bert", "bert-new", "bert-pretraining", "bert-encoder", "bert-other-settings", "opt", "opt-encoder", "opt-gelu"])
def test_text_models_equal_transformers(tmp_path, corpus, model, output):
    theirs = model()
    run = opened(publish(theirs, tmp_path / "hub"), tmp_path / "run", "--text", corpus)
    name = "logits" if output == "prediction_logits" else output
    assert_same(run, lambda tokens: {name: theirs(tokens)[output]}, name)
    assert run.model.config.seq_len == 20 and run.model.metric == ("sqnr" if type(theirs).__name__ == "BertModel" else "perplexity")


@pytest.mark.parametrize("make", [bert, opt])
def test_the_first_positions_are_kept(tmp_path, corpus, make):
    theirs = make()
    run = opened(publish(theirs, tmp_path / "hub"), tmp_path / "run", "--text", corpus, "--seq-len", 7)
    assert run.model.config.seq_len == run.data.seq_len == 7
    assert_same(run, theirs)


@pytest.mark.parametrize("make", [bert, opt])
def test_shards(tmp_path, corpus, make):
    theirs = make()
    folder = publish(theirs, tmp_path / "hub", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(opened(folder, tmp_path / "run", "--text", corpus), theirs)


@pytest.mark.parametrize("make", [bert, opt])  # all tied tensors are in it, under both of their names
def test_pytorch_model_bin(tmp_path, corpus, make):
    theirs = make()
    folder = publish(theirs, tmp_path / "hub")
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    assert_same(opened(folder, tmp_path / "run", "--text", corpus), theirs)


@pytest.mark.parametrize("make", [bert, opt])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(tmp_path, corpus, make, dtype):
    theirs = make().to(dtype)
    folder = publish(theirs, tmp_path / "hub")
    run = opened(folder, tmp_path / "run", "--text", corpus)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert_same(run, theirs.float())


def test_names_of_the_tensorflow_age(tmp_path, corpus):
    theirs = bert()
    folder = publish(theirs, tmp_path / "hub")
    rename = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    edit_weights(folder, lambda state: {rename(name): tensor for name, tensor in state.items()}
                 | {"bert.embeddings.position_ids": torch.arange(20)[None]})
    assert_same(opened(folder, tmp_path / "run", "--text", corpus), theirs)


# ---- equality: images ----

@pytest.mark.parametrize("preprocessor, mean, std", [
    ({"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}, MEAN, STD),
    ({"image_mean": MEAN, "image_std": STD, "do_normalize": False}, [0, 0, 0], [1, 1, 1]),
    (None, [0.5] * 3, [0.5] * 3),
], ids=["its own", "none", "by default"])
def test_vit_equals_transformers(tmp_path, cifar, preprocessor, mean, std):
    theirs = vit(layer_norm_eps=1e-3)
    folder = publish(theirs, tmp_path / "hub")
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    run = opened(folder, tmp_path / "run", "--images", cifar)
    assert_same_vit(run, lambda x: theirs(x).logits, mean, std)
    assert run.model.metric == "accuracy" and run.data.image_size == 32


def timm_vit(width, heads, layers=2, size=8, side=4, classes=12):
    """Random weights under timm's names, and the forward pass of its VisionTransformer, written out."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side ** 2, width), "patch_embed.proj.weight": (width, 3, size, size),
              "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
              "head.weight": (classes, width), "head.bias": (classes,)}
    for i in range(layers):
        for name, out, into in (("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 100, width), ("mlp.fc2", width, 100)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    w = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        w[name] *= 0.01  # so that the norms' epsilon matters

    def forward(x):
        linear = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        norm = lambda name, x: F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)
        x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=size).flatten(2).mT
        x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), dim=1) + w["pos_embed"]
        for i in range(layers):
            q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, dim=-1)
            of_heads = []
            for h in range(heads):
                own = slice(h * width // heads, (h + 1) * width // heads)
                scores = q[..., own] @ k[..., own].mT / (width / heads) ** 0.5
                of_heads.append(scores.softmax(dim=-1) @ v[..., own])
            x = x + linear(f"blocks.{i}.attn.proj", torch.cat(of_heads, dim=-1))
            x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))
        return linear("head", norm("norm", x)[:, 0])

    return w, forward


def publish_timm(folder, weights, **config):
    folder.mkdir()
    safetensors.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch8_32", "num_classes": 12, "global_pool": "token"} | config))
    return folder


@pytest.mark.parametrize("width, heads, config", [
    (48, 4, {"pretrained_cfg": {"mean": MEAN, "std": STD}, "model_args": {"num_heads": 4}}),
    (128, 2, {"pretrained_cfg": {"mean": MEAN, "std": STD}}),  # heads are 64 wide
    (128, 2, {"mean": MEAN, "std": STD}),  # as older files have it
], ids=["model_args", "by default", "flat"])
def test_timms_names(tmp_path, cifar, width, heads, config):
    weights, forward = timm_vit(width, heads)
    run = opened(publish_timm(tmp_path / "hub", weights, **config), tmp_path / "run", "--images", cifar)
    assert_same_vit(run, forward, MEAN, STD)


# ---- tokens ----

def tokens_of(out):
    return np.fromfile(out / "tokens.bin", dtype="<u2").tolist()


def words_of(out):
    return json.loads((out / "tokens.json").read_text())


def cutting(tokenizer):
    """As saved by who used it for batches of short texts."""
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=9999)
    return tokenizer


@pytest.mark.parametrize("make", [wordpiece, lambda: cutting(wordpiece())], ids=["plain", "truncates and pads"])
def test_tokenizer_json(tmp_path, corpus, make):
    folder = publish(bert(), tmp_path / "hub")
    make().save(str(folder / "tokenizer.json"))
    text_of_a_sentence(opened(folder, tmp_path / "run", "--text", corpus), tmp_path / "run")


def test_vocab_txt(tmp_path, corpus):
    folder = publish(bert(), tmp_path / "hub")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary()))
    text_of_a_sentence(opened(folder, tmp_path / "run", "--text", corpus), tmp_path / "run")


def text_of_a_sentence(run, out):
    words, sentence = list(vocabulary()), "the quick br ##own fox jumps over the lazy dog .".split()
    assert words_of(out) == words and [words[i] for i in tokens_of(out)] == 500 * sentence
    text = run.data.text
    assert [words[i] for i in (text.pad, text.cls, text.sep, text.mask)] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.mark.parametrize("options, found", [(None, "fox"), ({"do_lower_case": True}, "fox"), ({"do_lower_case": False}, "[UNK]")])
def test_vocab_txt_and_capitals(tmp_path, options, found):
    folder = publish(bert(), tmp_path / "hub")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary()))
    if options:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "text").write_text("FOX " * 300)
    opened(folder, tmp_path / "run", "--text", tmp_path / "text")
    assert {words_of(tmp_path / "run")[i] for i in tokens_of(tmp_path / "run")} == {found}


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json and merges.txt"])
def test_byte_level_bpe_loses_nothing(tmp_path, form):
    folder, text = publish(opt(), tmp_path / "hub"), "".join(f"{i}: {SENTENCE}é\n" for i in range(500))
    if form != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
        bpe().save_model(str(folder))
    (tmp_path / "text").write_text(text)
    run = opened(folder, tmp_path / "run", "--text", tmp_path / "text")
    tokens, words = tokens_of(tmp_path / "run"), words_of(tmp_path / "run")
    assert bpe().decode(tokens) == text
    shown = "".join(words[i] for i in tokens)
    assert shown.startswith("0:␣the␣quick") and shown.count("↵") == 500 and len(set(tokens)) > 20
    text = run.data.text
    assert [words[i] for i in (text.pad, text.cls)] == ["<pad>", "</s>"]  # OPT's texts start with </s>


@pytest.mark.slow
def test_the_standard_library_is_the_text_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrained.TEXT_BYTES", 100_000)
    opened(publish(opt(), tmp_path / "hub"), tmp_path / "run")
    assert bpe().decode(tokens_of(tmp_path / "run")) == stdlib_source()[:100_000].decode()


# ---- a run like any other ----

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders as on the Hub, by kind. Not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    models = {"encoder": bert("BertModel"), "masked": bert(), "opt": opt(), "vit": vit()}
    return {kind: publish(model, root / kind) for kind, model in models.items()}


def data_flags(kind, corpus, cifar):
    return ("--images", cifar) if kind == "vit" else ("--text", corpus)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, published, corpus, cifar):
    root = tmp_path_factory.mktemp("runs")
    for kind, folder in published.items():
        run("pretrained.py", folder, "--out", root / kind, "--eval-batches", 2, *data_flags(kind, corpus, cifar))
    return root


KINDS = ("encoder", "masked", "opt", "vit")


def quantized(folder, json_file, *flags):
    """The run's row of quantize.py's table."""
    run("quantize.py", folder, "--seeds", 1, "--batches", 1, "--device", "cpu", "--json", json_file, *flags)
    (row,) = json.loads(json_file.read_text())
    return row


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_quantize(runs, tmp_path, kind):
    row = quantized(runs / kind, tmp_path / "rows.json", "--sqnr", "--taps")
    w8a8, encoder = row["quantized"]["8x8"], kind == "encoder"
    assert row["metric"] == {"encoder": "sqnr", "vit": "accuracy"}.get(kind, "perplexity")
    assert (row["fp"] is None) == encoder and row["seed"] == 0 and row["attention"] == "vanilla"
    sqnr = w8a8 if encoder else w8a8["sqnr"]  # an encoder's metric is it
    assert {"mean", "std", "all"} <= sqnr.keys() and 10 < sqnr["mean"] < 60 and sqnr["all"] == [sqnr["mean"]]
    names = {tap["tap"] for tap in row["taps"]}
    assert {"queries", "layer_output", "all activations", "everything"} <= names and not any("_tap" in name for name in names)
    assert all(tap.keys() == {"tap", "metric", "sqnr"} for tap in row["taps"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_analyze(runs, tmp_path, kind):
    out, _ = run("analyze.py", runs / kind, "--batches", 1, "--out", tmp_path, "--device", "cpu")
    words = {"encoder": ("fox", "jumps", "lazy", "##own"), "opt": ("␣", "ox")}
    assert kind == "vit" or any(word in out for word in words.get(kind, words["encoder"]))
    out, _ = run("analyze.py", runs / kind, "--damage", "--batches", 1, "--out", tmp_path, "--device", "cpu")
    assert "layer_output" in out and "layer 2" in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_move(runs, tmp_path, monkeypatch, kind):
    shutil.copytree(runs / kind, tmp_path / "elsewhere" / "run")
    hidden = runs.with_name("hidden")
    runs.rename(hidden)
    monkeypatch.chdir(tmp_path)
    try:
        found = open_run("elsewhere/run", torch.device("cpu"))
    finally:
        hidden.rename(runs)
    assert torch.isfinite(found.model(*next(found.validation())[0])).all()


def test_the_checkpoint_tells_where_it_is_from(runs, published):
    args = saved(runs / "masked")["args"]
    assert args["source"] == str(published["masked"]) and args["revision"] is None
    assert len(args["weights_sha256"]) == 64 and args["mask_prob"] == 0.15 and saved(runs / "encoder")["args"]["mask_prob"] == 0


def test_the_report(published, tmp_path, corpus):
    out, err = run("pretrained.py", published["masked"], "--out", tmp_path / "run", "--text", corpus)
    sha256 = saved(tmp_path / "run")["args"]["weights_sha256"]
    assert "bert, 2 layers of width 48" in out and sha256 in out and f"python quantize.py {tmp_path / 'run'}" in out and not err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ---- what is refused ----

def refused(folder, out, *flags):
    """The one line, without "error: ". Nothing is left in or beside `out`."""
    before = sorted(out.parent.iterdir())
    stdout, err = run("pretrained.py", folder, "--out", out, *flags, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and not stdout
    assert sorted(out.parent.iterdir()) == before
    return err.removeprefix("error: ")


@pytest.fixture
def spoil(published, tmp_path):
    """A function that gives a copy of a published folder to be spoiled."""
    def copy(kind):
        return Path(shutil.copytree(published[kind], tmp_path / "hub" / kind))
    return copy


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("kind, changed, reason", [
    ("masked", {"hidden_size": "48"}, "hidden_size is '48'"),
    ("masked", {"hidden_size": True}, "hidden_size is True"),
    ("masked", {"hidden_size": None}, "hidden_size is None"),
    ("masked", {"hidden_size": 0}, "hidden_size is 0"),
    ("masked", {"hidden_size": 49}, "does not divide"),
    ("masked", {"num_attention_heads": 5}, "does not divide"),
    ("masked", {"num_attention_heads": -4}, "num_attention_heads is -4"),
    ("masked", {"num_hidden_layers": 3}, "has 2 layers; config.json says 3"),
    ("masked", {"num_hidden_layers": 1}, "has 2 layers; config.json says 1"),
    ("masked", {"num_hidden_layers": 999_999}, "has 2 layers"),
    ("masked", {"num_hidden_layers": 10 ** 30}, "num_hidden_layers is 1000"),
    ("masked", {"intermediate_size": 101}, "intermediate.dense.weight has shape (100, 48); config.json asks for (101, 48)"),
    ("masked", {"vocab_size": 98}, "word_embeddings.weight has shape (99, 48)"),
    ("masked", {"max_position_embeddings": 21}, "position_embeddings.weight has shape (20, 48)"),
    ("masked", {"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny'"),
    ("masked", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ("masked", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    ("masked", {"hidden_act": ["gelu"]}, "hidden_act is ['gelu']"),
    ("masked", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ("masked", {"is_decoder": True}, "is_decoder is True"),
    ("masked", {"quantization_config": {"load_in_8bit": True}}, "quantized"),
    ("masked", {"model_type": "roberta"}, "model_type is 'roberta'"),
    ("masked", {"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of bert, opt, vit"),
    ("masked", {"model_type": "distilbert"}, "model_type is 'distilbert'"),
    ("masked", {"model_type": ["bert"]}, "model_type is ['bert']"),
    ("masked", {"model_type": None}, "model_type is None"),
    ("masked", {"model_type": "timm"}, ""),
    ("masked", {"model_type": "opt"}, ""),
    ("masked", {"model_type": "vit"}, ""),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),  # OPT-350m
    ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim is 24"),
    ("opt", {"enable_bias": False}, "enable_bias is False"),
    ("opt", {"activation_function": "silu"}, "activation_function is 'silu'"),
    ("opt", {"max_position_embeddings": 23}, "embed_positions.weight has shape"),
    ("vit", {"image_size": 40}, "position_embeddings has shape"),
    ("vit", {"image_size": 30}, "does not divide"),
    ("vit", {"image_size": [32, 32]}, "image_size is [32, 32]"),
    ("vit", {"image_size": 800_000}, "position_embeddings has shape"),
    ("vit", {"patch_size": 4}, "has shape"),
    ("vit", {"num_channels": 1}, "num_channels is 1"),
    ("vit", {"qkv_bias": False}, "qkv_bias is False"),
])
def test_settings_that_are_wrong(spoil, tmp_path, corpus, cifar, kind, changed, reason):
    edit(spoil(kind), **changed)
    assert reason in refused(tmp_path / "hub" / kind, tmp_path / "run", *data_flags(kind, corpus, cifar))


@pytest.mark.parametrize("content, reason", [
    (None, "config.json: cannot be read"), ("{", "no JSON"), ("[1, 2]", "holds a list"), ("null", "holds a NoneType"),
    ("[" * 100_000, "no JSON"), ("\0", "no JSON"), (b"\xff\xfe", "no JSON"), ("{}", "model_type is None"), ('{"model_type": "bert"}', "is None"),
])
def test_config_json(spoil, tmp_path, content, reason):
    path = spoil("masked") / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refused(path.parent, tmp_path / "run")


@pytest.mark.parametrize("kind, change, reason", [
    ("masked", lambda s: s | {QUERY: s[QUERY].to(torch.int8)}, "query.weight is torch.int8"),
    ("masked", lambda s: {name: s[name] for name in s.keys() - {QUERY}}, "no tensor encoder.layer.1.attention.self.query.weight"),
    ("masked", lambda s: {name: s[name] for name in s.keys() - {"cls.predictions.bias"}}, "cls.predictions"),
    ("masked", lambda s: {name: s[name] for name in s.keys() - {"bert.embeddings.token_type_embeddings.weight"}}, "no tensor embeddings.token"),
    ("masked", lambda s: s | {QUERY: s[QUERY][:-1]}, "query.weight has shape (143, 48); config.json asks for (144, 48)"),
    ("masked", lambda s: s | {QUERY: s[QUERY][:, 1:]}, "has shape"),
    ("masked", lambda s: s | {QUERY: s[QUERY].sum()}, "has shape ()"),
    ("masked", lambda s: s | {"bert.embeddings.token_type_embeddings.weight": torch.zeros(0, 48)}, "token type embeddings"),
    ("masked", lambda s: s | {"bert.embeddings.token_type_embeddings.weight": torch.zeros(2, 1)}, "token type embeddings"),
    ("masked", lambda s: s | {"bert.encoder.layer.2.extra": torch.zeros(1)}, "has 3 layers"),
    ("masked", lambda s: s | {"bert.encoder.layer.1.adapter.weight": torch.zeros(1)}, "adapter.weight, for which minq's model has no place"),
    ("masked", lambda s: s | {QUERY.removeprefix("bert."): s[QUERY] + 1}, "twice"),
    ("masked", lambda s: s | {"cls.predictions.decoder.weight": torch.zeros(99, 48)}, "expected a tied output layer"),
    ("masked", lambda s: s | {"cls.predictions.decoder.bias": torch.ones(99)}, "expected"),
    ("masked", lambda s: s | {"classifier.weight": torch.zeros(2, 48)}, "BertForMaskedLM has classifier.weight"),
    ("opt", lambda s: s | {"lm_head.weight": torch.zeros(300, 48)}, "expected a tied output layer"),
    ("opt", lambda s: s | {"model.decoder.project_in.weight": torch.zeros(48, 48)}, "project_in.weight"),
    ("vit", lambda s: {name: s[name] for name in s.keys() - {"classifier.weight", "classifier.bias"}}, "no tensor classifier.weight"),
    ("vit", lambda s: s | {"vit.embeddings.cls_token": torch.zeros(48)}, "cls_token has shape (48,)"),
    ("vit", lambda s: s | {"vit.embeddings.cls_token": torch.zeros(0, 1, 48)}, "cls_token has shape (0, 1, 48)"),
    ("vit", lambda s: s | {"vit.embeddings.position_embeddings": torch.zeros(2, 17, 48)}, "position_embeddings has shape (2, 17, 48)"),
    ("vit", lambda s: s | {"vit.embeddings.patch_embeddings.projection.bias": torch.zeros(47)}, "projection.bias has shape (47,)"),
    ("vit", lambda s: s | {"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(48, 1, 8, 8)}, "expected (width, 3, size, size)"),
    ("vit", lambda s: s | {"vit.embeddings.mask_token": torch.zeros(1, 1, 48)}, "mask_token"),
])
def test_weights_that_are_wrong(spoil, tmp_path, corpus, cifar, kind, change, reason):
    edit_weights(spoil(kind), change)
    assert reason in refused(tmp_path / "hub" / kind, tmp_path / "run", *data_flags(kind, corpus, cifar))


def test_architectures_of_a_strange_form(spoil, tmp_path):
    for architectures in ("BertForMaskedLM", [1], 7, {}):
        folder = spoil("masked")
        edit(folder, architectures=architectures)
        edit_weights(folder, lambda state: state | {"strange": torch.zeros(1)})
        assert "strange" in refused(folder, tmp_path / "run")
        shutil.rmtree(folder)


def test_a_classifiers_head(tmp_path):
    reason = refused(publish(bert("BertForSequenceClassification"), tmp_path / "hub"), tmp_path / "run")
    assert "BertForSequenceClassification has classifier.bias" in reason


def test_opt_350m(tmp_path):
    reason = refused(publish(opt(do_layer_norm_before=False, word_embed_proj_dim=24), tmp_path / "hub"), tmp_path / "run")
    assert "do_layer_norm_before is False" in reason


@pytest.mark.parametrize("change, reason", [
    ({"model_args": {"num_heads": "four"}}, "num_heads is 'four'"), ({"model_args": {"num_heads": 0}}, "num_heads is 0"),
    ({"model_args": {"num_heads": 5}}, "does not divide"), ({"model_args": [4]}, "model_args"), ({"model_args": {"act_layer": "relu"}}, "act_layer"),
    ({"pretrained_cfg": "none"}, "pretrained_cfg"), ({"pretrained_cfg": {"mean": [0.5, "0.5", 0.5]}}, "mean"),
    ({"pretrained_cfg": {"std": [0.5, 0.5]}}, "expected three"), ({"pretrained_cfg": {"std": [0.5, 0.5, 0]}}, "deviation"),
    ({"pretrained_cfg": {"mean": [0.5, 0.5, float("nan")]}}, "mean"), ({"pretrained_cfg": {"mean": {"r": 1}}}, "mean"),
    ({"global_pool": "avg"}, "global_pool is 'avg'"), ({"architecture": "vit_base_patch16_rope_224"}, "rope"),
    ({"architecture": 7}, "architecture"), ({"architecture": "resnet50"}, "resnet50"),
])
def test_timms_settings_that_are_wrong(tmp_path, cifar, change, reason):
    weights, _ = timm_vit(48, 4)
    config = {"pretrained_cfg": {"mean": MEAN, "std": STD}, "model_args": {"num_heads": 4}} | change
    assert reason in refused(publish_timm(tmp_path / "hub", weights, **config), tmp_path / "run", "--images", cifar)


@pytest.mark.parametrize("change, reason", [
    ({"pos_embed": torch.zeros(48)}, "pos_embed has shape (48,)"), ({"pos_embed": torch.zeros(1, 1, 48)}, "pos_embed"),
    ({"pos_embed": torch.zeros(1, 16, 48)}, "pos_embed"), ({"patch_embed.proj.weight": torch.zeros(48, 3, 0, 0)}, "patch_embed"),
    ({"patch_embed.proj.weight": torch.zeros(48, 192)}, "patch_embed"), ({"reg_token": torch.zeros(1, 1, 48)}, "reg_token"),
    ({"blocks.1.ls1.gamma": torch.zeros(48)}, "ls1.gamma"), ({"blocks.5.norm1.weight": torch.zeros(48)}, "layers"),
])
def test_timms_weights_that_are_wrong(tmp_path, cifar, change, reason):
    weights, _ = timm_vit(48, 4)
    folder = publish_timm(tmp_path / "hub", weights | change, model_args={"num_heads": 4})
    assert reason in refused(folder, tmp_path / "run", "--images", cifar)


def test_timms_huge_vit_has_no_heads_of_64(tmp_path, cifar):
    """ViT-H has 16 heads of 80: to guess would be to compute something else."""
    weights, _ = timm_vit(1280, 16, layers=1)
    folder = publish_timm(tmp_path / "hub", weights, architecture="vit_huge_patch8_32")
    assert "num_heads" in refused(folder, tmp_path / "run", "--images", cifar)


@pytest.mark.parametrize("content, reason", [
    ("[]", "holds a list"), ('{"image_mean": "0.5"}', "mean"), ('{"image_std": [0.5, 0.5, null]}', "deviation"),
    ('{"image_std": [0.2]}', "expected three"), ('{"rescale_factor": 1}', "rescale_factor"), ('{"do_rescale": false}', "do_rescale"),
])
def test_pixels(spoil, tmp_path, cifar, content, reason):
    folder = spoil("vit")
    (folder / "preprocessor_config.json").write_text(content)
    assert reason in refused(folder, tmp_path / "run", "--images", cifar)


class Ran:
    """A pickle that makes a file where it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bin(make):
    def spoiled(folder):
        (folder / "model.safetensors").unlink()
        content = make(folder)
        path = folder / "pytorch_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return spoiled


def write_index(content):
    def spoiled(folder):
        shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return spoiled


def truncate(folder):
    os.truncate(folder / "model.safetensors", 50_000)


@pytest.mark.parametrize("spoiled, reason", [
    (truncate, "model.safetensors: truncated"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "model.safetensors: truncated"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors: truncated"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    (write_bin(lambda folder: b"garbage" * 99), "pytorch_model.bin: truncated, or not a file of weights"),
    (write_bin(lambda folder: {"strange": Ran(folder.parent / "ran")}), "pytorch_model.bin: truncated, or not a file of weights"),
    (write_bin(lambda folder: pickle.dumps({"strange": Ran(folder.parent / "ran")})), "pytorch_model.bin: truncated, or not a file of weights"),
    (write_bin(lambda folder: [torch.zeros(3)]), "not a file of weights"),
    (write_bin(lambda folder: torch.zeros(3)), "not a file of weights"),
    (write_bin(lambda folder: {1: torch.zeros(3)}), "not a file of weights"),
    (write_bin(lambda folder: {"state_dict": {"a": torch.zeros(3)}}), "not a file of weights"),
    (write_bin(lambda folder: {"bert.embeddings.word_embeddings.weight": torch.zeros(99, 48).to_sparse()}), ""),
    (write_index({"weight_map": {"a": "model-00002-of-00002.safetensors"}}), "no such file, but its index names it"),
    (write_index({"weight_map": {"a": "../hub/model-00001-of-00001.safetensors"}}), "names no shards"),
    (write_index({"weight_map": {"a": "/etc/passwd"}}), "names no shards"),
    (write_index({"weight_map": {"a": ".."}}), ""),
    (write_index({"weight_map": {"a": ""}}), ""),
    (write_index({"weight_map": {"a": 1}}), "names no shards"),
    (write_index({"weight_map": ["a"]}), "names no shards"),
    (write_index({"weight_map": {}}), ""),
    (write_index({}), "names no shards"),
    (write_index([]), "holds a list"),
])
def test_files_of_weights(spoil, tmp_path, corpus, recwarn, spoiled, reason):
    folder = spoil("masked")
    spoiled(folder)
    assert reason in refused(folder, tmp_path / "run", "--text", corpus)
    assert not (tmp_path / "hub" / "ran").exists() and not recwarn.list  # a warning would be a line more


def test_that_pickle_would_have_run(tmp_path):
    torch.save({"strange": Ran(tmp_path / "ran")}, tmp_path / "file")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind, tokenizer, reason", [
    ("masked", lambda: wordpiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]")), "no [MASK]"),
    ("masked", lambda: wordpiece(("[PAD]", "[CLS]", "[SEP]", "[MASK]")), "[UNK]"),
    ("masked", lambda: wordpiece((*BERT_SPECIALS, *(f"more{i}" for i in range(90)))), "ids up to 104"),
    ("masked", lambda: bpe(), "no [PAD]"),
    ("opt", lambda: wordpiece(), "no <pad>"),
])
def test_tokenizers_of_something_else(spoil, tmp_path, corpus, kind, tokenizer, reason):
    folder = spoil(kind)
    tokenizer().save(str(folder / "tokenizer.json"))
    (tmp_path / "text").write_text("unknown " * 300)
    assert reason in refused(folder, tmp_path / "run", "--text", tmp_path / "text")


@pytest.mark.parametrize("files, reason", [
    ({}, "no tokenizer"), ({"tokenizer.json": "{}"}, "its tokenizer cannot be read"), ({"tokenizer.json": "\0"}, "its tokenizer cannot be read"),
    ({"vocab.txt": ""}, "tokenizer"), ({"vocab.txt": "[PAD]\nthe"}, "tokenizer"), ({"vocab.json": "{}", "merges.txt": ""}, "no tokenizer"),
    ({"vocab.txt": "\n".join(BERT_SPECIALS), "tokenizer_config.json": "["}, "tokenizer_config.json"),
    ({"vocab.txt": "\n".join(BERT_SPECIALS), "tokenizer_config.json": '{"do_lower_case": "yes"}'}, "tokenizer"),
])
def test_tokenizers_that_are_broken(spoil, tmp_path, corpus, files, reason):
    folder = spoil("masked")
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert reason in refused(folder, tmp_path / "run", "--text", corpus)


@pytest.mark.parametrize("files", [{"vocab.json": "{", "merges.txt": ""}, {"merges.txt": ""}, {"vocab.json": "{}", "merges.txt": ""}])
def test_opts_tokenizers_that_are_broken(spoil, tmp_path, corpus, files):
    folder = spoil("opt")
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert "tokenizer" in refused(folder, tmp_path / "run", "--text", corpus)


def test_ids_with_holes_are_words_with_holes(spoil, tmp_path, corpus):
    """A few published vocabularies skip an id, or name a word twice."""
    folder = spoil("masked")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in ("fox", *vocabulary())))
    run("pretrained.py", folder, "--out", tmp_path / "run", "--text", corpus)
    assert words_of(tmp_path / "run") == ["0", *vocabulary()]


@pytest.mark.parametrize("kind, text, reason", [
    ("masked", SENTENCE, "--text"), ("opt", SENTENCE, "--text"), ("masked", SENTENCE * 2, "--text"), ("masked", "\n\n", "--text"), ("masked", "", "is empty"),
])
def test_text_that_is_too_short(published, tmp_path, kind, text, reason):
    (tmp_path / "text").write_text(text)
    assert reason in refused(published[kind], tmp_path / "run", "--text", tmp_path / "text")


def test_text_that_is_not_there(published, tmp_path):
    assert "--text" in refused(published["masked"], tmp_path / "run", "--text", tmp_path / "none")


@pytest.mark.parametrize("kind, flags, reason", [
    ("masked", ("--images", "shapes"), "--images shapes is not for a bert"), ("opt", ("--images", "shapes"), "--images shapes is not for a opt"),
    ("vit", ("--seq-len", "8"), "--seq-len 8 is not for a vit"), ("vit", ("--text", "text"), "--text text is not for a vit"),
    ("masked", ("--seq-len", "21"), "--seq-len 21: the model has 20 positions"), ("masked", ("--seq-len", "2"), "no room"),
    ("opt", ("--seq-len", "21"), "--seq-len 21: the model has 20 positions"), ("masked", ("--batch-size", "0"), "at least 1"),
])
def test_flags_of_another_family(published, tmp_path, corpus, kind, flags, reason):
    flags = flags if "--seq-len" not in flags or kind == "vit" else (*flags, "--text", corpus)
    assert reason in refused(published[kind], tmp_path / "run", *flags)


def test_images_with_more_classes_than_the_model(tmp_path, cifar):
    reason = refused(publish(vit(num_labels=9), tmp_path / "hub"), tmp_path / "run", "--images", cifar)
    assert "has 10 classes, the model 9" in reason


def test_images_that_are_not_there(published, tmp_path):
    assert "none" in refused(published["vit"], tmp_path / "run", "--images", tmp_path / "none")


# ---- --out ----

def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_existing_run_is_kept(published, tmp_path, corpus):
    shutil.copytree(published["masked"], tmp_path / "run")
    before = contents(tmp_path)
    assert "--overwrite" in refused(published["masked"], tmp_path / "run", "--text", corpus)
    assert contents(tmp_path) == before


def test_overwrite(published, runs, tmp_path, corpus):
    shutil.copytree(runs / "opt", tmp_path / "run")
    before = contents(tmp_path)
    assert "--text" in refused(published["masked"], tmp_path / "run", "--text", tmp_path / "none", "--overwrite")
    assert contents(tmp_path) == before  # a run is replaced once there is another
    run("pretrained.py", published["masked"], "--out", tmp_path / "run", "--text", corpus, "--overwrite")
    assert open_run(tmp_path / "run", torch.device("cpu")).model.family == "bert" and [*tmp_path.iterdir()] == [tmp_path / "run"]


def test_overwrite_replaces_runs_only(published, spoil, tmp_path, corpus):
    """Not the checkpoint itself, nor whatever else lies there."""
    folder = spoil("masked")
    before = contents(tmp_path)
    assert "no run" in refused(folder, folder, "--text", corpus, "--overwrite")
    assert "no run" in refused(folder, tmp_path, "--text", corpus, "--overwrite")
    assert contents(tmp_path) == before
    (tmp_path / "file").write_text("kept")
    refused(folder, tmp_path / "file", "--text", corpus, "--overwrite")
    assert (tmp_path / "file").read_text() == "kept"


def test_out_is_the_names_last_part(published, tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("pretrained.py", published["masked"], "--text", corpus)
    assert open_run("runs/masked", torch.device("cpu")).model.family == "bert"
    monkeypatch.chdir("runs/masked")
    run("pretrained.py", published["opt"], "--text", corpus, "--out", ".", "--overwrite")
    assert open_run(tmp_path / "runs/masked", torch.device("cpu")).model.family == "opt"


def test_out_that_cannot_be_written(published, tmp_path, corpus):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file" / "run", tmp_path / ("a" * 300)):
        _, err = run("pretrained.py", published["masked"], "--out", out, "--text", corpus, code=2)
        assert err.startswith(f"error: --out {out}: cannot be written") and err.count("\n") == 1


@pytest.mark.parametrize("limit", [1_000, 50_000])  # within the tokens, within the checkpoint
def test_a_full_disk(published, tmp_path, corpus, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        reason = refused(published["masked"], tmp_path / "run", "--text", corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reason.startswith(f"--out {tmp_path / 'run'}: cannot be written")


# ---- packages that are not there ----

@pytest.mark.parametrize("missing", ["tokenizers", "safetensors"])
def test_a_missing_package(published, tmp_path, corpus, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install -e '.[pretrained]'" in refused(published["masked"], tmp_path / "run", "--text", corpus)


@pytest.mark.parametrize("name", ["a/b/c", "a" * 300, "-", "a b"])
def test_names_that_are_none(tmp_path, name):
    """Neither folders nor ids of the Hub, which is not asked."""
    assert "no such folder" in refused(name, tmp_path / "run")


# ---- from the Hub (how that may fail: test_download.py) ----

def test_download(server, tmp_path, corpus, published):
    others = ("onnx/model.onnx", "pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "README.md")
    as_hub(server, {path.name: path.read_bytes() for path in published["masked"].iterdir()} | dict.fromkeys(others, b"not to be fetched"))
    out, _ = run("pretrained.py", "org/model", "--out", tmp_path / "run", "--text", corpus)
    served = [path.rpartition("/")[2] for path, _ in server.asked if "/resolve/" in path]
    assert sorted(served) == ["config.json", "model.safetensors", "tokenizer.json"]
    args = saved(tmp_path / "run")["args"]
    assert (args["source"], args["revision"]) == ("org/model", COMMIT) and COMMIT in out
    assert_same(open_run(tmp_path / "run", torch.device("cpu")), transformers.BertForMaskedLM.from_pretrained(published["masked"]).eval())
    server.fault = 503
    run("pretrained.py", "org/model", "--out", tmp_path / "again", "--text", corpus)  # from the cache
    assert saved(tmp_path / "again")["args"] == args


def test_download_of_a_repository_without_safetensors(server, tmp_path, corpus, published):
    files = {path.name: path.read_bytes() for path in published["masked"].iterdir()}
    torch.save(safetensors.load(files.pop("model.safetensors")), tmp_path / "weights")
    as_hub(server, files | {"pytorch_model.bin": (tmp_path / "weights").read_bytes()})
    run("pretrained.py", "org/model", "--out", tmp_path / "run", "--text", corpus)
    assert saved(tmp_path / "run")["args"]["revision"] == COMMIT


# ---- a real one ----

@pytest.mark.skipif("MINQ_PATIENT" not in os.environ, reason="MINQ_PATIENT names no folder of a published BertModel")
def test_a_real_checkpoint(tmp_path):
    folder = os.environ["MINQ_PATIENT"]
    run = opened(folder, tmp_path / "run", "--batch-size", 4, "--eval-batches", 2)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    (tokens,), _ = next(run.validation())
    with torch.no_grad():
        assert_close(run.model(tokens), theirs(tokens).last_hidden_state)
    row = quantized(tmp_path / "run", tmp_path / "rows.json")
    assert row["quantized"]["8x8"]["mean"] < 6  # dB
