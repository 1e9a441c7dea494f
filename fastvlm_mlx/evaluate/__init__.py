"""How well a model answers, and what a precision costs."""
