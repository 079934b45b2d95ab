"""``python -m mkor_fx.ops.document``: ``docs/ops.md``, written from the op table and the list of reasons."""

from __future__ import annotations

import tabulate

from ..reasons import REASONS
from . import TABLE


def document() -> str:
    rows = [
        [f"`{row.name}`", f"`{op}`", row.covers, " ".join((row.read.__doc__ or "").split())]
        for op, row in TABLE.items()
    ]
    return PAGE.format(
        rows=_table(rows, ["row", "gradient is made by", "what people write", "how it is read"]),
        reasons=_table([[text, instance] for text, instance in REASONS.items()], ["declined because", "for instance"]),
    )


def _table(rows: list[list[str]], headers: list[str]) -> str:
    escaped = [[cell.replace("``", "`").replace("|", "\\|") for cell in row] for row in rows]
    return tabulate.tabulate(escaped, headers, tablefmt="pipe", disable_numparse=True)


PAGE = """# What is matched

This page is written by `python -m mkor_fx.ops.document` from the op table and the list of reasons; a test holds it to them.

A weight is a site when every term of its gradient is made by an operation that has a row in `mkor_fx/ops`:

{rows}

**From the gradient back to the product.** A gradient is followed back through views, transposes and casts, and taken
apart at additions (several uses), concatenations and scatters into zeros (`chunk`, `split`, `unbind`, slices,
`W[i]`). Each piece is placed in the parameter by the strides of its elements, so that weights stored in any order of
dimensions are matrices `[O, I]` or batches of them `[E, O, I]`. An index of one of the parameter's own leading
dimensions (`unbind`, `W[i]`) is a member of a batch; a slice within a dimension (a packed projection) is a piece of
one matrix.

**Batches.** A batched weight (experts, groups of a convolution, stacked layers) has a factor pair for each member. A
member that no row has reached keeps its factors: rows whose output gradient is zero do not count.

**Several uses.** Rows of uses in one orientation are added up: a weight used twice is a weight with twice the rows. A
use of a piece has rows that are zero elsewhere. Uses in opposite orientations (tied embedding and head) are
statistics of their own with equal shares. A recomputation under activation checkpointing is not another use.

**Embeddings** get the factor of their width. The vocabulary's side stays the identity: the second moment of one-hots
is diagonal, which a base optimizer with a scale an element takes care of, and a full factor would move rows that no
token has used. A table that a product shares (a tied head) has both, up to the largest side for which the rule keeps one.

**Functions of a weight.** Where a weight acts through a function of weights and buffers alone (`weight_norm`, a mask,
a scale, `tanh(W)`), the product makes the gradient of the function's value and the weight's own follows from it
element by element. The statistics are the product's, shown as `linear of f(W)`. In `W + B @ A` each factor is a
weight of its own whose inputs are what the other has made of the layer's.

**Kronecker products.** So are the factors of `W = s torch.kron(A, B)`, alone or added to another weight, whatever uses
`W` has as a matrix: each row of `W` is as many rows of `A` as `B` has outputs, and as many of `B` as `A` has inputs. `W`
is formed all the same; `mkor_fx.nn.Kronecker` does without ([kronecker.md](kronecker.md)).

**Biases.** A parameter whose gradient is the row sum of a site's `g` is that site's bias.

## What is declined

{reasons}
"""

if __name__ == "__main__":
    print(document(), end="")
