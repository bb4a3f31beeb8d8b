//! One integration binary: the real server on port 0 with a data directory of its own, driven from outside.
//!
//! [`api`], [`hub`], [`limits`], [`safety`] and [`sse`] drive it over HTTP ([`client`]) with archives made in code ([`corpus`]); [`cli`] and
//! [`readme`] run the binary as a user does. [`jobs`], [`recovery`], [`chaos`] and [`upkeep`] test everything around the trainer ([`server`]) with
//! a scripted one ([`scripted`]): real processes, sockets, signals and files, and steps of milliseconds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod api;
mod chaos;
mod cli;
mod client;
mod corpus;
mod hub;
mod jobs;
mod limits;
mod readme;
mod recovery;
mod safety;
mod scripted;
mod server;
mod sse;
mod upkeep;
