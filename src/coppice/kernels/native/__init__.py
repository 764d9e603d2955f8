"""The operators in C++: its sources, and `NativeOps` which calls them.

Importing this fails with `ImportError` where the extension was not built.
"""

from coppice.kernels.native.ops import NativeOps

__all__ = ["NativeOps"]
