"""The op table: one row per operation that makes a weight gradient. Adding an op is adding a row.

A row reads ``grad_PQ = rows_P.T @ rows_Q`` off a node and returns a :class:`~mkor_fx.ir.Tap`, or a
:class:`~mkor_fx.ir.Decline` that says why it cannot. ``examples`` build small layers whose gradient is made by the op;
the tests hold every row to one identity on them: ``rows_P.T @ rows_Q`` equals autograd's gradient, and ``a`` equals the
layer's input.
"""

from . import convolution, linear, lookup
from .row_sums import ROW_SUMS
from .table import CASTS, TABLE, VIEWS, Row, op_rule

__all__ = ["CASTS", "ROW_SUMS", "TABLE", "VIEWS", "Row", "convolution", "linear", "lookup", "op_rule"]
