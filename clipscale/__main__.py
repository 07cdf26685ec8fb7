"""`python -m clipscale`: the same as the command `clipscale`."""

from clipscale.cli import main

if __name__ == "__main__":
    main()
