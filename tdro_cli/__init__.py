"""Learn how much of each retrieval training task to use, fine-tune with it, and prove the gain."""

__version__ = "0.1.0"
