"""Every layer that a program may have, by name."""

from .layer import Layer
from .modules import Attention, Cell, Elementwise, Norm
from .products import Conv, Experts, HeadsIn, HeadsOut, Linear, Product, convolution
from .weights import Derived, Packed, Penalty, Tied

CONVOLUTIONS: dict[str, type[Conv]] = {
    c.__name__: c for c in (convolution(n, t) for n in (1, 2, 3) for t in (False, True))
}
LAYERS: dict[str, type[Layer]] = {
    **{c.__name__: c for c in (Linear, Product, HeadsOut, HeadsIn, Experts, Packed, Derived, Attention, Cell, Tied)},
    **CONVOLUTIONS,
    **{c.__name__: c for c in (Norm, Elementwise, Penalty)},
}
