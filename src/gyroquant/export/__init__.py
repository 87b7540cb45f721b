"""Writing models: one file a format."""
