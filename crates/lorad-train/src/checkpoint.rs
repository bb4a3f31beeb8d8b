//! Checkpoints: atomic directory writes with a manifest of hashes, and the newest verified one.
