"""What would make an input that a run does not have, as a command."""

import re

from lit_prune.report.run_folder import RunFolder

FIT = "lit-prune fit"
ANALYZE = "lit-prune analyze --run_dir {run}"
SWEEP = "lit-prune sweep --run_dir {run}"
REDUCE = "lit-prune reduce --run_dir {run} --request.calibration_sizes '[1000]'"
SAME = "with the -c of the run"
MAKERS = (
    (r"trace/gradients", FIT, "with the callback lit_prune.GradientTrace"),
    (r"trace/|traced epoch", FIT, "with the callback lit_prune.AxisTrace"),
    (r"tensorboard/", FIT, "with a logger"),
    (r"stages\.jsonl|compact/", FIT, "with the callback lit_prune.StagedPruning"),
    (r"stages\.jsonl|compact/", "lit-prune compress", "on a trained network"),
    (r"run\.json|config\.yaml", FIT, "and every verb that reads data"),
    (r"rand_index|local_group", ANALYZE + " --request.extras '[groupings]'", SAME),
    (r"graphs\.table|modularity", ANALYZE + " --request.extras '[groupings,graphs,hulls,triplets]'", SAME),
    (r"propagation\.table", ANALYZE + " --request.extras '[propagation]'", SAME),
    (r"channels\.parquet(?! with local)|layers\.parquet(?! with (rand|mod))", ANALYZE, SAME),
    (r"lesions?\b", "lit-prune lesion --run_dir {run}", SAME),
    (r"sensitivity", "lit-prune sensitivity --run_dir {run}", SAME),
    (r"curve", "lit-prune curve --run_dir {run}", SAME),
    (r"sweep(?!/(rules|weights))", SWEEP, SAME),
    (r"sweep/rules", SWEEP + " --request.allocations '[global,uniform]'", SAME),
    (r"sweep/weights", SWEEP + " --request.alphas '[0.5,1]' --request.betas '[0.25]'", SAME),
    (r"reduction\.json with the extra 'stress'", REDUCE + " --request.extras '[stress]'", SAME),
    (r"reduction\.json(?! with the extra)", REDUCE, SAME),
)
"""Pattern of an absent input, the command that makes it, and with what."""


def commands_for(reason: str, run: RunFolder) -> tuple[tuple[str, str], ...]:
    """Commands, each with what has to be said besides, that make the input which `reason` names; none is known: ()."""
    found = [(command, said) for pattern, command, said in MAKERS if re.search(pattern, reason)]
    return tuple((command.format(run=run.path), said) for command, said in found)
