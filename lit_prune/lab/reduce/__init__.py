"""The verb `reduce`: mechanisms of one layer replaced, folded and checked by interchange interventions."""
