"""`python -m sphereify`"""

from sphereify.cli import main

main()
