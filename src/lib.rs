//! The lorad server.
