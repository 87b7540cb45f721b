"""Shared by all other packages: files, checksums, the journal, subprocesses, worker pools, environment, progress."""
