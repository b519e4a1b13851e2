"""Programs of other libraries, run by another interpreter.

In a folder of their own, the first on their path: among our modules Transformers would take `kernels` for Hugging
Face's package of that name.
"""
