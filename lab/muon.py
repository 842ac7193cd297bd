"""Muon for the matrices, AdamW for the rest: --optimizer muon.

AdamW divides each weight's step by that weight's own gradient sizes, so it favours the axes of the
hidden space, and is accused of growing the outliers (arXiv 2410.17174, 2506.19697). Muon (Jordan et
al. 2024) makes the step of a whole matrix orthogonal: all its directions move equally far.

    M = 0.95 M + 0.05 G;   W -= lr * 0.2 sqrt(max(rows, columns)) * orthogonal(0.05 G + 0.95 M)

`orthogonal` sets all singular values to about 1, by five Newton-Schulz iterations in bf16. The
factor gives the step the root mean square of AdamW's (arXiv 2502.16982), so that both use the
recipe's lr and weight decay.
"""
import torch

from minq.training import OPTIMIZERS


@torch.no_grad()
def orthogonal(G):
    """(rows, columns) -> the nearest matrix whose singular values are about 1."""
    X = G.bfloat16() if len(G) <= G.shape[1] else G.bfloat16().mT
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.addmm(X, B, X, beta=3.4445)
    return X if len(G) <= G.shape[1] else X.mT


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW, but for the weights of all Linears inside the blocks, which take Muon's step; of
    stacked matrices (W_q, W_k, W_v) each takes its own."""

    def __init__(self, model, groups, lr, betas):
        parts = {module.weight: getattr(module, "parts", 1) for module in model.layers.modules()
                 if isinstance(module, torch.nn.Linear)}
        muon = [group | {"params": [p], "parts": parts[p]} for group in groups
                for p in group["params"] if p in parts]
        others = [group | {"params": [p for p in group["params"] if p not in parts]}
                  for group in groups]
        super().__init__(others + muon, lr=lr, betas=betas, fused=True)
        self._step_supports_amp_scaling = False  # GradScaler: leave out steps that overflow

    @torch.no_grad()
    def step(self):
        held = []
        for group in (group for group in self.param_groups if "parts" in group):
            (W,) = group["params"]
            if W.grad is not None:
                state = self.state[W]
                state.setdefault("step", torch.zeros(()))  # AdamW looks for it in all it loads
                M = state.setdefault("momentum", torch.zeros_like(W))
                M.lerp_(W.grad, 0.05)
                W.mul_(1 - group["lr"] * group["weight_decay"])
                for w, g, m in zip(*(x.chunk(group["parts"]) for x in (W, W.grad, M))):
                    size = 0.2 * max(w.shape) ** 0.5
                    w.add_(orthogonal(g.lerp(m, 0.95)), alpha=-group["lr"] * size)
                held.append((W, W.grad))
                W.grad = None  # AdamW leaves it alone
        super().step()
        for W, gradient in held:
            W.grad = gradient


OPTIMIZERS["muon"] = MuonAndAdamW
