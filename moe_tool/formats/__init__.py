"""Reading and writing of artifact files; every reader treats its file as hostile."""
