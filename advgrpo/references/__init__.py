"""Reference sets: drawn, imported, resumed, checked."""
