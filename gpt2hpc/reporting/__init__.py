"""What a run's files say of it, for people: curves, attempts, cost."""
