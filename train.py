"""Train, watch, prune, repair and report: `python train.py VERB -c configs/... [--trainer.devices 4 ...]`."""

from lit_prune.__main__ import command

if __name__ == "__main__":
    command()
