"""How an op meets PyTorch.

An op is declared in `spec`, registered by `register` and called by `call`. `op` holds its kernels by backend, and
`autograd` is its derivative; `reference` and `native` are two of the backends, and `fit` looks at what the dispatcher
hands over. All private parts of PyTorch stand in `torch_internals`.
"""
