"""Many photos: found, read ahead, filled in batches, and written while the next ones are filled."""
