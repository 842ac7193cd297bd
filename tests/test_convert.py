"""Published checkpoints (lab/convert.py) compute what transformers' models of the same files do;
what is not one of them is refused in one line. Every checkpoint is made here, tiny and random
(pip install -e '.[test,peers,pretrained]')."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.convert import WEIGHTS, convert
from minq.outliers import kurtosis, watch
from minq.quant import quantize_model
from minq.runs import open_run
from running import run, same, saved

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
huggingface_hub = pytest.importorskip("huggingface_hub")

CPU = torch.device("cpu")
SENTENCE = "the quick brown fox jumps over the lazy dog. "
PIXELS = {"mean": [0.48, 0.42, 0.55], "std": [0.27, 0.31, 0.19]}
TABLE, BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# ---- tiny checkpoints ----

def made(architecture, config, **sizes):
    """In evaluation mode, with biases and LayerNorms that matter."""
    torch.manual_seed(0)
    shared = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=100,
                  intermediate_size=100, max_position_embeddings=20)
    config = getattr(transformers, config)(**shared | sizes)
    model = getattr(transformers, architecture)(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def bert(architecture="BertForMaskedLM", **changed):
    return made(architecture, "BertConfig", **{"vocab_size": 99} | changed)


def opt(architecture="OPTForCausalLM", **changed):
    return made(architecture, "OPTConfig", vocab_size=300, word_embed_proj_dim=48, **changed)


def vit(**changed):
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 11}
    return made("ViTForImageClassification", "ViTConfig", **sizes | changed)


def vocabulary(specials=SPECIALS):
    """word -> id: the sentence's words, and "brown" from pieces."""
    words = re.findall(r"\w+|\.", SENTENCE.replace("brown", ""))
    return {word: i for i, word in enumerate(dict.fromkeys((*specials, *words, "br", "##own")))}


def wordpiece(specials=SPECIALS):
    """BERT's tokenizer. Were it to add special tokens, they would be "the" and "."."""
    vocab = vocabulary(specials)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        (".", vocab["."]), ("the", vocab["the"]))
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
        make = wordpiece if model.config.model_type == "bert" else bpe
        make().save(str(folder / "tokenizer.json"))
    return folder


def write(folder, name, content):
    content = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(content, "utf-8")


def save(tokenizer):
    return lambda folder: tokenizer.save(str(folder / "tokenizer.json"))


def config(*without, **changed):
    """A function that changes lines of a folder's config.json, or leaves them out."""
    def rewrite(folder):
        given = json.loads((folder / "config.json").read_text()) | changed
        write(folder, "config.json", {key: x for key, x in given.items() if key not in without})
    return rewrite


