"""What a run will take: time, GPU-hours, jobs, disk; without torch and without a GPU."""
