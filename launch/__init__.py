"""Starting runs: processes on this machine, and what each rank does."""
