"""FastVLM: vision encoder, projector and Qwen2 decoder."""
