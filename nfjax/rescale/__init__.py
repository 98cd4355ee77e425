"""Data-dependent initialization: a Flax model and a batch in, the same model with other kernels out.

::

    model = rescale.lsuv(model, x)                       # every layer's output has variance 1
    model = rescale.balance(model, x)                    # the signal is as flat as factors can make it, both ways
    model = rescale.balance(model, x, report=print)      # and what was done

Of a Linen module the variables come back: `variables = rescale.balance(model, x, variables=variables)`.
"""

from __future__ import annotations

from nfjax.rescale._balance import DIRECTIONS, balance
from nfjax.rescale._lsuv import lsuv
from nfjax.rescale._report import Report, Row

__all__ = ["DIRECTIONS", "Report", "Row", "balance", "lsuv"]


def __dir__() -> list[str]:
    return __all__
