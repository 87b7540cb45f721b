"""The descriptions of architectures. Every module of this package registers one family."""
