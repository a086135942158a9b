"""`python -m lit_prune VERB ...`, the same as `lit-prune VERB ...`."""

from lit_prune.cli.main import main

if __name__ == "__main__":
    main()
