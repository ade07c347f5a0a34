"""Virtual devices: one worker thread each, on host memory."""
