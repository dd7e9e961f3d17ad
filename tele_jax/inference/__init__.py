"""Inference: generation with a KV cache, and conversations with a fine-tuned model."""
