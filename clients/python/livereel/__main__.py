"""python -m livereel: the command line."""

from livereel.cli import main

if __name__ == "__main__":
    main()
