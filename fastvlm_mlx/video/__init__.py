"""Videos, cameras, streams, the screen, folders → frames in time."""
