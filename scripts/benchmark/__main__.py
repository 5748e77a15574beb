"""`python -m benchmark`, started by scripts/bench."""

from benchmark.cli import main

if __name__ == "__main__":
    main()
