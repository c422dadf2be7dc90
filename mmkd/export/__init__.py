"""Students in the formats of other runtimes: written, read back by those runtimes, and described on disk."""
