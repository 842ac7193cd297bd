"""The block in both orders and the three families, from the definitions; test_peers.py compares
with Hugging Face."""
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minq import flags
from minq.attention import Tap
from minq.model import FAMILIES, BertConfig, Block, OptConfig, ViTConfig, sinusoids
from small import inputs, small


@pytest.mark.parametrize("family, sizes, count", [  # Hugging Face's, but for rows that are not used
    ("bert", dict(width=768, heads=12, seq_len=512, vocab_size=30522), 109_514_298 - 2 * 768),
    ("opt", dict(width=768, heads=12, seq_len=2048, vocab_size=50272), 125_239_296 - 2 * 768),
    ("vit", dict(width=384, heads=6, image_size=224, patch_size=16, classes=1000), 22_050_664)])
def test_known_models_have_their_sizes(family, sizes, count):
    with torch.device("meta"):
        model = FAMILIES[family](FAMILIES[family].config_class(layers=12, **sizes))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_block_in_both_orders_and_what_passes_its_taps(pre_norm, activation):
    config = BertConfig(width=32, heads=4, ffn=64, pre_norm=pre_norm, activation=activation)
    b, x, seen = Block(config).eval(), torch.randn(2, 5, 32), {}
    for p in b.parameters():
        torch.nn.init.normal_(p, std=0.3)  # norms that differ from each other
    for name, tap in b.named_children():
        if isinstance(tap, Tap):
            tap.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    attended = b.attention(b.norm1(x) if pre_norm else x)
    norm1 = b.norm1(x if pre_norm else x + attended)
    residual = x + attended if pre_norm else norm1
    norm2 = b.norm2(residual)
    hidden = getattr(F, activation)(b.ffn_up(norm2 if pre_norm else norm1))
    total = residual + b.ffn_down(hidden)
    out = total if pre_norm else b.norm2(total)
    assert_close(b(x), out)
    expected = dict(norm1_tap=norm1, residual1_tap=x + attended, ffn_hidden_tap=hidden,
                    ffn_output_tap=b.ffn_down(hidden), layer_output_tap=out)
    assert_close(seen, expected | (dict(norm2_tap=norm2) if pre_norm else {"residual2_tap": total}))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("family, outside_blocks", [("bert", 2), ("opt", 2), ("vit", 4)])
def test_every_tap_is_called_once_and_what_it_gives_back_counts(family, outside_blocks, pre_norm):
    """A quantizer in the place of any tap must be able to change the model's output."""
    model, x = small(family, pre_norm=pre_norm, init_std=0.2).eval(), inputs(family)
    taps = {name: module for name, module in model.named_modules() if isinstance(module, Tap)}
    assert len(taps) == outside_blocks + 2 * 13 and all(name.endswith("_tap") for name in taps)
    expected = model(x)
    for name, tap in taps.items():
        calls = []
        hook = tap.register_forward_hook(lambda m, args, out: calls.append(1) or 0 * out)
        assert not torch.allclose(model(x), expected, atol=1e-3) and len(calls) == 1, name
        hook.remove()


def test_a_bert_is_an_encoder_and_a_head_that_may_see_some_positions_only():
    model, encoder, tokens = small().eval(), small(masked_head=False).eval(), inputs()
    assert model.metric == "perplexity" and encoder.metric == "sqnr" and encoder.head is None
    model.load_state_dict(encoder.state_dict(), strict=False)
    logits, positions = model(tokens), torch.tensor([0, 5, 13, 35])
    assert_close(model.head(encoder(tokens)), logits)
    assert_close(model(tokens, positions), logits.flatten(0, 1)[positions])


@pytest.mark.parametrize("family, std", [("bert", 0.02), ("opt", 0.006), ("vit", 0.02)])
def test_initialization_leaves_gates_alone_and_follows_the_appendix(family, std):
    model = small(family, attention="gated", gate="mlp", gate_init=0.25)
    weight, cut = model.layers[0].ffn_up.weight, family == "vit"  # at two deviations
    assert weight.std().item() == pytest.approx((0.88 if cut else 1) * std, rel=0.1)
    assert (weight.abs().max() <= 2 * std) == cut and weight.abs().max() > 1.8 * std
    own = lambda name: name.endswith("bias") and ".gate." not in name
    assert all((p == 0).all() for name, p in model.named_parameters() if own(name))
    gate, last = model.layers[0].attention.gate, model.get_submodule(model.final_linear)
    assert_close(gate.bias2.sigmoid(), torch.full((4,), 0.25))
    assert gate.weight1.std() > 0.1  # +-1/sqrt(8), not 0.02
    assert cut or last.weight is model.token_embedding.weight


def test_sinusoids_have_the_asked_size_and_tell_positions_apart():
    table = sinusoids(64, 128, 0.02)
    assert table.square().mean().sqrt().item() == pytest.approx(0.02)
    assert torch.cdist(table, table).add(torch.eye(64)).min() > 1e-3
    assert sinusoids(4, 7, 0.02).shape == (4, 7)
    model = small(positions="sinusoid")
    assert_close(model.position_embedding.weight, sinusoids(12, 32, 0.02))


def test_patches_are_the_image_row_by_row():
    model, images = small("vit", patch_layernorm=False), inputs("vit")
    assert not any("patch_norm" in name for name in model.state_dict())  # only if asked for
    patches = model.patches(images)
    assert patches.shape == (4, 9, 48)
    assert_close(patches[:, 5], images[:, :, 4:8, 8:12].flatten(1))


# ---- configuration ----

def test_a_config_is_made_of_the_arguments_that_it_knows():
    config = OptConfig.of(Namespace(width=32, alpha=3.2, lr=1.0), seq_len=32, vocab_size=9)
    assert (config.width, config.ffn, config.seq_len, config.vocab_size) == (32, 128, 32, 9)
    assert config.gamma == pytest.approx(-0.1) and config.causal  # sec. 5.2: -alpha / T
    assert ViTConfig(alpha=13.0).gamma == pytest.approx(-0.2)  # T = 65
    assert BertConfig(gamma=-0.03).gamma == -0.03 and BertConfig().gamma == 0


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError, match="seqlen"):
        BertConfig.of(Namespace(), seqlen=3)
    with pytest.raises(KeyError, match="aplha"):
        flags.read_flags("bert", BertConfig, flags.Parser(""), {"laptop": {"aplha": 3.0}}, [])
