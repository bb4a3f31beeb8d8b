//! Custom ops with forward and backward.
