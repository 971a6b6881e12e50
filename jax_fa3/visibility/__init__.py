"""Which keys a row sees where that is told by arrays: the table that the kernels read."""
