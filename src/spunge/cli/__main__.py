"""python -m spunge.cli"""

from spunge.cli import main

main()
