"""From batches to the channel table: what is recorded, in which sums, and the two axes that follow from them."""
