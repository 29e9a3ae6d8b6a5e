"""`python -m diffusers_moebius` is the `moebius` command."""

from .cli import main

main()
