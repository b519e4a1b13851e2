"""How Triton kernels are proven on a machine without a GPU: interpreted, compiled and inspected, lowered."""
