"""`python -m lit_prune VERB ...` and the installed command `lit-prune VERB ...`."""


def command() -> None:
    """Carries out the command line of this process; whatever the verb returns, success is exit code 0."""
    from lit_prune.cli.main import main

    main()


if __name__ == "__main__":
    command()
