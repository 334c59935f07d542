"""Tasks, their rows, their metrics, and batches of them."""
