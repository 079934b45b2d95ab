"""fully_shard, as torchtitan uses it: each block sharded, the compiled model in a plain loop.

    torchrun --nproc-per-node 2 docs/loops/fsdp2.py

Uncompiled here, to take seconds; without `backend="eager"` Inductor compiles it, which takes a minute on a small CPU.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import mkor_fx


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main(backend="eager"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), Block(32), Block(32), nn.Linear(32, 4))
    for block in model[1:3]:
        fully_shard(block)
    fully_shard(model)
    model = mkor_fx.compile(model, mkor_fx.MKOR.published(), precondition="backward", backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(10):
        x = torch.randn(32, 16, generator=generator)
        loss = cross_entropy(model(x), x[:, :4].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if dist.get_rank() == 0:
        print(f"{model.mkor}; loss {losses[0]:.3f} -> {losses[-1]:.3f} on {dist.get_world_size()} ranks")
    return losses, model.mkor.step


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
