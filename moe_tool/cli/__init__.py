"""The verbs: arguments in, one call, its result on the terminal."""
