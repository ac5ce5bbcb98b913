"""Checkpoints as Hugging Face folders, with proof that both models are one."""
