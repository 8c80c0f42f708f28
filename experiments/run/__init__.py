"""What a run leaves behind and what it shows: folder, metrics, progress, plots, report."""
