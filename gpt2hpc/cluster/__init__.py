"""Jobs and processes: who runs where, what happened, and what to do next. Imports no torch."""
