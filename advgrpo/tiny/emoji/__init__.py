"""The emoji world: drawings of 64 things by several artists, and a judge that is not ours."""
