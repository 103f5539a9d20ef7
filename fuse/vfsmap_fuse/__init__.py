"""The pool as a mounted file system: request handlers, virtual attributes, the mount itself."""
