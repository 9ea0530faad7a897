"""Threads, streams, pinned memory. Knows no DeepSpeed: engines stand behind `ports`."""
