"""Pretraining on Megatron-Core, fed by one staged curriculum driven by consumed tokens."""

__version__ = "0.1.0"
