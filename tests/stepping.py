"""A step through either door, or as torch has it, beside which others are held."""

import mkor_fx


def stepper(door, model, loss_fn, optimizer, rule=None, backend="eager", **options):
    """``(done, step)``: what the door gives, "compile_step" or "compile" (else the plain model), and ``step(x, y)``."""
    if door == "compile_step":
        done = mkor_fx.compile_step(model, loss_fn, optimizer, rule, backend=backend, **options)
        return done, done
    done = mkor_fx.compile(model, rule, backend=backend, **options) if door == "compile" else model

    def step(x, y):
        optimizer.zero_grad()
        loss_fn(done(x), y).backward()
        optimizer.step()

    return done, step
