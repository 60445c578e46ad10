"""Other methods, and many cases side by side."""
