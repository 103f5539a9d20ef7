"""The mapping daemon: logical mappings of files, granted over a Unix socket, and its client."""
