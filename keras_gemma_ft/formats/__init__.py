"""Arrays <-> bytes on disk; nothing here imports keras or a backend."""
