"""One model over several processes (tensor parallelism): rank 0 serves and schedules, the others do as it does."""
