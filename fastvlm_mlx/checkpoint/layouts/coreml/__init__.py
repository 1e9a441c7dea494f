"""The Core ML package that holds the encoder of the Apple export."""
