"""The training loop and what surrounds it: steps, evaluation, metrics, checkpoints, the run folder.

Nothing is imported here, so that the modules without torch (``run_folder``, ``checkpoint_folder``,
``preflight``) load in the launching process in a moment.
"""
