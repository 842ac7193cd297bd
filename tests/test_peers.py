"""The same weights give the same logits as Hugging Face's models (pip install -e '.[test,peers]')."""
import pytest
import torch

from minq.model import Bert, BertConfig, Opt, OptConfig, ViT, ViTConfig

transformers = pytest.importorskip("transformers")


def load(ours, theirs, pairs):
    """Copy theirs into ours: `pairs` maps our module names to theirs; a tuple of theirs is stacked."""
    state = theirs.state_dict()
    for name, source in pairs.items():
        sources = source if isinstance(source, tuple) else (source,)
        for part in ("weight", "bias"):
            if f"{name}.{part}" in ours.state_dict() and f"{sources[0]}.{part}" in state:
                ours.get_parameter(f"{name}.{part}").data = torch.cat([state[f"{s}.{part}"] for s in sources])


def bert_pair():
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100,
        max_position_embeddings=20)).eval()
    for p in theirs.parameters():  # biases and LayerNorms that matter
        p.data += 0.2 * torch.randn_like(p)
    ours = Bert(BertConfig(vocab_size=99, width=48, layers=3, heads=4, ffn=100, seq_len=20)).eval()
    pairs = {"token_embedding": "bert.embeddings.word_embeddings", "position_embedding": "bert.embeddings.position_embeddings",
             "embedding_norm": "bert.embeddings.LayerNorm", "head.transform": "cls.predictions.transform.dense",
             "head.norm": "cls.predictions.transform.LayerNorm", "head.decoder": "cls.predictions.decoder"}
    for i in range(3):
        layer = f"bert.encoder.layer.{i}"
        pairs |= {f"layers.{i}.attention.qkv": tuple(f"{layer}.attention.self.{n}" for n in ("query", "key", "value")),
                  f"layers.{i}.attention.proj": f"{layer}.attention.output.dense",
                  f"layers.{i}.norm1": f"{layer}.attention.output.LayerNorm",
                  f"layers.{i}.ffn_up": f"{layer}.intermediate.dense",
                  f"layers.{i}.ffn_down": f"{layer}.output.dense", f"layers.{i}.norm2": f"{layer}.output.LayerNorm"}
    load(ours, theirs, pairs)
    # one segment only: its embedding is a constant that the positions can hold
    ours.position_embedding.weight.data += theirs.bert.embeddings.token_type_embeddings.weight[0]
    ours.head.decoder.weight = ours.token_embedding.weight
    return ours, theirs


@torch.no_grad()
def difference(ours, theirs, tokens):
    logits = theirs(tokens).logits
    return (ours(tokens) - logits).abs().max() / logits.abs().max()


def test_bert_gives_the_logits_of_hugging_face():
    ours, theirs = bert_pair()
    assert difference(ours, theirs, torch.randint(99, (3, 20))) < 1e-5


def test_bert_with_its_layernorms_swapped_does_not():
    ours, theirs = bert_pair()
    layer = ours.layers[1]
    layer.norm1, layer.norm2 = layer.norm2, layer.norm1
    assert difference(ours, theirs, torch.randint(99, (3, 20))) > 1e-3


def test_bert_in_pre_ln_order_does_not():
    ours, theirs = bert_pair()
    for layer in ours.layers:
        layer.pre_norm, layer.norm2_tap = True, torch.nn.Identity()
    assert difference(ours, theirs, torch.randint(99, (3, 20))) > 1e-3


def opt_pair():
    torch.manual_seed(0)
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=100, max_position_embeddings=20,
        word_embed_proj_dim=48)).eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    ours = Opt(OptConfig(vocab_size=99, width=48, layers=3, heads=4, ffn=100, seq_len=20)).eval()
    pairs = {"token_embedding": "model.decoder.embed_tokens", "final_norm": "model.decoder.final_layer_norm"}
    for i in range(3):
        layer = f"model.decoder.layers.{i}"
        pairs |= {f"layers.{i}.attention.qkv": tuple(f"{layer}.self_attn.{n}_proj" for n in "qkv"),
                  f"layers.{i}.attention.proj": f"{layer}.self_attn.out_proj",
                  f"layers.{i}.norm1": f"{layer}.self_attn_layer_norm", f"layers.{i}.ffn_up": f"{layer}.fc1",
                  f"layers.{i}.ffn_down": f"{layer}.fc2", f"layers.{i}.norm2": f"{layer}.final_layer_norm"}
    load(ours, theirs, pairs)
    ours.position_embedding.weight.data = theirs.model.decoder.embed_positions.weight.data[2:]  # OPT's table starts at 2
    return ours, theirs


def test_opt_gives_the_logits_of_hugging_face():
    ours, theirs = opt_pair()
    tokens = torch.randint(99, (3, 20))
    assert difference(ours, theirs, tokens) < 1e-5
    ours.layers[0].attention.causal = False
    assert difference(ours, theirs, tokens) > 1e-3


def vit_pair():
    """In the shape of ViT-S/16 (width 384, 6 heads), shortened to 3 layers and 48 pixels."""
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=6, intermediate_size=1536, image_size=48, patch_size=16,
        layer_norm_eps=1e-6, num_labels=13)).eval()
    for p in theirs.parameters():
        p.data += 0.05 * torch.randn_like(p)
    ours = ViT(ViTConfig(width=384, layers=3, heads=6, ffn=1536, image_size=48, patch_size=16, classes=13)).eval()
    pairs = {"final_norm": "vit.layernorm", "head": "classifier"}
    names = {name.rpartition(".")[0] for name in theirs.state_dict()}
    for i in range(3):
        layer = next(prefix for prefix in (f"vit.encoder.layer.{i}", f"vit.layers.{i}") if any(n.startswith(prefix) for n in names))
        find = lambda *options: next(f"{layer}.{o}" for o in options if f"{layer}.{o}" in names)
        pairs |= {f"layers.{i}.attention.qkv": tuple(
                      find(f"attention.attention.{long}", f"attention.{long[0]}_proj") for long in ("query", "key", "value")),
                  f"layers.{i}.attention.proj": find("attention.output.dense", "attention.o_proj"),
                  f"layers.{i}.norm1": f"{layer}.layernorm_before", f"layers.{i}.norm2": f"{layer}.layernorm_after",
                  f"layers.{i}.ffn_up": find("intermediate.dense", "mlp.fc1"), f"layers.{i}.ffn_down": find("output.dense", "mlp.fc2")}
    load(ours, theirs, pairs)
    embeddings = theirs.vit.embeddings
    ours.patch_embedding.weight.data = embeddings.patch_embeddings.projection.weight.data.flatten(1)
    ours.patch_embedding.bias.data = embeddings.patch_embeddings.projection.bias.data
    ours.cls_embedding.weight.data = embeddings.cls_token.data[0]
    ours.position_embedding.weight.data = embeddings.position_embeddings.data[0]
    return ours, theirs


@torch.no_grad()
def test_vit_gives_the_logits_of_hugging_face():
    ours, theirs = vit_pair()
    images = torch.rand(2, 3, 48, 48)
    logits = theirs(2 * images - 1).logits
    assert (ours(images) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert (ours(images.mT) - logits).abs().max() > 1e-2 * logits.abs().max()
