"""The recipe that makes the bundled nano model from nothing, with this library only."""
