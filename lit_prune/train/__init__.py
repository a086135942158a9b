"""What runs inside a Trainer: modules, callbacks, stages, repair, and the records that they leave."""
