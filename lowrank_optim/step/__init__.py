"""One step of one parameter, and what an ordinary step does for many of them together."""
