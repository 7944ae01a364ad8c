"""`python -m heedful.cli`, the same as the installed command."""

from . import main

main()
