"""GGUF files: weights, configuration, tokenizer and chat template from one file.

Owns the container format and its quantised blocks. Refuses anything outside the caps of
`reader`, unknown tensor types and architectures. Invariant: no byte of the file is used
before the span it lies in was checked against the file's size.
"""

from coppice.models.gguf.file import GGUFFile, open_gguf

__all__ = ["GGUFFile", "open_gguf"]
