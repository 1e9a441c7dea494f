"""Stages beside their floors, and kernels counted from the graph."""
