"""Clips out of a trained video model: sampler, checkpoint to model, files to look at."""
