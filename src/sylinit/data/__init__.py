"""What the user brings: batches and targets, read as one calibration set."""
