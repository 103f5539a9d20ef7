"""Windows: ranges of a process's addresses over a file's extents."""
