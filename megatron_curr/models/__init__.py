"""Models as megatron-core specs, and the one place that chooses their modules."""

import megatron_curr.parallel  # noqa: F401  (installs the CPU shim before megatron-core is used)
