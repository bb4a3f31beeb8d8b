//! Types that the lorad server and its workers exchange. Serde only: no HTTP, SQL, tensors or I/O.
//!
//! The server (`lorad`) and the trainer (`lorad-train`) both depend on this crate and not on each other's internals, so
//! a worker on another machine, or of another build, fails on [`PROTOCOL_VERSION`] instead of on a misread field.
//!
//! - [`spec`]: what one attempt at a job needs; the server writes it to `<attempt_dir>/spec.json`.
//! - [`event`]: what a worker reports, in order, at least once.
//! - [`command`]: what the server answers.
//! - [`dataset`]: the on-disk form of an ingested dataset and the verdicts on its files.
//! - [`catalog`]: what the trainer says about its model families (schema, metrics, validation, plans).
//! - [`problem`]: an error that a user can act on: stable code, detail, hint.

pub mod catalog;
pub mod command;
pub mod dataset;
pub mod event;
pub mod problem;
pub mod spec;

/// Raised when [`spec`], [`event`] or [`command`] change so that an older side would misread them.
pub const PROTOCOL_VERSION: u32 = 1;
