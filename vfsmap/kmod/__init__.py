"""Kernel modules and kernels as images: read, laid out, bound to a host, stored, loaded."""
