"""Tables, lines and plots of results, for people."""
