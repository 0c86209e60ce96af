"""`python -m oriole.cli`."""

from oriole.cli import main

main()
