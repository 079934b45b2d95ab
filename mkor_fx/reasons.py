"""Why a parameter keeps its raw gradient: every reason there is, with an instance of it. ``docs/ops.md`` lists them."""

from __future__ import annotations

#: reason -> for instance; ``{...}`` is filled in where it is given
REASONS: dict[str, str] = {}


def reason(text: str, instance: str) -> str:
    REASONS[text] = instance
    return text


NO_ROW = reason(
    "no row of the op table reads the operation that makes its gradient",
    "a scale `x * p`, a position table `x + p`, an activation's parameter, one of whose uses is of that kind",
)
VECTOR = reason(
    "a vector, and not the bias of a matched weight",
    "scales and shifts of normalisations (a diagonal is what the base optimizer has), a transposed convolution's bias",
)
NO_MATRIX = reason(
    "its gradient is made as {made}, which is no matrix view of it", "a weight padded before it multiplies"
)
DIFFERENT = reason("its uses read it as different matrices", "one tensor viewed as `[6, 4]` and as `[2, 12]`")
INCOMPLETE = reason("the pieces that are used do not make up a matrix", "a slice that cuts through merged dimensions")
ROLES = reason("{which} on the gradient of the loss", "second derivatives; a product of two weights alone")
FREQUENCY = reason(
    "scale_grad_by_freq makes the gradient differ from a product", "`nn.Embedding(scale_grad_by_freq=True)`"
)
MASKED = reason("a weight indexed by a mask", "`W[mask]`")
KRONECKER = reason(
    "a factor of a Kronecker product whose gradient is no product of rows: use mkor_fx.nn.Kronecker",
    "`torch.kron(A, B) * mask`, a convolution's kernel",
)
DISAGREE = reason(
    "two graphs use it in ways that do not go together", "tied embedding and head on both sides of a graph break"
)
SHARDED = reason("a tensor-parallel shard", "a DTensor made by `parallelize_module`, in `mkor_fx.compile`")
DTYPE = reason("no rule for {dtype} weights", "complex weights")
EMPTY = reason("it has no elements", "")
ZERO = reason("its gradient is zero", "")
UNUSED = reason("no gradient reaches it in this graph", "an unused layer")
UNSEEN = reason("not seen in a graph with gradients", "a layer that no step has used yet")
NO_STATE = reason("{rule} keeps no state for {O} x {I}{why}", "`MKOR`, where both sides exceed its largest factor")
GATHERED_TWICE = reason(
    "its uses are read in several ways, and {rule} gathers the rows of one", "`HyLo`, a convolution that is applied twice"
)
NO_PATTERN = reason("no pattern of rule= names it", '`rule={"blocks.*": MKOR()}`')
WEIGHT_DECLINED = reason("its weight {weight} is declined", "")
BIAS_ALONE = reason(
    "{rule} leaves the bias of {weight} alone", "`MKOR(bias='off')`, or an output side without a factor"
)
STEPPED_APART = reason(
    "it is not stepped together with its weight {weight}",
    "biases in another optimizer than their weights, in `mkor_fx.compile`",
)
SKIPPED = reason("skipped by pattern {pattern}", '`skip=["head.*"]`, `rule={"head.*": None, "*": MKOR()}`')
NOT_HELD = reason("the optimizer does not hold it", "`compile_step` with an optimizer over some of the parameters")
NO_RULE = reason("no rule: the plain step", "`compile_step(..., rule=None)`")
