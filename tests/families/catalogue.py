"""All families. As a program it writes docs/families.md; the tests hold each of its lines to what they find."""

from pathlib import Path

import decoders
import encoders
import torch
import vision
from family import made, summary

import mkor_fx

FAMILIES = {family.name: family for part in (encoders, decoders, vision) for family in part.FAMILIES}

TEXT = """# Families of models

What `MKOR.published()` preconditions of the models people train, at tiny sizes; `MKOR()` leaves embeddings and biases to the
base optimizer. A matrix is a parameter with two dimensions larger than
one whose gradient is made by a product; which ones those are is written down by hand in `tests/families`. Written by
`python tests/families/catalogue.py`, and checked by the tests.

| family | matrices covered | elements | exceptions |
|---|---|---|---|
{rows}

No matrices in that sense, and declined: scales and shifts of normalisations, learnt positions and class tokens that are
added without a lookup (ViT), Mamba's `A_log` and `D`, layer scales (ConvNeXt), attention sinks (GPT-OSS).

Remarks, as met with transformers 5.23:

- Mixtures of experts: `experts_implementation="grouped_mm"` (the default) and `"batched_mm"` are captured whole; `"eager"`
  loops over the experts that were hit, which no compiler can capture.
- Sequence and image classifiers write `config.problem_type` in their first forward, which compiles the step a second
  time: set it, for instance to `"single_label_classification"`.
- `nn.LSTM`, `nn.GRU` and `nn.RNN` are captured as their time steps, so compilation grows with the length of the sequence,
  and each length is a program of its own. torch.compile makes no more than `torch._dynamo.config.recompile_limit` (8) of
  one function: half way there a warning says so. Pad or bucket sequences to few lengths, as multiples of 32, or raise the
  limit. Transformers have two programs, for the first length and for all others.
- Warnings that a model logs once (`warning_once`) are not logged from compiled code.
- The bias of a softmax attention's keys has no gradient but rounding, and a relative position table none that does not
  sum to zero: the one stays as it is, the other's factor stays the identity.
"""


def main() -> None:
    rows = []
    for family in FAMILIES.values():
        torch._dynamo.reset()
        model, batch = made(family)
        covered = summary(family, model, mkor_fx.explain(model, rule=mkor_fx.MKOR.published(), **batch()))
        print(covered, flush=True)
        rows.append(covered.row())
    path = Path(__file__).parents[2] / "docs" / "families.md"
    path.write_text(TEXT.format(rows="\n".join(rows)))


if __name__ == "__main__":
    main()
