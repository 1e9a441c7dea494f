"""The server: one engine behind the interfaces that people already use."""
