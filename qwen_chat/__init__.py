"""Tune a Qwen2-family chat model on your conversations and serve it in exactly the format it was trained in.

Modules, in the order data flows through them, are listed in docs/architecture.md. Importing this package loads nothing:
each module says what it needs.
"""

__version__ = "0.1.0"
