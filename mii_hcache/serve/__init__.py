"""The OpenAI-compatible server: `python -m mii_hcache.serve`."""
