"""Run the command line with `python -m sphereify`."""

from sphereify.cli import main

main()
