"""From batches to a trained model: ranks, precision, optimizer, checkpoints, stopping, the loop."""
