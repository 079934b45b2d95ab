"""What each process finds out at its first compilation, found out once: ranks fork from one that has imported this."""

import gc

import torch

import mkor_fx

from . import quick, stepping  # noqa: F401

torch.set_num_threads(1)
if not torch.cuda.is_available():  # threads of its would not outlive the fork
    for door in ("compile_step", "compile"):
        model, x = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), torch.ones(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        _, step = stepping.stepper(door, model, torch.nn.functional.mse_loss, optimizer, mkor_fx.MKOR.published())
        step(x, x)
    torch._dynamo.reset()
    del model, optimizer, step, x
gc.collect()
gc.freeze()
