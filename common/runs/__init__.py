"""What a run is on disk and what it shows: its folder, checkpoints, report, answers and metrics."""
