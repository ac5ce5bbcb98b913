"""Process groups, the CPU shim and context-parallel attention.

Importing this package installs the shim, so everything that imports megatron-core imports
something from here first.
"""

from megatron_curr.parallel.mcore_shim import install

install()
