"""Device code: Triton kernels, and nothing else. Importing a module here imports Triton: do it inside a GPU branch."""
