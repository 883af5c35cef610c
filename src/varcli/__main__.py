"""`python -m varcli` is `var`."""

from varcli.cli import main

if __name__ == "__main__":
    main()
