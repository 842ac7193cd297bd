"""Muon for the matrices, AdamW for the rest: --optimizer muon.

AdamW divides each weight's step by that weight's own gradient sizes, so it favours the axes of the hidden space,
and is accused of growing the outliers (arXiv 2410.17174, 2506.19697). Muon (Jordan et al. 2024) makes the
step of a whole matrix orthogonal: all its directions move equally far, whatever the axes.

    M = 0.95 M + 0.05 G;   W -= lr * 0.2 sqrt(max(rows, columns)) * orthogonal(0.05 G + 0.95 M)

`orthogonal` sets all singular values to about 1, by five steps of a Newton-Schulz iteration in bf16. The factor
gives the step the root mean square of AdamW's (arXiv 2502.16982), so that both use the recipe's lr and weight decay.
"""
import torch
import torch.nn as nn

from minq.training import OPTIMIZERS


class Muon(torch.optim.Muon):
    """PyTorch's, with stacked matrices taken apart: a group's "parts" (3 where W_q, W_k and W_v are stacked)."""

    def _init_group(self, group, *lists):
        whole = ([], [], [])  # parameters, gradients, momenta
        has_complex = super()._init_group(group, *whole)
        for parts, tensors in zip(lists, whole):
            parts += [part for x in tensors for part in x.chunk(group["parts"])]
        return has_complex


class MuonAndAdamW:
    """Two optimizers behind the interface of one, as set_lr, GradScaler and a run's checkpoint use it.

    Muon has the weights of all Linears inside the blocks. AdamW has the others: embeddings and what maps to or from
    them, gates, norms, biases. `groups`: those of training.parameter_groups, whose weight decay both keep."""

    def __init__(self, model, groups, lr, betas):
        parts = {module.weight: getattr(module, "parts", 1) for module in model.layers.modules()
                 if isinstance(module, nn.Linear)}
        matrices, others = [], []
        for group in groups:
            others.append(group | {"params": [p for p in group["params"] if p not in parts]})
            for n in sorted(set(parts.values())):
                of_n = [p for p in group["params"] if parts.get(p) == n]
                matrices += [group | {"params": of_n, "parts": n}] if of_n else []
        self.both = (Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"),
                     torch.optim.AdamW(others, lr=lr, betas=betas, fused=True))

    @property
    def param_groups(self):
        return [group for optimizer in self.both for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.both:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.both:
            optimizer.zero_grad()

    def state_dict(self):
        states = [optimizer.state_dict() for optimizer in self.both]
        return {"state": [state["state"] for state in states],
                "param_groups": [group for state in states for group in state["param_groups"]]}

    def load_state_dict(self, saved):
        groups = iter(saved["param_groups"])
        for optimizer, state in zip(self.both, saved["state"]):
            own = [next(groups) for _ in optimizer.param_groups]
            optimizer.load_state_dict({"state": state, "param_groups": own})


OPTIMIZERS["muon"] = MuonAndAdamW
