"""Small models of every family, and inputs for them."""
import torch

from minq.model import FAMILIES

SIZES = dict(layers=2, width=32, heads=4, ffn=64)


def small(family="bert", **settings):
    torch.manual_seed(0)
    model, of_vit = FAMILIES[family], dict(image_size=12, patch_layernorm=True)
    own = of_vit if family == "vit" else dict(seq_len=12)
    return model(model.config_class(**SIZES | own | settings))


def inputs(family="bert", seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return torch.rand(n, 3, 12, 12, generator=generator)
    return torch.randint(256, (n, 12), generator=generator)
