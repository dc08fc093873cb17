"""What an installation must be able to do, tried out: a module for each trial, which runs in a process of its own."""
