"""`python -m kvrewrite`, which torchrun starts: the command line."""

from kvrewrite.cli import main

if __name__ == "__main__":
    main()
