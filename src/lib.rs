//! The lorad server.

pub mod ingest;
