"""What a training will need, looked at beforehand: a module for each kind of thing, which returns findings and imports no torch."""
