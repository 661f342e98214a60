"""``python -m distmoe``."""

from distmoe.cli import main

main()
