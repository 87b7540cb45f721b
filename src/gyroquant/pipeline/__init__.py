"""One quantization from start to end: the job, its stages, and how each of them runs."""
