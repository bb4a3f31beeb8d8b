//! One integration binary: the real server on port 0 with a data directory of its own, driven from outside.
//!
//! [`access`], [`api`], [`audit`], [`estimates`], [`hub`], [`limits`], [`otlp`], [`quotas`], [`safety`], [`sse`] and [`webhooks`] drive it over HTTP ([`client`]) with archives made in code ([`corpus`]); [`cli`] and
//! [`readme`] run the binary as a user does; [`power`] cuts its power on a [`machine`] of its own, and [`upgrade`] replaces it at work. [`jobs`], [`recovery`], [`chaos`] and [`upkeep`] test everything around the trainer ([`server`]) with
//! a scripted one ([`scripted`]): real processes, sockets, signals and files, and steps of milliseconds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod access;
mod api;
mod audit;
mod chaos;
mod cli;
mod client;
mod corpus;
mod crashes;
mod disk_full;
mod estimates;
mod faults;
mod fuzz;
mod hub;
mod jobs;
mod limits;
mod machine;
mod otlp;
mod power;
mod quotas;
mod readme;
mod recovery;
mod safety;
mod scripted;
mod server;
mod soak;
mod sse;
mod upgrade;
mod upkeep;
mod viewers;
mod webhooks;

/// Counts the heap, for the tests that bound it.
#[global_allocator]
static HEAP: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;
