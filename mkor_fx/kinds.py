"""What the tensors of a rule's state are."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What a tensor of a state is, which decides what ``metrics()`` tells of it."""

    POSITIVE = "a positive (semi-)definite matrix: its extremes lie on the diagonal"
    ORTHOGONAL = "an orthogonal matrix: how far ``Q^T Q`` is from the identity"
    MOMENT = "a moment or an average: its root mean square"
