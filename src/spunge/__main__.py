"""python -m spunge"""

from spunge.cli import main

main()
