//! The integration tests, in one binary: the real server on a free port, driven over HTTP.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod api;
mod client;
mod corpus;
mod safety;
mod sse;