def weights(change, name="model.safetensors"):
    """A function that saves a folder's weights anew, as `change` makes them of {name: tensor}."""
    def rewrite(folder):
        state = change(safetensors.load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        (torch.save if name.endswith(".bin") else safetensors.save_file)(state, folder / name)
    return rewrite


def put(name, tensor):
    return weights(lambda state: state | {name: tensor})


def drop(*names):
    return weights(lambda state: {key: x for key, x in state.items() if key not in names})


def renamed(change, **options):
    return weights(lambda state: {change(key): x for key, x in state.items()}, **options)


# ---- equality ----

@torch.no_grad()
def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def assert_same_text(ours, theirs, output="logits"):
    """On random tokens: all positions, and fewer."""
    full = torch.randint(ours.config.vocab_size, (3, ours.config.seq_len))
    for tokens in (full, full[:, :5]):
        expected = theirs(tokens)[output]
        if type(theirs).__name__ == "OPTModel":  # minq's multiplies by the tied table
            expected = expected @ theirs.get_input_embeddings().weight.T
        assert_close(ours.eval()(tokens), expected)


@pytest.mark.parametrize("make, output", [
    (bert, "logits"),
    (lambda: bert("BertForPreTraining"), "prediction_logits"),  # its other head is dropped
    (lambda: bert("BertModel"), "last_hidden_state"),
    (lambda: bert(hidden_act="relu", layer_norm_eps=1e-3, type_vocab_size=1), "logits"),
    (opt, "logits"),
    (lambda: opt("OPTModel"), "last_hidden_state"),
    (lambda: opt(activation_function="gelu"), "logits")])
def test_text_models_equal_transformers(tmp_path, make, output):
    theirs = make()
    ours = convert(publish(theirs, tmp_path / "hub"))
    assert_same_text(ours, theirs, output)
    assert ours.config.seq_len == 20
    assert ours.metric == ("sqnr" if type(theirs).__name__ == "BertModel" else "perplexity")
    ours = convert(tmp_path / "hub", seq_len=7)  # the first positions are kept
    assert ours.config.seq_len == 7
    assert_same_text(ours, theirs, output)


@torch.no_grad()
def test_kurtosis_of_an_opt_is_what_hooks_on_transformers_see(tmp_path):
    """As the authors measure it: per entry of what the hook sees, which is flat around the FFN."""
    theirs, seen = opt(), []
    ours, tokens = convert(publish(theirs, tmp_path / "hub")), torch.randint(300, (5, 20))
    parts = r"layers\.\d+(\.fc2|\.final_layer_norm|\.self_attn_layer_norm|\.self_attn\.out_proj)?"
    for name, module in theirs.named_modules():
        if re.fullmatch(rf"model\.decoder\.({parts}|final_layer_norm)", name):
            module.register_forward_hook(lambda module, args, x: seen.append(
                kurtosis(x if torch.is_tensor(x) else x[0]).mean()))
    theirs(tokens)
    with watch(ours.eval(), ours.kurtosis_taps) as outliers:
        ours(tokens)
    expected = sum(seen).item() / len(seen)
    assert outliers.avg_kurtosis(ours.kurtosis_taps) == pytest.approx(expected, rel=1e-4)
    assert len(seen) == 2 * 5 + 1


def in_shards(folder):
    assert len(list(folder.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("make, change, options", [
    (bert, weights(lambda state: state | {"cls.predictions.decoder.bias": state[BIAS].clone(),
                                          "cls.predictions.decoder.weight": 1 * state[TABLE]}), {}),
    (bert, weights(dict, "pytorch_model.bin"), {}), (opt, weights(dict, "pytorch_model.bin"), {}),
    (bert, in_shards, {"max_shard_size": "50KB"}), (opt, in_shards, {"max_shard_size": "50KB"}),
    *((bert, weights(lambda state, dtype=dtype: {key: x.to(dtype) for key, x in state.items()}), {})
      for dtype in (torch.bfloat16, torch.float8_e4m3fn)),
    (bert, renamed(lambda key: "module._orig_mod." + key), {}),  # saved while wrapped
    (bert, renamed(lambda key: key.replace(BIAS, "cls.predictions.decoder.bias")), {}),
    *((make, config("model_type"), {}) for make in (bert, opt)),
    (bert, config("model_type", "architectures"), {}),  # as in 2018
    (bert, renamed(lambda key: re.sub(r"^bert\.", "", key)), {}),
    (bert, renamed(lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta")), {}),  # as TensorFlow has them
    (bert, put("bert.embeddings.position_ids", torch.arange(20)[None]), {}),
    (opt, renamed(lambda key: key.replace("model.decoder.embed_tokens", "lm_head")), {})])
def test_other_files_of_the_same_model(tmp_path, make, change, options):
    theirs = make()
    for p in theirs.parameters():
        p.data = p.to(torch.float8_e4m3fn).float()
    folder = publish(theirs, tmp_path / "hub", **options)
    change(folder)
    ours = convert(folder)
    assert_same_text(ours, theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


@pytest.mark.skipif("MINQ_BERT" not in os.environ, reason="names no folder of a published BERT")
def test_a_published_bert_equals_transformers():
    folder = Path(os.environ["MINQ_BERT"])
    assert_same_text(convert(folder), transformers.BertForMaskedLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("kind, name", [
    ("masked", "cls.species.weight"), ("encoder", "classifier.weight"), ("opt", "score.weight")])
def test_heads_that_minq_does_not_have_are_named(hub, published, capsys, kind, name):
    put(name, torch.zeros(2, 48))(folder := hub(kind))
    assert same(convert(folder).state_dict(), convert(published[kind]).state_dict())
    assert name in capsys.readouterr().out.splitlines()[0]


@torch.no_grad()
def assert_same_images(ours, theirs, mean, std):
    x = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    assert_close(ours.eval()(x), theirs((x - mean) / std))


@pytest.mark.parametrize("pixels", [PIXELS, {"mean": [0.5] * 3, "std": [0.5] * 3}])
def test_vit_equals_transformers(tmp_path, pixels):
    theirs = vit(layer_norm_eps=1e-3)
    folder = publish(theirs, tmp_path / "hub")
    if pixels is PIXELS:  # else as by default
        write(folder, "preprocessor_config.json", {
            "image_mean": PIXELS["mean"], "image_std": PIXELS["std"], "rescale_factor": 1 / 255})
    assert_same_images(convert(folder), lambda x: theirs(x).logits, **pixels)


# ---- a run like any other ----

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders as on the Hub, by kind. Not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    models = {"encoder": bert("BertModel"), "masked": bert(), "opt": opt(), "vit": vit()}
    return {kind: publish(model, root / kind) for kind, model in models.items()}


@pytest.fixture
def hub(published, tmp_path):
    """A function that gives a copy of a published folder, to be changed."""
    return lambda kind: shutil.copytree(published[kind], tmp_path / "hub" / kind)


@pytest.mark.parametrize("kind", ["encoder", "masked", "opt", "vit"])
def test_a_run_opens_and_quantizes(published, tmp_path, corpus, cifar, kind):
    words = ("--images", cifar) if kind == "vit" else ("--text", corpus)
    printed, _ = run("lab.convert", published[kind], "--out", tmp_path / "run", *words)
    assert ("lab.damage" if kind == "encoder" else "quantize.py") in printed
    (tmp_path / "run").rename(tmp_path / "moved")
    opened = open_run(tmp_path / "moved", CPU)
    assert (opened.checkpoint["args"].get("mask_prob") == 0) == (kind == "encoder")
    quantized = quantize_model(opened.model, 8, 8)
    opened.calibrate(quantized, seed=0, batches=2)
    inputs, _ = next(opened.validation())
    ours, floats = quantized(*inputs), opened.model(*inputs)
    assert 0 < (ours - floats).norm() < 0.2 * floats.norm()
    _, err = run("quantize.py", tmp_path / "moved", "--seeds", 1, code=2 * (kind == "encoder"))
    assert ("python -m lab.damage" in err) == (kind == "encoder")


def text_of(folder, out, source):
    """The data of a run that is made of a folder, its tokens, and their words."""
    run("lab.convert", folder, "--out", out, "--text", source)
    text = open_run(out, CPU).data.text
    return text, np.fromfile(out / "tokens.bin", dtype="<u2").tolist(), text.words


@pytest.mark.parametrize("cuts", [False, True])
def test_berts_tokenizer(hub, tmp_path, corpus, cuts):
    folder, tokenizer, sentence = hub("masked"), wordpiece(), SENTENCE.replace(".", " .")
    if cuts:  # as saved by who used it for batches of short texts
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=99_999)
    save(tokenizer)(folder)
    text, tokens, words = text_of(folder, tmp_path / "run", corpus)
    assert words == list(vocabulary())
    assert [words[i] for i in tokens] == 500 * sentence.replace("brown", "br ##own").split()
    assert (text.pad, text.cls, text.sep, text.mask) == (0, 2, 3, 4)


@pytest.mark.parametrize("options", [
    {}, {"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True}])
def test_options_of_vocab_txt(hub, tmp_path, options):
    folder = hub("masked")
    (folder / "tokenizer.json").unlink()
    write(folder, "vocab.txt", "\n".join(("fox", *vocabulary())))  # it skips an id: "fox" is twice
    write(folder, "tokenizer_config.json", options)
    write(tmp_path, "text", "FOX f\u00f3x fox " * 300)
    _, tokens, words = text_of(folder, tmp_path / "run", tmp_path / "text")
    theirs = transformers.BertTokenizer(str(folder / "vocab.txt"), **options)
    assert theirs.tokenize("FOX f\u00f3x fox " * 300) == [words[i] for i in tokens]


def test_a_vocabulary_with_capitals_a_folder_above(hub, tmp_path):
    """As AntiBERTy has it, whose words are amino acids: nothing says that they are not lowered."""
    folder = hub("masked")
    (folder / "tokenizer.json").unlink()
    write(folder.parent, "vocab.txt", "\n".join((*SPECIALS, *"ACDEF")))
    write(tmp_path, "text", "F A C E\n" * 300)
    _, tokens, words = text_of(folder, tmp_path / "run", tmp_path / "text")
    assert [words[i] for i in tokens] == [*"FACE"] * 300


@pytest.mark.parametrize("kind, make", [("masked", wordpiece), ("opt", bpe)])
def test_line_by_line_tokens_are_those_of_the_whole_text(hub, tmp_path, kind, make):
    rng = np.random.default_rng(0)
    pieces = [*"\n\n\n \t.", "the", "'s", "\r\n", "\u00e9", "fox", "\u3000"]
    text = "".join(rng.choice(pieces, 9000))
    write(tmp_path, "text", text)
    text = (tmp_path / "text").read_bytes().decode()
    _, tokens, _ = text_of(hub(kind), tmp_path / "run", tmp_path / "text")
    assert tokens == make().encode(text, add_special_tokens=False).ids


def test_rows_are_whole_lines_of_one_length(hub, tmp_path):
    """Of five tokens, "brown" being two; a longer line is cut, shorter ones are left out."""
    words, source = SENTENCE.split(), tmp_path / "t.txt"
    lines = [words[i % 3:][:4] + words[:i % 3] * (i % 5 == 0) for i in range(62)]
    source.write_text("\n".join(["the", "", *map(" ".join, lines), "the fox"]), "utf-8")
    run("lab.convert", hub("masked"), "--rows", "--text", source, "--out", tmp_path / "run")
    data, model = open_run(tmp_path / "run", CPU)[3:1:-1]
    pieces = [" ".join(line).replace("brown", "br ##own").split() for line in lines]
    T = 2 + max(map(len, pieces), key=lambda n: n * [*map(len, pieces)].count(n))
    rows = {("[CLS]", *line[:T - 2], "[SEP]") for line in pieces if len(line) >= T - 2}
    tokens, labels = data.train_batch(0, 0, 99)
    found = np.where(labels < 0, tokens, labels)
    assert {tuple(data.text.words[i] for i in row) for row in found} <= rows
    assert len(model.position_embedding.weight) == model.config.seq_len == T == tokens.shape[1]
    for tokens, _ in data.validation_batches(4, 99):
        assert (tokens[:, 0] == data.text.cls).all() and (tokens[:, -1] == data.text.sep).all()


def test_byte_level_bpe_loses_nothing(hub, tmp_path):
    folder, text = hub("opt"), "".join(f"{i}: {SENTENCE}\u00e9\n" for i in range(500))
    (folder / "tokenizer.json").unlink()
    bpe().save_model(str(folder))  # vocab.json and merges.txt, as OPT's are
    write(tmp_path, "text", text)
    data, tokens, words = text_of(folder, tmp_path / "run", tmp_path / "text")
    assert bpe().decode(tokens) == text
    assert "".join(words[i] for i in tokens).startswith("0:\u2423the\u2423quick")
    assert [words[i] for i in (data.pad, data.cls)] == ["<pad>", "</s>"]  # it starts texts


# ---- what is refused ----

def refused(folder, out, *words):
    """The line, without "error: ". Nothing is left in or beside `out`."""
    before = sorted(out.parent.iterdir())
    printed, err = run("lab.convert", folder, "--out", out, *words, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and not printed
    assert sorted(out.parent.iterdir()) == before
    return err.removeprefix("error: ")


def copied(*names):
    """A function that lets a folder have its weights in other files, too."""
    return lambda folder: [shutil.copy(folder / "model.safetensors", folder / x) for x in names]


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
REFUSED = {"masked": [
    (config(hidden_size=None), "not 'NoneType'"), (config(hidden_size=24), "size mismatch"),
    (config(num_attention_heads=5), "does not divide"), (config(hidden_act="gelu_new"), "gelu_new"),
    (config(num_hidden_layers=3), "Missing key(s)"), (config(is_decoder=True), "is_decoder"),
    (config(num_hidden_layers=1), "encoder.layer.1."), (config(quantization_config={}), "is {}"),
    (config(max_position_embeddings=21), "20 positions, config.json 21"),
    (config(position_embedding_type="relative_key"), "position_embedding_type"),
    (config(model_type="gpt2"), "model_type is 'gpt2'; expected one of bert, opt, vit"),
    (config(model_type=None, architectures=["RobertaModel"]), "model_type is 'roberta'"),
    (config(model_type=None, architectures=[""], type_vocab_size=1), "model_type is ''"),
    (lambda folder: write(folder, "config.json", "{"), "config.json: Expecting"),
    (put(QUERY, torch.zeros(48, 48, dtype=torch.int8)), "layers.1.attention.qkv.weight"),
    (put(TABLE, torch.full((99, 48), torch.nan)), "word_embeddings.weight holds values"),
    (put("cls.predictions.decoder.weight", torch.zeros(99, 48)), "values of its own"),
    (put("bert.encoder.layer.0.adapter.weight", torch.zeros(2, 48)), "encoder.layer.0.adapter"),
    (copied("model-00001-of-00001.safetensors"), "2 files like model.safetensors; expected"),
    (copied("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"), "3 files"),
    (put(QUERY, torch.zeros(47, 48)), "size mismatch"), (drop(QUERY), "layers.1.attention.qkv"),
    (lambda folder: os.truncate(folder / "model.safetensors", 9000), "model.safetensors: trunc"),
    (weights(lambda state: {"a": [state]}, "pytorch_model.bin"), "pytorch_model.bin: truncated"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer cannot be used"),
    (lambda folder: (folder / "tokenizer.json").unlink() or write(
        folder, "tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}), "Japanese"),
    (save(wordpiece(SPECIALS[:4])), "no '[MASK]'"), (save(bpe()), "no '[PAD]'"),
    (save(wordpiece((*SPECIALS, *map(str, range(90))))), "ids up to 104")],
    "opt": [
    (config(do_layer_norm_before=False), "do_layer_norm_before is False"),  # OPT-350m
    (config(max_position_embeddings=22), "20 positions, config.json 22"),  # as if none were unused
    (put("lm_head.weight", torch.zeros(300, 48)), "values of its own")],
    "vit": [
    (config(image_size=40), "size mismatch"), (drop("classifier.bias"), "no 'classifier.bias'"),
    (weights(lambda state: {key: x[:9] if "classifier" in key else x for key, x in state.items()}),
     "classes 9, the data 10"),
    (lambda folder: write(folder, "preprocessor_config.json", {"rescale_factor": 1}), "is 1;")]}


@pytest.mark.parametrize("kind, change, reason", [
    (kind, *case) for kind, cases in REFUSED.items() for case in cases])
def test_what_is_not_one_of_these_models(hub, tmp_path, corpus, cifar, kind, change, reason):
    folder = hub(kind)
    change(folder)
    words = ("--images", cifar) if kind == "vit" else ("--text", corpus)
    line = refused(folder, tmp_path / "run", *words)
    assert reason in line and len(line) < 500


@pytest.mark.parametrize("kind, words, reason", [
    ("masked", ("--images", "shapes"), "--images is for a ViT"), ("vit", ("--seq-len", 8), ": vit"),
    ("masked", ("--seq-len", 21), "--seq-len 21"), ("opt", ("--text", "none"), "--text "),
    ("vit", ("--images", "none"), "--images "), ("opt", ("--rows",), "--rows for a BERT")])
def test_flags_that_do_not_fit(published, tmp_path, kind, words, reason):
    assert reason in refused(published[kind], tmp_path / "run", *words)


# ---- --out ----

def test_out_is_kept_unless_a_whole_run_replaces_it(published, tmp_path, corpus):
    out, words = tmp_path / "run", ("--text", corpus)
    run("lab.convert", published["masked"], "--out", out, *words)
    before = (out / "checkpoint.pt").read_bytes()
    assert "--overwrite" in refused(published["opt"], out, *words)
    assert "--text" in refused(published["opt"], out, "--text", tmp_path / "none", "--overwrite")
    assert (out / "checkpoint.pt").read_bytes() == before
    run("lab.convert", published["opt"], "--out", out, *words, "--overwrite")
    assert open_run(out, CPU).model.family == "opt" and [*tmp_path.iterdir()] == [out]
    assert "if it is a run" in refused(published["opt"], tmp_path, *words, "--overwrite")


# ---- packages and the Hub ----

@pytest.mark.parametrize("missing", ["tokenizers", "safetensors", "huggingface_hub"])
def test_a_missing_package(published, tmp_path, corpus, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    folder = "org/model" if missing == "huggingface_hub" else published["masked"]
    assert "pip install -e '.[pretrained]'" in refused(folder, tmp_path / "run", "--text", corpus)


def test_a_model_of_the_hub(published, tmp_path, corpus, monkeypatch):
    """Offline, from the library's cache, whose layout it documents."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached, commit = tmp_path / "cache" / "models--org--model", "0123456789" * 4
    shutil.copytree(published["masked"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    write(cached / "refs", "main", commit)
    run("lab.convert", "org/model", "--out", tmp_path / "run", "--text", corpus)
    assert saved(tmp_path / "run")["args"]["revision"] == commit
    assert "no such folder" in refused("org/other", tmp_path / "again", "--text", corpus)
    assert "no such folder" in refused("a/b/c", tmp_path / "again", "--text", corpus)


def test_one_form_of_the_weights_is_downloaded():
    files = ["model.safetensors", "model-00001-of-00002.safetensors", "model.fp16.safetensors",
             "onnx/model.onnx", "onnx/model.safetensors", "pytorch_model.bin", "tf_model.h5"]
    chosen = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=WEIGHTS[0])
    assert list(chosen) == files[:2]
