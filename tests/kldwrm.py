"""Eager SO-KLD-WRM and Q-KLD-WRM from their equations, the whole curvature written out. O out, I in, N rows."""

import torch
from rows import matrix, watch


def whole(L, R, damping):
    """``L (x) R + damping``, ``[O I, O I]``."""
    return torch.kron(L, R) + damping * torch.eye(len(L) * len(R)).double()


class KldwrmReference:
    """``step(rate)`` behind a backward, plain SGD behind its directions. Inverses are those of the curvature at the end
    of the last step that ``every`` divides."""

    def __init__(self, model, variant, refresh_every, every, decay, damping):
        vars(self).update(locals(), layers=watch(model), F={}, now={}, inverted={}, left={}, count=0, last_rate=None)

    def refresh(self, name, rows):
        g = torch.cat([g for _, g in rows])
        new = {"L": len(g) * g.T @ g}
        if rows[0][0] is not None:
            a = torch.cat([a for a, _ in rows])
            new["R"] = a.T @ a / len(a)
        old = self.F.get(name)
        mix = lambda key: new[key] if old is None else self.decay * old[key] + (1 - self.decay) * new[key]
        self.F[name], self.now[name] = {key: mix(key) for key in new}, new

    def pair(self, factors, of_bias, width):
        """The curvature of a weight, or of its bias, as two matrices."""
        alone = of_bias or "R" not in factors
        return factors["L"], torch.eye(width).double() if alone else factors["R"]

    @torch.no_grad()
    def step(self, rate):
        t = 1.0 if self.last_rate is None else self.last_rate / rate
        for name, (module, rows) in self.layers.items():
            if self.count % self.refresh_every == 0:
                self.refresh(name, rows)
            parts = {"weight": module.weight} | ({"bias": module.bias} if getattr(module, "bias", None) is not None else {})
            for part, p in parts.items():
                of_bias = part == "bias"
                G, at = (x[:, None] if of_bias else matrix(module, x) for x in (p.grad, p.data))
                wake = self.decay * t * self.left.get((name, part), torch.zeros_like(G))
                D, self.left[name, part] = G + wake, -G
                if name in self.inverted:
                    L, R = self.pair(self.inverted[name], of_bias, G.shape[1])
                    D = torch.linalg.solve(whole(L, R, self.damping), D.flatten()).view_as(D)
                    if self.variant == "q":
                        L, R = self.pair(self.F[name], of_bias, G.shape[1])
                        self.left[name, part] = wake - L @ D @ R - self.damping * D
                at -= rate * D
            if self.count % self.every == 0:
                added = rate if self.variant == "q" else 0.0
                self.inverted[name] = {key: F + added * self.now[name][key] for key, F in self.F[name].items()}
            rows.clear()
        self.count, self.last_rate = self.count + 1, rate
