"""What the items share: rows, the paper's series, models and platforms, simulators, plots, the runner, the report."""
