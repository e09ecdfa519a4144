"""Running a torch engine: one process a rank, rank 0 schedules and samples, the others follow."""
