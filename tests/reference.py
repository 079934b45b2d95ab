"""Eager MKOR on hooks, from the equations alone. N rows, O out, I in (one more if joint); convolution [O, C*kh*kw]."""
import torch
import torch.nn.functional as nnf


def rademacher(step, side, n):
    h = (torch.arange(n) + 1 + 7919 * step + 104729 * side) & 0x7FFFFFFF
    for _ in range(2):
        h = (((h >> 16) ^ h) * 0x45D9F3B) & 0x7FFFFFFF
    return 1 - 2 * ((((h >> 16) ^ h) >> 7) & 1)


class Reference:
    def __init__(self, model, optimizer, *, form="scale_free", statistic="mean", gamma, kappa, epsilon, zeta,
                 rescale=True, bias="left", clamp=None, max_factor=4096, factor_dtype=torch.float32, refresh_every=1):
        vars(self).update(locals(), steps=0, rows={}, sites={}, state={}, clamp=clamp or float("inf"))
        self.math = torch.promote_types(factor_dtype, torch.float32)
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        for use in sorted(model.modules(), key=lambda m: isinstance(m, torch.nn.Embedding)):  # embeddings after heads
            W, b = getattr(use, "weight", None), getattr(use, "bias", None)
            lookup = isinstance(use, torch.nn.Embedding) and names.get(W) not in self.sites  # no factor of a vocabulary
            layer = isinstance(use, torch.nn.Linear | torch.nn.Conv2d) and getattr(use, "groups", 1) == 1
            if W in names and (lookup or layer):
                keys = ("" if lookup else f"{names[W]}.L", f"{names[W]}.{'L' if lookup else 'R'}")
                self.sites[names[W]] = names[W], W, b if b in names and bias != "off" else None, keys
                for key, n in zip(keys, (len(W), W[0].numel() + (b in names and bias == "joint")), strict=True):
                    self.state |= {key: torch.eye(n, dtype=factor_dtype)} if key and n <= max_factor else {}
            if names.get(W) in self.sites:
                use.register_forward_hook(lambda use, x, y, name=names[W]: self.watch(name, use, x[0].detach(), y))

    def watch(self, name, use, x, y):
        def record(g, x=x):  # runs when a gradient reaches this output: not at inference, not for a recomputation
            if isinstance(use, torch.nn.Conv2d):
                x = nnf.pad(x, use._reversed_padding_repeated_twice, use.padding_mode.replace("zeros", "constant"))
                x, g = nnf.unfold(x, use.kernel_size, use.dilation, 0, use.stride).mT, g.movedim(-3, -1)
            elif isinstance(use, torch.nn.Embedding):  # its rows a_NI are one-hots
                keep = x != (-1 if use.padding_idx is None else use.padding_idx)
                x, g = nnf.one_hot(x[keep], len(use.weight)), g[keep]
            rows = [t.flatten(0, -2).to(self.math).clamp(-self.clamp, self.clamp) for t in (x, g)]
            self.rows.setdefault((name, type(use) is torch.nn.Embedding), []).append(rows)
        y.requires_grad and y.register_hook(record)

    def vectors(self, name, G_OI, table=False):  # yields pairs: one for the left factor, one for the right
        for embedding in [e for e in (False, True) if (name, e) in self.rows and self.statistic != "gradient"]:
            rows = [torch.cat(r) for r in zip(*self.rows[name, embedding], strict=True)]  # a_NI, g_NO
            a_I, g_O = (self.unless_noise(r.sum(0), r) for r in rows)
            left, right = (a_I / max(len(rows[0]), 1), g_O)[:: 1 if embedding else -1]
            yield left, nnf.pad(right, (0, G_OI.shape[1] - len(right)), value=1 - embedding)  # pads only if joint
        if self.statistic != "mean":
            pairs = zip((1, 0) if table else (0, 1), (G_OI, G_OI.T), strict=True)  # a table is [I, O]
            signed = ((M, rademacher(self.steps, side, M.shape[1]).to(M)) for side, M in pairs)
            yield [self.unless_noise(M @ signs, M) for M, signs in signed]

    def unless_noise(self, v, rows):
        return v * (self.form != "scale_free" or v.norm() > 32 * torch.finfo(v.dtype).eps * rows.norm())

    def refreshed(self, F, vs):
        gamma, w, eye = self.gamma, (1 - self.gamma) / len(vs), torch.eye(len(F)).to(F)
        F = self.zeta * F + (1 - self.zeta) * eye if F.abs().max() > self.epsilon else F
        if self.form == "paper":
            return gamma * F + sum(w / (gamma**2 * (1 + gamma * w * v.dot(F @ v))) * (F @ v).outer(F @ v) for v in vs)
        B, w = (F / gamma, w) if self.form == "exact" else (gamma * F + (1 - gamma) * eye, 1 / len(vs))
        for v in vs:
            v = v * (self.kappa**0.5 / v.norm()) if self.form == "scale_free" and v.any() else v
            B = B - w / (1 + w * v.dot(B @ v)) * (B @ v).outer(B @ v)
        return B

    def rescaled(self, D, G):
        return q * D if 0 < (q := G.norm() / D.norm() if self.rescale else 1) < float("inf") else G

    @torch.no_grad()
    def step(self):
        for name, W, b, keys in filter(lambda site: site[1].grad is not None, self.sites.values()):
            joint = b is not None and self.bias == "joint"
            G_OI = torch.cat([W.grad.flatten(1), *([b.grad[:, None]] if joint else [])], 1).to(self.math)
            for key, vs in zip(keys, zip(*self.vectors(name, G_OI, not keys[0]), strict=True), strict=False):
                if key in self.state and self.steps % self.refresh_every == 0 and torch.cat(vs).isfinite().all():
                    self.state[key] = self.refreshed(self.state[key].to(self.math), vs).to(self.factor_dtype)
            L_OO, R_II = (self.state.get(key, torch.eye(n)).to(G_OI) for key, n in zip(keys, G_OI.shape, strict=True))
            D_OI = self.rescaled(L_OO @ G_OI @ R_II, G_OI)
            W.grad.copy_((D_OI[:, :-1] if joint else D_OI).reshape(W.shape))
            b is None or b.grad.copy_(D_OI[:, -1] if joint else self.rescaled(L_OO @ b.grad.to(L_OO), b.grad.to(L_OO)))
        self.rows, self.steps = {}, self.steps + 1
        self.optimizer.step(), self.optimizer.zero_grad()
