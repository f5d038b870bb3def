"""What the training loop stands on: ranks, batches, the folder of a run, signals, the optimizer."""
