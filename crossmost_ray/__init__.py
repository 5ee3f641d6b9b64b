"""Label-free adaptation of two-tower 3D classifiers, distributed on Ray."""

__version__ = "0.1.0"
