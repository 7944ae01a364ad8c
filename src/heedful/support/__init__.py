"""What runs where: every feature asked of every backend, and what each door has words for.

`matrix()` asks the backends' own declarations, so that a backend which joins `heedful.choose.BACKENDS` is in it by
itself. `heedful support` prints it, and the documentation's page of that name is made from it.
"""

from heedful.support.asks import Ask, asks
from heedful.support.doors import DOORS, Door
from heedful.support.matrix import Matrix, Verdict, matrix

__all__ = ["DOORS", "Ask", "Door", "Matrix", "Verdict", "asks", "matrix"]
