"""Train, watch, prune, repair and report: `python train.py VERB -c configs/... [--trainer.devices 4 ...]`."""

from lit_prune.cli.main import main

if __name__ == "__main__":
    main()
