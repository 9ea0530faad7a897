"""mii_hcache: conversations come back fast. HCache (EuroSys '25) on DeepSpeed-MII."""

__version__ = "0.1.0"
