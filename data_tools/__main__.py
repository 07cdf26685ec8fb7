"""`python -m data_tools`: the same as `clipscale-shards`."""

from data_tools.cli import main

if __name__ == "__main__":
    main()
