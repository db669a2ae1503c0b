# The kernels for one instruction set; the flags that make it so are in setup.py.
include "kernels.pxi"
