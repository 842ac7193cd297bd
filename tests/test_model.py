"""The block's two orders and the three families, from the definitions; test_peers.py compares with Hugging Face."""
import pytest
import torch

from minq.attention import Tap
from minq.errors import UserError
from minq.model import Bert, BertConfig, Block, Opt, OptConfig, ViT, ViTConfig, sinusoids


def small(**settings):
    torch.manual_seed(0)
    return Bert(BertConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12, **settings)).eval()


def test_bert_base_has_109_million_parameters():
    config = BertConfig(layers=12, width=768, heads=12, ffn=3072, seq_len=512, vocab_size=30522)
    with torch.device("meta"):
        count = sum(p.numel() for p in Bert(config).parameters())
    assert round(count / 1e6) == 110 and count == 109_514_298 - 2 * 768  # Hugging Face's, less its two segments


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_block_in_both_orders(pre_norm):
    torch.manual_seed(0)
    block, x = Block(BertConfig(width=32, heads=4, ffn=64, pre_norm=pre_norm)).eval(), torch.randn(2, 5, 32)
    ffn = lambda h: block.ffn_down(torch.nn.functional.gelu(block.ffn_up(h)))
    if pre_norm:
        h = x + block.attention(block.norm1(x))
        expected = h + ffn(block.norm2(h))
    else:
        h = block.norm1(x + block.attention(x))
        expected = block.norm2(h + ffn(h))
    torch.testing.assert_close(block(x), expected)


def test_every_tap_is_used_once_and_named():
    for pre_norm in (False, True):
        block, seen = Block(BertConfig(width=32, heads=4, ffn=64, pre_norm=pre_norm)), []
        for name, module in block.named_modules():
            if isinstance(module, Tap):
                assert name.endswith("_tap")
                module.register_forward_hook(lambda *_, name=name: seen.append(name))
        block(torch.randn(1, 5, 32))
        taps = [name for name, module in block.named_modules() if isinstance(module, Tap)]
        assert sorted(seen) == sorted(taps) and len(taps) >= 13


def test_logits_at_positions_are_those_of_the_whole():
    model, tokens = small(), torch.randint(260, (3, 12))
    positions = torch.tensor([0, 5, 13, 35])
    torch.testing.assert_close(model(tokens, positions), model(tokens).flatten(0, 1)[positions])


def test_the_decoder_shares_the_token_table():
    model = small()
    assert model.head.decoder.weight is model.token_embedding.weight


def test_initialization_leaves_gates_alone_and_follows_the_appendix():
    model = small(attention="gated", gate="mlp", gate_init=0.25)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.layers[0].ffn_up.bias == 0).all()
    gate = model.layers[0].attention.gate
    torch.testing.assert_close(gate.bias2.sigmoid(), torch.full((4,), 0.25))
    assert gate.weight1.std() > 0.1  # +-1/sqrt(8), not 0.02


def test_sinusoids_have_the_asked_size_and_tell_positions_apart():
    table = sinusoids(64, 128, 0.02)
    assert table.shape == (64, 128) and table.square().mean().sqrt().item() == pytest.approx(0.02)
    assert torch.cdist(table, table).add(torch.eye(64)).min() > 1e-3
    assert sinusoids(4, 7, 0.02).shape == (4, 7)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="--heads 5 does not divide --width 128"):
        BertConfig(heads=5)


def test_opt_125m_and_vit_s16_have_their_sizes():
    with torch.device("meta"):
        opt = Opt(OptConfig(layers=12, width=768, heads=12, ffn=3072, seq_len=2048, vocab_size=50272))
        vit = ViT(ViTConfig(layers=12, width=384, heads=6, ffn=1536, image_size=224, patch_size=16, classes=1000))
    assert sum(p.numel() for p in opt.parameters()) == 125_239_296 - 2 * 768  # Hugging Face's table has two unused rows
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6, 2) == 22.05


def test_opt_starts_as_the_appendix_says_and_never_looks_ahead():
    torch.manual_seed(0)
    model = Opt(OptConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12)).eval()
    assert model.token_embedding.weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.decoder.weight is model.token_embedding.weight
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[:, 7:] = 3
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])


def test_patches_are_the_image_row_by_row():
    model, images = ViT(ViTConfig(image_size=12, patch_size=4, width=32, ffn=64)), torch.rand(2, 3, 12, 12)
    patches = model.patches(images)
    assert patches.shape == (2, 9, 48)
    torch.testing.assert_close(patches[:, 5], images[:, :, 4:8, 8:12].flatten(1))


def test_the_patch_layernorm_is_a_choice():
    plain, normed = (ViT(ViTConfig(width=32, ffn=64, patch_layernorm=choice)) for choice in (False, True))
    assert not any("patch_norm" in name for name in plain.state_dict())
    seen = []
    normed.patch_norm_tap.register_forward_hook(lambda m, a, x: seen.append(x))
    normed(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2, 64), atol=1e-5, rtol=0)


def test_vit_weights_are_cut_at_two_deviations():
    model = ViT(ViTConfig(width=64, heads=4, ffn=64))
    assert model.layers[0].ffn_up.weight.abs().max() <= 0.04 and model.head.weight.std() > 0.015


def test_the_patch_must_divide_the_image():
    with pytest.raises(UserError, match="--patch-size 5 does not divide the images' 32 pixels"):
        ViTConfig(patch_size=5)
