"""Registration of a spine CT to an MR: soft tissue deforms, every vertebra stays rigid."""

__version__ = "0.1.0"

from .data import check
from .registration import apply, register
from .training import fit

__all__ = ["apply", "check", "fit", "register"]
