"""Eager SINGD from its equations, every matrix written out. O out, I in, N rows."""

import torch
from rows import matrix, watch


def weights_of(structure, n, block, corners):
    """What the projection multiplies the entries of a symmetric matrix by, ``[n, n]``."""
    if structure == "triangular":
        return 2 * torch.ones(n, n).double().tril() - torch.eye(n)
    kept = torch.zeros(n, n).double()
    if structure == "dense":
        kept += 1
    elif structure == "diagonal":
        kept += torch.eye(n)
    elif structure == "block":
        for start in range(0, n, block):
            kept[start : start + block, start : start + block] = 1
    else:
        p, q = (0, 1) if structure == "rank1" else corners
        p = min(p, n)
        q = min(q, n - p)
        kept += torch.eye(n)
        kept[:p, :p] = 1
        kept[:p, p:] = 2
        kept[n - q :, n - q :] = 1
        kept[n - q :, p : n - q] = 2
    return kept


class SingdReference:
    """``step()`` behind a backward; plain SGD with momentum and weight decay behind its directions."""

    def __init__(self, model, structure, form, refresh_every, block, corners, damping, beta1, alpha1, bound, lr, wd):
        vars(self).update(locals(), count=0, layers=watch(model), K={}, m={}, u={})

    def moved(self, key, other, H, t, T):
        n, m = len(H[key]), self.m.get(key, 0)
        K, P = self.K[key], weights_of(self.structure[key[1] == "K"], len(H[key]), self.block, self.corners)
        t, T = (t, T) if self.form == "singd" and other in H else (1, 1)
        step = (t * H[key] + self.damping * T * P * (K.T @ K) - torch.eye(n)) / 2
        m = self.alpha1 * m + step * (1 - self.alpha1 if self.bound else 1)
        size = {"norm": m.abs().sum(1).max(), "entries": m.abs().max(), None: torch.ones(())}[self.bound]
        return m, K - self.beta1 / max(1.0, float(size)) * K @ m

    @torch.no_grad()
    def step(self):
        for name, (module, rows) in self.layers.items():
            G = matrix(module, module.weight.grad)
            g = torch.cat([g for _, g in rows])
            factors = {(name, "C"): len(g) * g.T @ g}
            if rows[0][0] is not None:
                a = torch.cat([a for a, _ in rows])
                factors[name, "K"] = a.T @ a / len(a)
            for key, F in factors.items():
                self.K.setdefault(key, torch.eye(len(F)).double())
            if self.count % self.refresh_every == 0:
                H = {}
                for key, F in factors.items():
                    P = weights_of(self.structure[key[1] == "K"], len(F), self.block, self.corners)
                    H[key] = P * (self.K[key].T @ F @ self.K[key])
                mean = lambda M: M.trace() / len(M)
                new = {}
                for key in factors:
                    other = (name, "K" if key[1] == "C" else "C")
                    t, T = (mean(H[other]), mean(self.K[other].T @ self.K[other])) if other in H else (1, 1)
                    new[key] = self.moved(key, other, H, t, T)
                for key, (m, K) in new.items():
                    self.m[key], self.K[key] = m, K
            inverse = {key[1]: self.K[key] @ self.K[key].T for key in factors}
            D = inverse["C"] @ G @ inverse.get("K", torch.eye(G.shape[1]).double())
            parts = [(module.weight, D.T if rows[0][0] is None else D.reshape(module.weight.shape))]
            if getattr(module, "bias", None) is not None:
                parts.append((module.bias, inverse["C"] @ module.bias.grad))
            for p, direction in parts:
                self.u[p] = 0.9 * self.u.get(p, 0) + direction + self.wd * p
                p -= self.lr * self.u[p]
            rows.clear()
        self.count += 1
