//! Layers that train right: every forward here has a backward.
