"""Dispatch by remote DMA inside one TPU kernel; no TPU has run it, and no model asks for it yet."""
