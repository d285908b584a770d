"""The native engine: decoder blocks and readouts computed by our own kernels, on the CPU.

`model.NativeModel` is a `SplitModel` whose blocks run in `kernels.cpp`; the decode loop does not know the difference.
"""
