"""Training without a framework: settings, jobs, the loop, run folders, checkpoints and processes."""
