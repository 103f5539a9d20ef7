"""The crash log: pstore zones in a mapped file, interchangeable with the kernel's ramoops."""
