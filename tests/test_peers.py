"""The same weights give the same logits as Hugging Face's models (pip install -e '.[test,peers]')."""
import pytest
import torch

from minq.model import Bert, BertConfig

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
def difference(ours, theirs, tokens, attend=None):
    logits = theirs(tokens, attention_mask=attend).logits
    mask = attend if attend is None else attend.bool()
    return (ours(tokens, attend=mask) - logits).abs().max() / logits.abs().max()


def test_bert_gives_the_logits_of_hugging_face():
    ours, theirs = bert_pair()
    tokens = torch.randint(99, (3, 20))
    assert difference(ours, theirs, tokens) < 1e-5
    assert difference(ours, theirs, tokens, attend=(torch.arange(20) < 13).long().expand(3, 20)) < 1e-5


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
